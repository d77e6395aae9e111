// The fields that say how to draw: only those that the model has.

import { el, icon } from "./dom.js";

const SPEEDS = {
  exact: "as trained",
  fast: "less on the late scales",
  turbo: "less still",
  draft: "a quick sketch",
};

/** Fields in a container; `prefix` keeps their ids apart from another form's. */
export class Settings {
  constructor(container, prefix) {
    this.container = container;
    this.prefix = prefix;
    this.model = null;
  }

  /** Show the fields of a model; what was set before stays where it still has a meaning. */
  show(model) {
    const before = this.model === null ? {} : this.values();
    this.model = model;
    const takes = (name) => model.options.includes(name);
    this.container.replaceChildren(...[
      this.#number(),
      this.#seed(),
      model.sizes.length > 1 ? this.#size() : null,
      takes("guidance_scale") ? this.#guidance() : null,
      takes("speed") && model.speeds.length > 1 ? this.#speed() : null,
      takes("negative_prompt") ? this.#negative() : null,
    ].filter(Boolean));
    this.set({ ...before, size: model.sizes.includes(parseInt(before.size)) ? before.size : undefined });
  }

  /** Return the settings as a request has them: only what differs from the model's defaults. */
  values() {
    const text = (name) => this.#field(name)?.value.trim() ?? "";
    const found = { n: Number(text("n")) || 1 };
    if (text("seed") !== "") found.seed = Number(text("seed"));
    if (text("size") !== "") found.size = text("size");
    const guidance = this.#field("guidance");
    if (guidance && Number(guidance.value) !== this.model.guidance_scale) found.guidance_scale = Number(guidance.value);
    const speed = this.container.querySelector("input[type=radio]:checked");
    if (speed && speed.value !== "exact") found.speed = speed.value;
    if (text("negative") !== "") found.negative_prompt = text("negative");
    return found;
  }

  /** Fill the fields from a request's settings; what is left out is the default. */
  set({ n = 1, seed = "", size, guidance_scale, speed = "exact", negative_prompt = "" }) {
    const fill = (name, value) => {
      const field = this.#field(name);
      if (!field || value === undefined) return;
      field.value = value;
      field.dispatchEvent(new Event("input"));
    };
    fill("n", n);
    fill("seed", seed);
    fill("size", size);
    fill("guidance", guidance_scale ?? this.model.guidance_scale);
    fill("negative", negative_prompt);
    const radio = this.container.querySelector(`input[type=radio][value="${CSS.escape(speed)}"]`);
    if (radio) radio.checked = true;
  }

  #field(name) {
    return this.container.querySelector(`#${this.prefix}-${name}`);
  }

  #labelled(name, label, ...children) {
    return el("div", { class: "field" }, el("label", { for: `${this.prefix}-${name}` }, label), ...children);
  }

  #number() {
    const input = el("input", {
      type: "number", id: `${this.prefix}-n`, min: 1, max: this.model.max_n, value: 1, required: true, inputmode: "numeric",
    });
    const step = (name, label, by) => el("button", {
      type: "button", class: "square", "aria-label": label,
      click: () => (by > 0 ? input.stepUp() : input.stepDown()),
    }, icon(name));
    const stepper = el("div", { class: "stepper" }, step("minus", "One less", -1), input, step("plus", "One more", 1));
    return this.#labelled("n", "Number", stepper);
  }

  #seed() {
    const input = el("input", {
      type: "number", id: `${this.prefix}-seed`, min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, placeholder: "new each time",
      inputmode: "numeric", autocomplete: "off", input: () => { clear.hidden = input.value === ""; },
    });
    const clear = el("button", {
      type: "button", class: "quiet square inside", "aria-label": "A new seed each time", hidden: true,
      click: () => { input.value = ""; clear.hidden = true; input.focus(); },
    }, icon("close"));
    return this.#labelled("seed", "Seed", el("div", { class: "with-button" }, input, clear));
  }

  #size() {
    const sides = [...this.model.sizes].reverse();
    const choices = sides.map((side) => el("option", { value: `${side}x${side}` }, `${side} × ${side}`));
    return this.#labelled("size", "Size", el("select", { id: `${this.prefix}-size` }, choices));
  }

  #guidance() {
    const standard = this.model.guidance_scale;
    const id = `${this.prefix}-guidance`;
    const said = el("output", { for: id });
    const input = el("input", {
      type: "range", id, min: 0, max: Math.max(10, Math.ceil(2 * standard)), step: 0.1, value: standard,
      input: () => {
        const isStandard = Number(input.value) === standard;
        said.textContent = `${Number(input.value)}${isStandard ? ", the model's" : ""}`;
      },
    });
    said.textContent = `${standard}, the model's`;
    return el("div", { class: "field wide" }, el("label", { for: id }, "Guidance ", said), input);
  }

  #speed() {
    const choice = (speed) => el("label", { title: SPEEDS[speed] }, el("input", {
      type: "radio", name: `${this.prefix}-speed`, value: speed, checked: speed === "exact",
    }), el("span", {}, speed));
    return el("fieldset", { class: "field wide" }, el("legend", {}, "Speed"),
      el("div", { class: "segments" }, this.model.speeds.map(choice)));
  }

  #negative() {
    const input = el("input", { type: "text", id: `${this.prefix}-negative`, autocomplete: "off" });
    const field = this.#labelled("negative", "Steer away from", input);
    field.classList.add("wide");
    return field;
  }
}

/** Say a request's settings in a few words each. */
export function inWords({ size, seed, guidance_scale, speed, negative_prompt }) {
  return [
    size?.replace("x", " × "),
    seed === undefined ? null : `seed ${seed}`,
    guidance_scale === undefined ? null : `guidance ${guidance_scale}`,
    speed,
    negative_prompt && `without ${negative_prompt}`,
  ].filter(Boolean);
}
