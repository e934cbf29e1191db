// The next token: greedy, or drawn by temperature, top-k, top-p and min-p, in the order of transformers.

/** Random numbers in [0, 1) by mulberry32, so that a seed gives the same text again. */
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** `logits` [V], `sampling` with the fields of moec's Sampling, `seen` all tokens so far. */
export function chooseToken(logits, sampling, seen, random) {
  if (sampling.repetition_penalty !== 1) logits = penalised(logits, sampling.repetition_penalty, seen);
  if (sampling.temperature === 0) return argmax(logits);
  const limit = sampling.top_k > 0 ? Math.min(sampling.top_k, logits.length) : logits.length;
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, limit);
  let kept = normalised(order.map((token) => Math.exp((logits[token] - logits[order[0]]) / sampling.temperature)));
  if (sampling.top_p < 1) kept = kept.slice(0, countUpTo(kept, sampling.top_p));
  kept = normalised(kept.filter((value) => value >= sampling.min_p * kept[0]));
  let point = random();
  for (let index = 0; index < kept.length; index++) {
    point -= kept[index];
    if (point < 0) return order[index];
  }
  return order[kept.length - 1];
}

function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index++) if (values[index] > values[best]) best = index;
  return best;
}

function penalised(logits, penalty, seen) {
  const changed = Float64Array.from(logits);
  for (const token of new Set(seen)) changed[token] *= changed[token] < 0 ? penalty : 1 / penalty;
  return changed;
}

function normalised(values) {
  const sum = values.reduce((total, value) => total + value, 0);
  return values.map((value) => value / sum);
}

function countUpTo(values, mass) {
  let sum = 0;
  for (let index = 0; index < values.length; index++) {
    sum += values[index];
    if (sum > mass) return index + 1;
  }
  return values.length;
}
