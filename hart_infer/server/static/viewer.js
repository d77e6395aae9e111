// One picture, large, with its settings; the arrow keys go to the next.

import { button, el, icon } from "./dom.js";

/** Open a gallery's picture. */
export function view(gallery, shot) {
  const box = document.getElementById("viewer");
  const close = () => box.close();
  const go = (by) => {
    const next = gallery.shots[gallery.shots.indexOf(shot) + by];
    if (next) show(next);
  };

  function show(next) {
    shot = next;
    const place = gallery.shots.indexOf(shot);
    const step = (label, name, by) => el("button", {
      type: "button", class: "square", "aria-label": label, disabled: !gallery.shots[place + by], click: () => go(by),
    }, icon(name));
    box.replaceChildren(
      el("img", { src: shot.url, alt: shot.title }),
      el("div", { class: "about" },
        el("div", { class: "row" },
          step("Newer", "left", -1), step("Older", "right", 1), el("span", { class: "grow" }),
          el("button", { type: "button", class: "square", "aria-label": "Close", click: close }, icon("close"))),
        el("h2", {}, shot.title),
        el("dl", {}, facts(shot).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])),
        el("div", { class: "actions tall" }, gallery.actions(shot, { close }))));
  }

  box.onkeydown = (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  };
  box.onclick = (event) => { if (event.target === box) close(); };
  show(shot);
  box.showModal();
}

function facts({ model, settings }) {
  return [
    ["Model", model.id],
    ["Seed", settings.seed],
    ["Size", settings.size.replace("x", " × ")],
    ["Guidance", settings.guidance_scale ?? (model.options.includes("guidance_scale") ? model.guidance_scale : undefined)],
    ["Speed", settings.speed ?? (model.speeds.length > 1 ? "exact" : undefined)],
    ["Away from", settings.negative_prompt],
  ].filter(([, value]) => value !== undefined);
}
