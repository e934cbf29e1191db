// An answer on the page: its text token by token, and its figures.

import { usedShare } from "./experts.js";

const percent = (share) => `${(100 * share).toFixed(0)} %`;
const seconds = (value) => (value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(1)} s`);
const perSecond = (value) => (value ? value.toFixed(value < 10 ? 2 : 1) : "–");

export class Answer {
  /** `other` is the answer to compare with, if any; `onChoose` gets this answer and the index of a chosen token. */
  constructor(place, template, { title, prompt, other, onChoose }) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.querySelector("h3").textContent = title;
    this.text = this.element.querySelector(".text");
    this.text.append(span("prompt", prompt));
    this.element.setAttribute("aria-busy", "true");
    this.tokens = [];
    this.other = other;
    this.text.addEventListener("click", ({ target }) => {
      if (target.dataset?.index) onChoose(this, Number(target.dataset.index));
    });
    place.append(this.element);
  }

  add({ token, text, experts, rate }) {
    const index = this.tokens.length;
    const differs = this.other && this.other.tokens[index]?.token !== token;
    const piece = span(`token${differs ? " differs" : ""}`, text);
    piece.dataset.index = index;
    piece.dataset.token = token;
    this.text.append(piece);
    this.tokens.push({ token, text, layers: experts, piece });
    this.figure("rate", perSecond(rate));
    this.figure("tokens", this.tokens.length);
    this.figure("share", percent(usedShare(this.tokens)));
  }

  end({ finish, figures }) {
    this.figures = figures;
    this.element.dataset.finish = finish;
    this.element.setAttribute("aria-busy", "false");
    this.figure("first", seconds(figures.first));
    const faster = this.other?.figures.rate ? ` (${(figures.rate / this.other.figures.rate).toFixed(2)} ×)` : "";
    this.figure("rate", perSecond(figures.rate) + faster);
    this.figure("tokens", figures.tokens);
    if (!this.other) return;
    const same = this.tokens.findIndex(({ token }, index) => this.other.tokens[index]?.token !== token);
    this.figure("tokens", `${figures.tokens}, ${same < 0 ? "all equal" : `differs from no. ${same + 1}`}`);
  }

  figure(name, value) {
    this.element.querySelector(`[data-figure="${name}"]`).textContent = value;
  }

  choose(index) {
    this.text.querySelector(".chosen")?.classList.remove("chosen");
    this.tokens[index]?.piece.classList.add("chosen");
  }
}

function span(name, text) {
  return Object.assign(document.createElement("span"), { className: name, textContent: text });
}
