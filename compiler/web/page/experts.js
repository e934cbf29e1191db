// The picture of the experts: a row for each layer, a cell for each expert.

const GAP = 2;

export class ExpertsPicture {
  /** `layers` has the number of experts of each layer. */
  constructor(canvas, table, layers) {
    Object.assign(this, { canvas, table, layers, tokens: [], chosen: -1, uses: layers.map((count) => new Uint32Array(count)) });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** Shows the tokens of another answer; none at its start. */
  show(tokens) {
    this.tokens = [];
    this.chosen = -1;
    for (const row of this.uses) row.fill(0);
    tokens.forEach((token) => this.add(token));
    this.draw();
  }

  /** Adds a token: its text and, for each layer, `experts` and `weights`. */
  add(token) {
    this.tokens.push(token);
    token.layers.forEach(({ experts, weights }, layer) =>
      experts.forEach((expert, slot) => {
        if (weights[slot]) this.uses[layer][expert]++;
      }),
    );
  }

  choose(index) {
    this.chosen = index;
    this.draw();
    this.describe();
  }

  draw() {
    if (this.scheduled) return;
    this.scheduled = requestAnimationFrame(() => {
      this.scheduled = 0;
      this.paint();
    });
  }

  paint() {
    const columns = Math.max(...this.layers);
    const width = this.canvas.parentElement.clientWidth;
    const cell = Math.max(6, Math.min(24, Math.floor(width / columns) - GAP));
    const height = Math.max(cell, 10);
    const scale = devicePixelRatio || 1;
    this.canvas.style.width = `${columns * (cell + GAP)}px`;
    this.canvas.style.height = `${this.layers.length * (height + GAP)}px`;
    this.canvas.width = Math.round(columns * (cell + GAP) * scale);
    this.canvas.height = Math.round(this.layers.length * (height + GAP) * scale);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.canvas);
    const [used, empty] = ["--used", "--empty"].map((name) => style.getPropertyValue(name));
    this.layers.forEach((count, layer) => {
      const most = Math.max(1, ...this.uses[layer]);
      const now = this.weights(layer);
      for (let expert = 0; expert < count; expert++) {
        const place = [expert * (cell + GAP), layer * (height + GAP), cell, height];
        pen.fillStyle = empty;
        pen.fillRect(...place);
        const strength = now[expert] ? 0.5 + 0.5 * now[expert] : (0.28 * this.uses[layer][expert]) / most;
        pen.fillStyle = `rgb(${used} / ${strength})`;
        pen.fillRect(...place);
      }
    });
  }

  /** Routing weights of the chosen token by expert, relative to the largest. */
  weights(layer) {
    const found = new Float32Array(this.layers[layer]);
    const own = this.tokens[this.chosen]?.layers[layer];
    if (!own) return found;
    const most = Math.max(...own.weights, 1e-9);
    own.experts.forEach((expert, slot) => {
      found[expert] = Math.max(found[expert], own.weights[slot] / most);
    });
    return found;
  }

  describe() {
    const token = this.tokens[this.chosen];
    if (!token) return;
    const rows = token.layers.map(({ experts, weights }, layer) => {
      const order = experts.map((expert, slot) => [expert, weights[slot]]).sort((a, b) => b[1] - a[1]);
      const kept = order.filter((pair) => pair[1]);
      const cells = [layer, kept.map(([expert, weight]) => `${expert} (${weight.toFixed(2)})`).join(", "), order.length - kept.length];
      const row = document.createElement("tr");
      row.append(...cells.map((content) => Object.assign(document.createElement("td"), { textContent: content })));
      return row;
    });
    this.table.replaceChildren(...rows);
    const used = token.layers.reduce((sum, layer) => sum + layer.weights.filter(Boolean).length, 0);
    this.canvas.setAttribute(
      "aria-label",
      `Token ${this.chosen + 1}, ${JSON.stringify(token.text)}: ${used} experts in ${token.layers.length} layers; the table below names them`,
    );
  }
}

/** Share of the slots of all tokens that were used, 1 where there is none. */
export function usedShare(tokens) {
  let [used, all] = [0, 0];
  for (const { layers } of tokens) {
    for (const { weights } of layers) {
      used += weights.filter(Boolean).length;
      all += weights.length;
    }
  }
  return all ? used / all : 1;
}
