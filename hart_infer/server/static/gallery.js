// Pictures as they come, each in a card: previews, then the picture, its settings, and what to do with it.

import { blobOf, broken, call, events } from "./api.js";
import { alertBox, button, el, icon, tell } from "./dom.js";
import { inWords } from "./settings.js";
import { view } from "./viewer.js";

const MAX_PREVIEWS = 32; // what the server takes
const FEW_PREVIEWS = 3; // of large pictures, whose previews cost time
const LARGE = 512;

/** Cards in a container, the newest first. `uses` are what may be done with a picture: {label, icon, can(model), use(shot)}. */
export class Gallery {
  constructor(container, uses) {
    this.container = container;
    this.uses = uses;
    this.shots = []; // finished, the newest first
  }

  /**
   * Draw what a request asks for. `path` and `body(fields)` say how it is sent, `settings` are its fields, `title` is its
   * prompt, `model` the model's facts.
   */
  async draw({ path, body, settings, title, model }) {
    const side = Math.max(...model.sizes);
    const previews = Math.min(side > LARGE ? FEW_PREVIEWS : MAX_PREVIEWS, model.num_scales - 1);
    const aborter = new AbortController();
    const request = { path, body, settings, title, model };
    const cards = Array.from({ length: settings.n ?? 1 }, (_, place) => new Card(this, request, place, previews, aborter));
    this.container.prepend(...cards.map((card) => card.element));
    cards[0].element.scrollIntoView({ block: "nearest" });
    tell(`Drawing ${title}.`);
    try {
      const fields = { ...settings, prompt: title, model: model.id, stream: true, partial_images: previews };
      const response = await call(path, { ...body(fields), signal: aborter.signal });
      for await (const text of events(response)) {
        const event = JSON.parse(text);
        cards[event.index].take(event);
      }
      if (!cards.every((card) => card.isDone)) throw broken();
      tell(`${title}: done.`);
    } catch (error) {
      const unfinished = cards.filter((card) => !card.isDone);
      unfinished.slice(1).forEach((card) => card.element.remove());
      if (error.name === "AbortError") unfinished[0]?.element.remove();
      else unfinished[0]?.fail(error, () => this.draw(request));
    }
  }

  /** Buttons for what may be done with a finished picture. */
  actions(shot, { close = () => {} } = {}) {
    const name = `${shot.title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}-${shot.settings.seed}.png`;
    const link = el("a", { class: "action", href: shot.url, download: name, "aria-label": `Download, seed ${shot.settings.seed}` },
      icon("download"), el("span", {}, "Download"));
    const others = this.uses.filter(({ can }) => can(shot.model)).map(({ label, icon: name, use }) =>
      button(label, name, () => { close(); use(shot); }, { class: "action", title: label }));
    return [link, ...others];
  }
}

/** One picture of a request. */
class Card {
  constructor(gallery, request, place, previews, aborter) {
    const { title, settings, model } = request;
    this.gallery = gallery;
    this.request = request;
    this.isDone = false;
    this.url = null;
    this.image = el("img", { alt: "", hidden: true });
    this.frame = el("button", { type: "button", class: "frame", disabled: true, "aria-label": `Open ${title}` }, this.image);
    this.ticks = el("div", {
      class: "ticks", role: "progressbar", "aria-label": `Progress of ${title}`,
      "aria-valuemin": 0, "aria-valuemax": previews + 1, "aria-valuenow": 0,
    }, Array.from({ length: previews + 1 }, () => el("i")));
    this.said = el("p", { class: "note" });
    this.stop = button("Stop", "stop", () => aborter.abort(), { class: "stop" });
    this.caption = el("figcaption", {}, el("p", { class: "title", title }, title), this.said);
    const shown = settings.seed === undefined ? settings : { ...settings, seed: settings.seed + place };
    this.said.textContent = ["waiting", ...inWords(shown)].join(" · ");
    this.element = el("figure", { class: "picture", "data-state": "waiting" },
      el("div", { class: "window" }, this.frame, this.stop), this.ticks, this.caption);
  }

  /** Show what a stream's event brings. */
  take(event) {
    const blob = blobOf(event.b64_json, `image/${event.output_format}`);
    const isLast = event.partial_image_index === undefined;
    const count = isLast ? this.ticks.children.length : event.partial_image_index + 1;
    [...this.ticks.children].forEach((tick, i) => tick.classList.toggle("on", i < count));
    this.ticks.setAttribute("aria-valuenow", count);
    this.element.dataset.state = isLast ? "done" : "drawing";
    this.#show(blob, isLast);
    const settings = { ...this.request.settings, n: undefined, seed: event.seed, size: event.size };
    if (isLast) this.#finish(blob, settings);
    else this.said.textContent = [`preview ${count} of ${this.ticks.children.length - 1}`, `seed ${event.seed}`].join(" · ");
  }

  #show(blob, isLast) {
    const before = this.url;
    this.url = URL.createObjectURL(blob);
    this.image.src = this.url;
    this.image.hidden = false;
    this.image.dataset.shown = Number(this.image.dataset.shown ?? 0) + 1; // how often it has sharpened
    this.image.alt = isLast ? this.request.title : `${this.request.title}, so far`;
    if (before !== null) URL.revokeObjectURL(before);
  }

  #finish(blob, settings) {
    const { title, model } = this.request;
    const shot = { blob, url: this.url, title, settings, model };
    this.isDone = true;
    this.gallery.shots.unshift(shot);
    this.stop.remove();
    this.ticks.remove();
    this.frame.disabled = false;
    this.frame.addEventListener("click", () => view(this.gallery, shot));
    this.said.textContent = inWords({ ...settings, size: undefined }).join(" · ");
    this.caption.append(el("div", { class: "actions" }, this.gallery.actions(shot)));
  }

  /** Say in words what went wrong, in the picture's place. */
  fail(error, again) {
    const soon = error.retryAfter > 0 ? ` (in ${error.retryAfter} s)` : "";
    const retry = button(`Try again${soon}`, "again", () => { this.element.remove(); again(); });
    this.element.dataset.state = "failed";
    this.stop.remove();
    this.ticks.remove();
    this.said.remove();
    this.frame.replaceWith(alertBox(error.message, retry));
  }
}
