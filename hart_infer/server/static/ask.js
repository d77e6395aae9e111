// Ask about a picture, and go on asking; answers come word by word.

import { call, events } from "./api.js";
import { alertBox, el, submitByKeys } from "./dom.js";
import { Chooser } from "./picture.js";

/** The panel; `model()` returns the model's facts. */
export class Ask {
  constructor(panel, model) {
    this.panel = panel;
    this.model = model;
    this.form = panel.querySelector("form");
    this.talk = panel.querySelector(".talk");
    this.empty = panel.querySelector(".empty");
    this.fresh = panel.querySelector("#forget");
    this.messages = []; // as the API has them
    this.picture = null; // data: URL of a picture that is not in a message yet
    this.asking = null; // AbortController of the question that is being answered
    this.chooser = new Chooser(panel.querySelector(".chooser"), async (blob) => {
      this.#forget();
      this.picture = await dataUrl(blob);
    });
    submitByKeys(this.form.elements.question);
    this.fresh.addEventListener("click", () => {
      this.#forget();
      this.form.elements.question.focus();
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask(this.form.elements.question.value.trim());
    });
  }

  #forget() {
    this.asking?.abort();
    const first = this.messages[0]?.content[0];
    if (first?.type === "image_url") this.picture = first.image_url.url;
    this.messages = [];
    this.talk.replaceChildren();
    this.empty.hidden = false;
    this.fresh.hidden = true;
  }

  async #ask(question) {
    if (question === "") return;
    const content = [{ type: "text", text: question }];
    const asked = this.picture;
    if (asked !== null) content.unshift({ type: "image_url", image_url: { url: asked } });
    const messages = [...this.messages, { role: "user", content }];
    const picture = asked && el("img", { src: asked, alt: "The picture in question" });
    const answer = el("p", { class: "answer busy" });
    const turn = el("div", { class: "turn" }, el("div", { class: "question" }, picture, el("p", {}, question)), answer);
    this.talk.append(turn);
    this.empty.hidden = true;
    const submit = this.form.querySelector("[type=submit]");
    submit.disabled = true;
    const { signal } = (this.asking = new AbortController());
    try {
      const json = { model: this.model().id, messages, stream: true };
      const response = await call("/v1/chat/completions", { json, signal });
      for await (const text of events(response)) {
        if (text === "[DONE]") break;
        answer.textContent += JSON.parse(text).choices[0].delta.content ?? "";
        turn.scrollIntoView({ block: "nearest" });
      }
      this.messages = [...messages, { role: "assistant", content: answer.textContent }];
      this.picture = null;
      this.form.elements.question.value = "";
      this.fresh.hidden = false;
    } catch (error) {
      if (!signal.aborted) answer.replaceWith(alertBox(error.message));
    } finally {
      answer.classList.remove("busy");
      submit.disabled = false;
    }
  }
}

function dataUrl(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.readAsDataURL(blob);
  });
}
