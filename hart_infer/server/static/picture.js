// Choose a picture: from a file, by dropping or pasting it, or from the gallery.

import { el, icon } from "./dom.js";

const KINDS = "image/png,image/jpeg,image/webp";
let count = 0;

/** A field that takes a picture. `taken(blob, bitmap)` is called with each. */
export class Chooser {
  constructor(container, taken) {
    const id = `picture-${(count += 1)}`;
    this.taken = taken;
    this.input = el("input", { type: "file", id, accept: KINDS, class: "hidden", change: () => this.#files(this.input.files) });
    this.thumbnail = el("img", { alt: "", hidden: true });
    this.said = el("span", {}, "Choose a picture");
    this.wrong = el("p", { class: "wrong", role: "alert", hidden: true });
    this.zone = el("label", { class: "drop", for: id }, this.thumbnail, icon("picture"), this.said,
      el("small", {}, "or drop one here, or paste it"));
    container.append(this.input, this.zone, this.wrong);
    const drops = container.closest(".panel");
    drops.addEventListener("dragover", (event) => { event.preventDefault(); this.zone.classList.add("over"); });
    drops.addEventListener("dragleave", () => this.zone.classList.remove("over"));
    drops.addEventListener("drop", (event) => {
      event.preventDefault();
      this.zone.classList.remove("over");
      this.#files(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (!drops.hidden && event.clipboardData.files.length) this.#files(event.clipboardData.files);
    });
  }

  async #files(files) {
    if (files.length) await this.take(files[0]);
    this.input.value = "";
  }

  /** Take a picture's file. */
  async take(blob) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
    } catch {
      this.wrong.textContent = "That is no picture in PNG, JPEG or WebP.";
      this.wrong.hidden = false;
      return;
    }
    this.wrong.hidden = true;
    if (this.thumbnail.src) URL.revokeObjectURL(this.thumbnail.src);
    this.thumbnail.src = URL.createObjectURL(blob);
    this.thumbnail.hidden = false;
    this.said.textContent = "Choose another";
    this.zone.classList.add("filled");
    await this.taken(blob, bitmap);
  }
}

/** Draw the centred square of a picture on a new canvas of `side` pixels. */
export function squared(source, side) {
  const canvas = el("canvas", { width: side, height: side });
  const cut = Math.min(source.width, source.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(source, (source.width - cut) / 2, (source.height - cut) / 2, cut, cut, 0, 0, side, side);
  return canvas;
}

/** Return a canvas's PNG. */
export function pngOf(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
