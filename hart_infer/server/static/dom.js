// Make elements, without ever parsing HTML: what a user or a server wrote is always text.

const ICONS = {
  again: "M4 4v6h6M20 20v-6h-6M5.5 15a7.5 7.5 0 0 0 13 2M18.5 9a7.5 7.5 0 0 0-13-2",
  ask: "M4 5h16v11H9l-5 4z",
  auto: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  close: "M6 6l12 12M18 6L6 18",
  dark: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  left: "M15 5l-7 7 7 7",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M5 19l2-2M17 7l2-2",
  minus: "M6 12h12",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 2-2 5 5M15 9h.01",
  plus: "M6 12h12M12 6v12",
  reconstruct: "M4 12l8-7 8 7-8 7zM12 5v14",
  right: "M9 5l7 7-7 7",
  stop: "M7 7h10v10H7z",
};

/** Make an element. Properties that are functions listen (`click: ...`), others are attributes; true is an empty one. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

/** Draw one of ICONS, for eyes only. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function button(label, iconName, click, properties = {}) {
  return el("button", { type: "button", click, ...properties }, iconName && icon(iconName), el("span", {}, label));
}

/** Say something to those who hear the page. */
export function tell(text) {
  document.getElementById("told").textContent = text;
}

/** A box that says in words what went wrong. */
export function alertBox(message, ...children) {
  return el("div", { class: "trouble", role: "alert" }, el("p", {}, message), ...children);
}

/** Enter submits the form of a text; Shift+Enter begins a line. */
export function submitByKeys(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}
