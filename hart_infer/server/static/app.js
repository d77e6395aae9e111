// Put the page together: the model and what it can do, tabs, colours, and what goes from one tab to another.

import { call } from "./api.js";
import { Ask } from "./ask.js";
import { alertBox, button, el, icon, submitByKeys, tell } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Easel } from "./mask.js";
import { Chooser } from "./picture.js";
import { Reconstruct } from "./reconstruct.js";
import { Settings } from "./settings.js";

const AGAIN = 1000; // milliseconds between two looks at a model that is being loaded
const EXAMPLES = {
  "hart-mini": ["a cat", "a pizza, fluent style", "a castle", "a rocket, twemoji style"],
  "var-mini": ["watermelon", "sauropod", "rocket", "pineapple"],
  VAR: ["golden retriever", "volcano", "teapot", "387"],
  other: ["a lighthouse in the snow", "a cat on a red sofa", "an owl made of paper"],
};
const THEMES = ["auto", "light", "dark"];
const byId = (id) => document.getElementById(id);
const drawForm = byId("draw").querySelector("form");
const editForm = byId("edit").querySelector("form");
let model = null;

// What may be done with a picture.

const redraw = { label: "Again with this seed", icon: "again", can: () => true, use: again };
const uses = [
  { label: "Edit", icon: "edit", can: ({ edits }) => edits, use: (shot) => { select("edit"); editChooser.take(shot.blob); } },
  {
    label: "Reconstruct", icon: "reconstruct", can: () => true,
    use: (shot) => { select("reconstruct"); reconstruct.chooser.take(shot.blob); },
  },
  { label: "Ask", icon: "ask", can: ({ answers }) => answers, use: (shot) => { select("ask"); ask.chooser.take(shot.blob); } },
];
const gallery = new Gallery(byId("draw").querySelector(".gallery"), [redraw, ...uses]);
const edited = new Gallery(byId("edit").querySelector(".gallery"), uses); // without its mask none is drawn again
const drawSettings = new Settings(drawForm.querySelector(".settings"), "draw");
const editSettings = new Settings(editForm.querySelector(".settings"), "edit");
const easel = new Easel(byId("edit").querySelector(".easel"), editForm.querySelector(".tools"));
const editChooser = new Chooser(editForm.querySelector(".chooser"), (blob, bitmap) => {
  easel.load(bitmap);
  editForm.querySelector(".trouble")?.remove();
});
const reconstruct = new Reconstruct(byId("reconstruct"), () => model);
const ask = new Ask(byId("ask"), () => model);

function again(shot) {
  select("draw");
  drawForm.elements.prompt.value = shot.title;
  drawSettings.set(shot.settings);
  drawForm.elements.prompt.focus();
  tell(`Seed ${shot.settings.seed} and its settings are in the form. Change what you like, and draw.`);
}

// Drawing and editing.

/** Whether there is a model to ask; the form says so where there is none yet. */
function isLoaded(form) {
  form.querySelector(".trouble")?.remove();
  if (model === null) form.append(alertBox("The model is being loaded. Try again when it is."));
  return model !== null;
}

drawForm.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!isLoaded(drawForm)) return;
  byId("draw").querySelector(".empty").hidden = true;
  gallery.draw({
    path: "/v1/images/generations",
    body: (fields) => ({ json: fields }),
    settings: drawSettings.values(),
    title: drawForm.elements.prompt.value.trim(),
    model,
  });
});

editForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!isLoaded(editForm)) return;
  const wrong = easel.picture === null ? "Choose a picture first." : easel.isEmpty ? "Paint over what is to be drawn anew." : null;
  if (wrong !== null) {
    editForm.append(alertBox(wrong));
    return;
  }
  const files = await easel.files();
  edited.draw({
    path: "/v1/images/edits",
    body: (fields) => {
      const form = new FormData();
      for (const [name, value] of Object.entries(fields)) form.append(name, value);
      for (const [name, blob] of Object.entries(files)) form.append(name, blob, `${name}.png`);
      return { form };
    },
    settings: editSettings.values(),
    title: editForm.elements.prompt.value.trim(),
    model,
  });
});

for (const form of [drawForm, editForm]) submitByKeys(form.elements.prompt);
byId("edit").querySelector(".easel").append(el("p", { class: "empty" }, "Choose a picture, and paint over what is to be drawn anew."));

// Tabs.

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(name) {
  for (const tab of tabs) {
    const isIt = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", isIt);
    tab.tabIndex = isIt ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isIt;
  }
  history.replaceState(null, "", `#${name}`);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const shown = tabs.filter((each) => !each.hidden);
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -shown.indexOf(tab), End: shown.length - 1 - shown.indexOf(tab) };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = shown[(shown.indexOf(tab) + moves[event.key] + shown.length) % shown.length];
    select(next.getAttribute("aria-controls"));
    next.focus();
  });
}

// The model.

function show(next) {
  model = next;
  drawForm.querySelector(".trouble")?.remove();
  const abilities = { draw: true, edit: model.edits, reconstruct: true, ask: model.answers };
  for (const tab of tabs) tab.hidden = !abilities[tab.getAttribute("aria-controls")];
  const wanted = location.hash.slice(1);
  select(abilities[wanted] ? wanted : "draw");
  drawSettings.show(model);
  editSettings.show(model);
  byId("facts").textContent = `${model.family}, ${model.sizes.join(" and ")} px`;
  byId("model-box").dataset.state = "ready";
  const examples = EXAMPLES[model.id] ?? EXAMPLES[model.family] ?? EXAMPLES.other;
  drawForm.elements.prompt.placeholder = model.family === "VAR" ? "A class: its name or number" : "Describe a picture";
  byId("examples").replaceChildren(...examples.map((text) => button(text, null, () => {
    drawForm.elements.prompt.value = text;
    drawForm.elements.prompt.focus();
  }, { class: "chip" })));
}

/** Look for the models until they are loaded. */
async function connect() {
  const box = byId("model");
  try {
    const { data } = await (await call("/v1/models")).json();
    const names = data.map(({ id }) => id);
    if (box.options.length !== names.length) box.replaceChildren(...names.map((id) => el("option", { value: id }, id)));
    box.disabled = names.length < 2;
    byId("trouble").hidden = true;
    const chosen = data.find(({ id }) => id === box.value);
    if (chosen.sizes) {
      show(chosen);
      return;
    }
    byId("facts").textContent = "being loaded";
  } catch (error) {
    byId("model-box").dataset.state = "lost";
    byId("facts").textContent = "not connected";
    byId("trouble").replaceChildren(el("p", {}, error.message), button("Try again", "again", connect));
    byId("trouble").hidden = false;
    return;
  }
  setTimeout(connect, AGAIN);
}

byId("model").addEventListener("change", connect);

// Colours: as the system has them, or as chosen.

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  byId("theme").replaceChildren(icon(theme));
  byId("theme").setAttribute("aria-label", `Colours: ${theme}. Change to ${next}.`);
  byId("theme").title = `Colours: ${theme}`;
  byId("theme").onclick = () => {
    localStorage.setItem("hart-infer-theme", next);
    paint(next);
  };
}

paint(THEMES.find((theme) => theme === localStorage.getItem("hart-infer-theme")) ?? "auto");
connect();
