// What computes: it loads the model and generates, apart from the page, so that the page stays alive meanwhile.

import { Failure, failureOf } from "./failure.js";
import { emptyStorage, loadFile, openStorage } from "./files.js";
import { Model } from "./model.js";
import { chooseToken, randomNumbers } from "./sampling.js";
import { Text } from "./text.js";

const base = new URL("./", import.meta.url);
const memories = watchMemories();
const WARMING = 6; // tokens after which browsers run compiled code, and kernels of a GPU are made
const channel = new MessageChannel();
let site, model, text, stopped;

onmessage = ({ data }) => {
  if (data.type === "stop") stopped = true;
  else tasks[data.type](data).catch((error) => fail(failureOf(error, data.doing)));
};

const tasks = { load, generate, measure, empty: () => emptyStorage().then(() => postMessage({ type: "emptied" })) };

function fail(failure) {
  postMessage({ type: "failure", kind: failure.kind, message: failure.message, advice: failure.advice });
}

/** Memories of WebAssembly in this worker: the runtime does not tell how much it uses. */
function watchMemories() {
  const made = [];
  const Memory = WebAssembly.Memory;
  WebAssembly.Memory = class extends Memory {
    constructor(descriptor) {
      super(descriptor);
      made.push(this);
    }
  };
  return made;
}

const usedMemory = () => memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);

async function load({ description, backend, threads, keep }) {
  site = description;
  const storage = keep ? await openStorage(`moec-${site.digest.slice(0, 16)}`) : null;
  if (keep && !storage) postMessage({ type: "notice", kind: "no-storage" });
  const tell = (event) => postMessage({ type: "file", ...event });
  const started = performance.now();
  const files = new Map();
  for (const file of site.files) {
    files.set(file.path, await loadFile(file, { base, storage, pieceSize: site.piece_size, tell }));
  }
  const read = performance.now();
  text = new Text(files, site);
  postMessage({ type: "opening" });
  model = await Model.open(await runtime(backend, threads), site, files, sessionOptions(backend));
  await decodeProbe(WARMING);
  const seconds = { files: (read - started) / 1000, session: (performance.now() - read) / 1000 };
  postMessage({ type: "ready", backend, threads, seconds, memory: usedMemory() });
}

async function runtime(backend, threads) {
  const own = site.runtimes[backend];
  const ort = await import(new URL(own.module, base).href);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: new URL(own.loader, base).href, wasm: new URL(own.wasm, base).href };
  return ort;
}

function sessionOptions(backend) {
  if (backend !== "webgpu") return { executionProviders: ["wasm"], extra: { session: site.session } };
  const kept = site.states.map((state) => [state.output.name, "gpu-buffer"]);
  return { executionProviders: ["webgpu", "wasm"], preferredOutputLocation: Object.fromEntries(kept) };
}

/** Lets messages in, such as that to stop: a step of the runtime blocks this worker until it ends. */
function breathe() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

async function generate({ id, prompt, chat, scalars, count, sampling, seed }) {
  stopped = false;
  const ids = Array.isArray(prompt) ? prompt : text.encode(prompt, chat);
  checkLength(ids.length, count);
  const random = randomNumbers(seed);
  const add = text.stream(ids);
  model.reset();
  const seen = [...ids];
  const began = performance.now();
  let { logits, experts } = await model.feed(ids, scalars);
  const first = performance.now();
  let tokens = 0;
  let finish = "length";
  while (true) {
    const token = chooseToken(logits, sampling, seen, random);
    if (site.end_tokens.includes(token)) finish = "stop";
    if (finish === "stop") break;
    seen.push(token);
    tokens++;
    postMessage({ type: "token", id, token, text: add(token), experts, rate: rate(tokens, first) });
    if (tokens === count) break;
    await breathe();
    if (stopped) finish = "stopped";
    if (stopped) break;
    ({ logits, experts } = await model.step([token], scalars));
  }
  const figures = { first: (first - began) / 1000, tokens, prompt: ids.length, rate: rate(tokens, first) };
  postMessage({ type: "done", id, finish, figures, memory: usedMemory() });
}

/** Tokens per second after the first one. */
function rate(tokens, first) {
  return tokens > 1 ? ((tokens - 1) * 1000) / (performance.now() - first) : 0;
}

function checkLength(prompt, count) {
  const limit = site.context_length;
  if (limit && prompt + count > limit) {
    throw new Failure(
      "prompt",
      `The prompt has ${prompt} tokens; with ${count} new ones it exceeds the ${limit} tokens of the model.`,
      "Shorten the prompt, or ask for fewer new tokens.",
    );
  }
}

/** The tokens that follow a fixed prompt. */
async function decodeProbe(count) {
  const scalars = site.budget ? { [site.budget.input]: site.budget.full } : {};
  const greedy = { temperature: 0, repetition_penalty: 1 };
  model.reset();
  const found = [];
  let { logits } = await model.feed(site.probe, scalars);
  while (found.length < count) {
    found.push(chooseToken(logits, greedy, [], null));
    ({ logits } = await model.step(found.slice(-1), scalars));
  }
  return found;
}

/** How many tokens a second, and which, by which the page chooses what computes. */
async function measure({ count }) {
  const began = performance.now();
  const tokens = await decodeProbe(count);
  postMessage({ type: "measured", tokens, rate: (count * 1000) / (performance.now() - began) });
}
