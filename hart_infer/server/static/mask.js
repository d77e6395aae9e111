// Paint a mask over a picture, by mouse, finger, pen or keyboard.

import { el, tell } from "./dom.js";
import { pngOf, squared } from "./picture.js";

const FINE = 768; // pixels of the mask's side, so that strokes look round over a small picture
const MAX_SIDE = 2048; // of what is sent
const MAX_UNDO = 20;
const COLOUR = "#2f5bea"; // seldom in pictures
const STEP = 0.02; // of the side, by one press of an arrow key
const HELP = "Mask. Paint what is to be drawn anew. By keyboard: arrows move the brush, with Shift they paint, space paints, "
  + "E changes between painting and erasing, plus and minus change the brush, Z undoes.";

/** A picture with a mask over it. `tools` is the fieldset with the brush's controls. */
export class Easel {
  constructor(container, tools) {
    this.container = container;
    this.tools = tools;
    this.size = tools.querySelector("#brush");
    this.picture = null; // canvas with the picture's square
    this.mask = el("canvas", {
      width: FINE, height: FINE, class: "mask", tabindex: 0, role: "application", "aria-label": HELP,
    });
    this.context = this.mask.getContext("2d", { willReadFrequently: true });
    this.ring = el("div", { class: "ring", hidden: true });
    this.before = []; // pictures of the mask, for undo
    this.last = null; // [x, y] of the stroke, as shares of the side
    this.at = [0.5, 0.5]; // the keyboard's brush
    this.#listen();
  }

  /** Lay a new picture under an empty mask. */
  load(bitmap) {
    this.picture = squared(bitmap, Math.min(MAX_SIDE, bitmap.width, bitmap.height));
    this.picture.className = "photo";
    this.context.clearRect(0, 0, FINE, FINE);
    this.before = [];
    this.container.replaceChildren(this.picture, this.mask, this.ring);
    this.tools.disabled = false;
    this.#measure();
  }

  get isEmpty() {
    return !this.context.getImageData(0, 0, FINE, FINE).data.some((value, i) => i % 4 === 3 && value > 127);
  }

  /** Return the files to send: the picture, and the mask, transparent where it is painted. */
  async files() {
    const { width } = this.picture;
    const mask = el("canvas", { width, height: width });
    const context = mask.getContext("2d");
    context.fillRect(0, 0, width, width);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.mask, 0, 0, width, width);
    return { image: await pngOf(this.picture), mask: await pngOf(mask) };
  }

  get #isErasing() {
    return this.tools.querySelector("[name=tool]:checked").value === "erase";
  }

  get #radius() {
    return Number(this.size.value) / 200; // of the side
  }

  #listen() {
    const { mask, tools } = this;
    mask.addEventListener("pointerdown", (event) => {
      mask.setPointerCapture(event.pointerId);
      this.#remember();
      this.last = this.#place(event);
      this.#stroke(this.last);
    });
    mask.addEventListener("pointermove", (event) => {
      this.at = this.#place(event);
      this.#showRing();
      if (this.last === null) return;
      for (const each of event.getCoalescedEvents?.() ?? []) this.#stroke(this.#place(each));
      this.#stroke(this.at);
    });
    for (const kind of ["pointerup", "pointercancel"]) mask.addEventListener(kind, () => { this.last = null; });
    mask.addEventListener("pointerleave", () => { this.ring.hidden = document.activeElement !== mask; });
    mask.addEventListener("focus", () => { if (mask.matches(":focus-visible")) this.#showRing(); });
    mask.addEventListener("blur", () => { this.ring.hidden = true; });
    mask.addEventListener("keydown", (event) => this.#key(event));
    this.size.addEventListener("input", () => this.#measure());
    tools.addEventListener("click", (event) => {
      const tool = event.target.closest("[data-tool]")?.dataset.tool;
      if (tool === "undo") this.#undo();
      if (tool === "clear") this.#fill("destination-out");
      if (tool === "invert") this.#fill("xor");
    });
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const by = { "+": 2, "=": 2, "-": -2 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const inside = (value) => Math.min(1, Math.max(0, value));
      this.at = [inside(this.at[0] + x * STEP), inside(this.at[1] + y * STEP)];
      if (event.shiftKey) {
        if (!event.repeat) this.#remember(); // undo takes what one press has painted
        this.#dab();
      }
    } else if (event.key === " ") {
      this.#remember();
      this.#dab();
      tell(this.#isErasing ? "Erased here." : "Painted here.");
    } else if (by !== undefined) {
      this.size.value = Number(this.size.value) + by;
      this.size.dispatchEvent(new Event("input"));
    } else if (event.key.toLowerCase() === "e") {
      this.tools.querySelector(`[value=${this.#isErasing ? "paint" : "erase"}]`).checked = true;
      tell(this.#isErasing ? "Erasing." : "Painting.");
    } else if (event.key.toLowerCase() === "z") {
      this.#undo();
    } else {
      return;
    }
    event.preventDefault();
    this.#showRing();
  }

  #place(event) {
    const { left, top, width, height } = this.mask.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height];
  }

  #dab() {
    this.last = this.at;
    this.#stroke(this.at);
    this.last = null;
  }

  #stroke([x, y]) {
    const context = this.context;
    context.globalCompositeOperation = this.#isErasing ? "destination-out" : "source-over";
    context.strokeStyle = COLOUR;
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = 2 * this.#radius * FINE;
    context.beginPath();
    context.moveTo(this.last[0] * FINE, this.last[1] * FINE);
    context.lineTo(x * FINE, y * FINE);
    context.stroke();
    context.beginPath(); // a line without length leaves nothing
    context.fillStyle = COLOUR;
    context.arc(x * FINE, y * FINE, this.#radius * FINE, 0, 2 * Math.PI);
    context.fill();
    this.last = [x, y];
  }

  #fill(operation) {
    this.#remember();
    this.context.globalCompositeOperation = operation;
    this.context.fillStyle = COLOUR;
    this.context.fillRect(0, 0, FINE, FINE);
  }

  #remember() {
    this.before.push(this.context.getImageData(0, 0, FINE, FINE));
    if (this.before.length > MAX_UNDO) this.before.shift();
  }

  #undo() {
    const before = this.before.pop();
    if (before) this.context.putImageData(before, 0, 0);
    tell(before ? "Undone." : "There is nothing to undo.");
  }

  #measure() {
    this.tools.querySelector("#brush-size").textContent = `${this.size.value} %`;
    this.ring.style.setProperty("--size", `${200 * this.#radius}%`);
  }

  #showRing() {
    this.ring.hidden = false;
    this.ring.style.setProperty("--x", `${100 * this.at[0]}%`);
    this.ring.style.setProperty("--y", `${100 * this.at[1]}%`);
  }
}
