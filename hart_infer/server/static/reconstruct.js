// A picture through the tokenizer and back: what each mode makes of it, and the difference, made visible.

import { blobOf, call } from "./api.js";
import { alertBox, el, tell } from "./dom.js";
import { Chooser, squared } from "./picture.js";

const NAMES = { original: "Original", discrete: "Discrete", hybrid: "Hybrid" };

/** The panel; `model()` returns the model's facts. */
export class Reconstruct {
  constructor(panel, model) {
    this.stage = panel.querySelector(".stage");
    this.model = model;
    this.urls = []; // of the pictures that are shown
    this.sending = null; // AbortController of the picture that is on its way
    this.chooser = new Chooser(panel.querySelector(".chooser"), (blob) => this.#send(blob));
    panel.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    this.#idle();
  }

  #idle() {
    this.stage.replaceChildren(el("div", { class: "empty" }, el("p", {}, "Choose a picture to see what the tokens keep of it.")));
  }

  async #send(blob) {
    const form = new FormData();
    form.append("image", blob, "picture");
    form.append("model", this.model().id);
    this.sending?.abort();
    const { signal } = (this.sending = new AbortController());
    this.stage.replaceChildren(el("div", { class: "empty busy" }, el("p", {}, "Encoding and decoding.")));
    try {
      const answer = await (await call("/v1/images/reconstructions", { form, signal })).json();
      const given = [{ mode: "original", b64_json: answer.original }, ...answer.data];
      const pictures = await Promise.all(given.map(async ({ mode, b64_json }) => {
        const file = blobOf(b64_json);
        const bitmap = await createImageBitmap(file);
        return { mode, url: URL.createObjectURL(file), pixels: pixelsOf(bitmap) };
      }));
      if (signal.aborted) {
        pictures.forEach(({ url }) => URL.revokeObjectURL(url));
        return;
      }
      this.#show(pictures, answer.size);
      tell("Reconstructed.");
    } catch (error) {
      if (!signal.aborted) this.stage.replaceChildren(alertBox(error.message));
    }
  }

  #show(pictures, size) {
    this.urls.forEach((url) => URL.revokeObjectURL(url));
    this.urls = pictures.map(({ url }) => url);
    const [original, ...rebuilt] = pictures;
    const figure = (picture) => el("figure", { class: "picture", "data-mode": picture.mode },
      el("div", { class: "window" }, el("img", { src: picture.url, alt: `${NAMES[picture.mode]} picture` })),
      el("figcaption", {}, el("p", { class: "title" }, NAMES[picture.mode]),
        el("p", { class: "note" }, picture === original ? size.replace("x", " × ") : decibels(original, picture))));
    this.stage.replaceChildren(
      el("div", { class: "gallery few" }, pictures.map(figure), difference(original, rebuilt)));
  }
}

/** The figure of a difference: of which two, and how much it is amplified. */
function difference(original, rebuilt) {
  const pairs = rebuilt.map((picture) => [original, picture]);
  if (rebuilt.length > 1) pairs.unshift([rebuilt[0], rebuilt[1]]);
  const side = original.pixels.width;
  const canvas = el("canvas", { width: side, height: side, role: "img", "aria-label": "Difference of two pictures" });
  const paint = () => {
    const [a, b] = pairs[Number(which.value)].map(({ pixels }) => pixels.data);
    const made = new ImageData(side, side);
    for (let i = 0; i < a.length; i += 1) made.data[i] = i % 4 === 3 ? 255 : Math.abs(a[i] - b[i]) * Number(gain.value);
    canvas.getContext("2d").putImageData(made, 0, 0);
    said.textContent = `${gain.value} times as bright`;
  };
  const named = (pair) => pair.map(({ mode }) => NAMES[mode].toLowerCase()).join(" / ");
  const which = el("select", { id: "difference-of", input: () => paint() },
    pairs.map((pair, i) => el("option", { value: i }, named(pair))));
  const gain = el("input", { type: "range", id: "difference-gain", min: 1, max: 20, value: 5, input: () => paint() });
  const said = el("output", { for: "difference-gain" });
  paint();
  return el("figure", { class: "picture", "data-mode": "difference" },
    el("div", { class: "window" }, canvas),
    el("figcaption", {}, el("p", { class: "title" }, "Difference"),
      el("div", { class: "field" }, el("label", { for: "difference-of" }, "Between"), which),
      el("div", { class: "field" }, el("label", { for: "difference-gain" }, "Gain ", said), gain)));
}

function pixelsOf(bitmap) {
  return squared(bitmap, bitmap.width).getContext("2d").getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Say the peak signal-to-noise ratio of a picture to the original. */
function decibels(original, picture) {
  const [a, b] = [original.pixels.data, picture.pixels.data];
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) if (i % 4 !== 3) sum += (a[i] - b[i]) ** 2;
  const error = sum / (a.length * 0.75);
  return error === 0 ? "equal to the original" : `PSNR ${(10 * Math.log10(255 ** 2 / error)).toFixed(1)} dB`;
}
