// The prompt: Enter sends, arrow keys go through what was sent before, which the browser keeps.

import { keep, recall } from "./storage.js";

const KEPT = "longlive.prompts";
const MAX_KEPT = 100;

export class PromptBox {
  #form = document.getElementById("prompt-form");
  #box = document.getElementById("prompt");
  #suggestions = document.getElementById("suggestions");
  #history = read();
  #place = this.#history.length; // in the history; its length is the draft
  #edits = new Map(); // place -> what has been made of the text there, and not been sent
  #shown = ""; // the prompt that the suggestions are for
  #onSend;

  /** onSend(text); onSpace(): Space in the empty box. */
  constructor({ onSend, onSpace }) {
    this.#onSend = onSend;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#box.addEventListener("keydown", (event) => {
      if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter") this.#send();
      else if (event.key === "ArrowUp" && this.#mayGoBack()) this.#go(this.#place - 1);
      else if (event.key === "ArrowDown" && this.#isInHistory()) this.#go(this.#place + 1);
      else if (event.key === "Escape") this.#box.blur();
      else if (event.key === " " && this.#box.value === "") onSpace();
      else return;
      event.preventDefault();
    });
  }

  focus() {
    this.#box.focus();
  }

  set maxChars(count) {
    this.#box.maxLength = count;
  }

  /** What is typed, on one line. */
  get text() {
    return this.#box.value.split(/\s+/).filter(Boolean).join(" ");
  }

  /** What is typed, which goes into the history; the box is empty then. */
  take() {
    const { text } = this;
    if (text) {
      this.#history = [...this.#history.filter((item) => item !== text), text].slice(-MAX_KEPT);
      keep("localStorage", KEPT, JSON.stringify(this.#history));
    }
    this.#box.value = "";
    this.#edits.clear();
    this.#place = this.#history.length;
    return text;
  }

  /** Put back what could not be sent. */
  restore(text) {
    if (!this.#box.value) this.#box.value = text;
  }

  /** What to offer: suggest(prompt) gives { label, text }s; null for no model that could be offered anything. */
  suggest(suggest, prompt) {
    if (suggest === null || (prompt === this.#shown && this.#suggestions.children.length)) return;
    this.#shown = prompt;
    const offers = suggest(prompt);
    const hadFocus = [...this.#suggestions.children].indexOf(document.activeElement);
    this.#suggestions.replaceChildren(...offers.map((offer) => this.#offer(offer)));
    if (hadFocus >= 0) this.#suggestions.children[Math.min(hadFocus, offers.length - 1)].focus();
  }

  #offer({ label, text }) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: label, title: text });
    if (label !== text) button.ariaLabel = text;
    button.addEventListener("click", () => {
      this.#box.value = text;
      this.#send();
    });
    return button;
  }

  #send() {
    if (this.text) this.#onSend(this.take());
  }

  #mayGoBack() {
    return this.#isInHistory() || this.#box.selectionStart === 0 || this.#box.selectionStart === this.#box.value.length;
  }

  #isInHistory() {
    return this.#place < this.#history.length;
  }

  #go(place) {
    if (place < 0 || place > this.#history.length) return;
    this.#edits.set(this.#place, this.#box.value);
    this.#place = place;
    this.#box.value = this.#edits.get(place) ?? this.#history[place] ?? "";
    this.#box.setSelectionRange(this.#box.value.length, this.#box.value.length);
  }
}

function read() {
  try {
    const kept = JSON.parse(recall("localStorage", KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((item) => typeof item === "string") : [];
  } catch {
    return []; // someone else's
  }
}
