// The page: it loads the model, takes prompts, and shows answers, figures and experts.

import { Answer } from "./answers.js";
import { examine, prepare } from "./device.js";
import { Engine } from "./engine.js";
import { ExpertsPicture } from "./experts.js";
import { failureOf } from "./failure.js";

const AUTOMATIC = 64e6; // bytes up to which a model is loaded without asking
const MEASURED = 9; // tokens by which WebAssembly and WebGPU are compared
const parameters = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);

let site, engine, picture;
let running; // the answer that is being generated, or was last
const waiting = []; // tokens that are not shown yet
let chosen; // the answer whose experts are shown

function remember(key, value) {
  try {
    if (value === undefined) return JSON.parse(localStorage.getItem(`moec-${site.digest}-${key}`));
    localStorage.setItem(`moec-${site.digest}-${key}`, JSON.stringify(value));
  } catch {
    // storage is off: the page asks and measures again next time
  }
  return value ?? null;
}

function notice(kind, text, level = "warn") {
  const known = document.querySelector(`[data-notice="${kind}"]`);
  const item = known ?? document.createElement("li");
  item.className = `notice ${level}`;
  item.dataset.notice = kind;
  item.textContent = text;
  if (!known) $("notices").append(item);
}

function showFailure(failure) {
  notice(failure.kind, `${failure.message} ${failure.advice}`.trim(), "bad");
  $("loading-text").textContent = "The model is not loaded.";
  $("loading-bar").hidden = true;
  $("loading").dataset.state = "failed";
}

const FILE_NOTICES = {
  broken: ({ file, done, total }) => `The download of ${file} broke; it goes on where it broke (try ${done} of ${total}).`,
  damaged: ({ file, done, total }) => `${file} came damaged: a part of it does not have its SHA-256 digest. It is fetched anew (${done} of ${total}).`,
  "stored-damaged": ({ file }) => `What is stored of ${file} is damaged: it does not have its SHA-256 digest. The damaged part is fetched anew.`,
  "not-kept": ({ file }) => `The browser's storage is full, so ${file} is not kept for the next visit.`,
};

const events = {
  file(event) {
    const words = FILE_NOTICES[event.kind];
    if (words) notice(`${event.kind}:${event.file}`, words(event));
    else showProgress(event);
  },
  notice: () => notice("no-storage", "The browser gives this page no storage (a private window?), so the model is fetched at every visit."),
  opening() {
    $("loading-text").textContent = "Opening the model.";
    $("loading-bar").removeAttribute("value");
  },
  token(event) {
    waiting.push(event);
    if (waiting.length === 1) requestAnimationFrame(showTokens);
  },
};

/** Shows the tokens that came since the last frame: small models make several in one. */
function showTokens() {
  if (!waiting.length) return;
  for (const event of waiting.splice(0)) {
    running.add(event);
    if (chosen === running) picture.add(running.tokens.at(-1));
  }
  if (chosen === running) chooseToken(running, running.tokens.length - 1);
}

function showProgress({ kind, file, done, total }) {
  const before = site.files.slice(0, site.files.findIndex((each) => each.path === file));
  const sum = before.reduce((bytes, each) => bytes + each.bytes, 0) + done;
  $("loading-bar").value = sum / site.bytes;
  $("loading-text").textContent = `${kind === "checking" ? "Checking what is stored" : "Fetching"}: ${megabytes(sum)} of ${megabytes(site.bytes)} (${file}, ${Math.floor((100 * done) / total)} %)`;
}

async function open(backend, threads) {
  const opened = new Engine((event) => events[event.type]?.(event));
  try {
    return [opened, await opened.load(site, backend, threads, parameters.get("keep") !== "0")];
  } catch (error) {
    opened.close();
    throw error;
  }
}

/** Loads the model where it is fastest; on the first visit with WebGPU that is measured. */
async function openFastest({ threads, gpu }) {
  const wanted = parameters.get("backend") ?? (gpu ? remember("backend") : "wasm");
  if (wanted) return [...(await open(wanted, threads)), gpu ? "as chosen before" : "there is no WebGPU"];
  const [wasm, wasmFacts] = await open("wasm", threads);
  const own = await wasm.measure(MEASURED);
  try {
    const [webgpu, gpuFacts] = await open("webgpu", threads);
    const other = await webgpu.measure(MEASURED);
    const equal = own.tokens.every((token, index) => token === other.tokens[index]);
    const why = `measured: WebAssembly ${own.rate.toFixed(1)}, WebGPU ${other.rate.toFixed(1)} tokens per second`;
    const better = equal && other.rate > own.rate;
    (better ? wasm : webgpu).close();
    remember("backend", better ? "webgpu" : "wasm");
    const reason = equal ? why : "WebGPU gave other tokens than WebAssembly";
    return better ? [webgpu, gpuFacts, reason] : [wasm, wasmFacts, reason];
  } catch (error) {
    remember("backend", "wasm");
    notice("webgpu-failed", `WebGPU cannot run this model here, so WebAssembly does. ${error.message}`);
    return [wasm, wasmFacts, "WebGPU cannot run this model"];
  }
}

function showDevice({ backend, threads, seconds, memory }, why) {
  const computes = backend === "webgpu" ? "WebGPU" : `WebAssembly with SIMD, ${threads} ${threads === 1 ? "thread" : "threads"}`;
  const rows = {
    "Computes with": computes,
    Why: why,
    "Memory of WebAssembly": megabytes(memory),
    "Files of the model": megabytes(site.bytes),
    "Files read and checked in": `${seconds.files.toFixed(2)} s`,
    "Model opened in": `${seconds.session.toFixed(2)} s`,
  };
  $("device").replaceChildren(
    ...Object.entries(rows).map(([name, value]) => {
      const pair = document.createElement("div");
      pair.append(Object.assign(document.createElement("dt"), { textContent: name }));
      pair.append(Object.assign(document.createElement("dd"), { textContent: value, id: `device-${name.toLowerCase().replaceAll(" ", "-")}` }));
      return pair;
    }),
  );
}

function describe() {
  document.title = `${site.name} – moec`;
  $("name").textContent = site.name;
  $("facts").textContent = `${site.facts} Everything runs on this device; nothing that you type leaves the page.`;
  $("temperature").value = site.sampling.temperature;
  $("count").max = site.context_length ?? 4096;
  $("chat-field").hidden = !site.chat;
  $("budget-field").hidden = !site.budget;
  $("picture").hidden = !site.routing.length;
  if (site.budget) $("budget").value = Math.round((20 * site.budget.default_share)) * 5;
  showBudget();
}

function showBudget() {
  $("budget-text").textContent = `${$("budget").value} %`;
}

/** Value of the budget's input at which about `share` of the slots are used, by interpolation. */
function budgetValue(share) {
  const curve = site.budget.curve;
  const after = Math.max(1, curve.findIndex(([known]) => known >= share));
  const [[low, from], [high, to]] = [curve[after - 1], curve[after]];
  return from + ((to - from) * Math.min(Math.max(share - low, 0), high - low)) / (high - low || 1);
}

function enable(ready, running) {
  for (const field of document.querySelectorAll("#form :is(textarea, input)")) field.disabled = !ready || running;
  $("generate").disabled = !ready || running;
  $("stop").disabled = !running;
  $("forget").disabled = !ready || running;
}

function chooseToken(own, index) {
  if (chosen !== own) {
    chosen = own;
    picture.show(own.tokens);
  }
  document.querySelectorAll(".chosen").forEach((piece) => piece.classList.remove("chosen"));
  own.choose(index);
  picture.choose(index);
  $("token").max = own.tokens.length - 1;
  $("token").value = index;
  $("token-text").textContent = `${index + 1} of ${own.tokens.length}, ${JSON.stringify(own.tokens[index].text)}`;
  $("token").setAttribute("aria-valuetext", $("token-text").textContent);
}

/** Settings of the columns: the full model, the chosen budget, or both. */
function columns() {
  if (!site.budget) return [{ title: "Answer", scalars: {} }];
  const share = $("budget").value / 100;
  const at = (value) => ({ [site.budget.input]: value });
  const full = { title: "Full model: every expert that the router chose", scalars: at(site.budget.full) };
  if (share >= 1) return [full];
  const less = { title: `With ${$("budget").value} % of the experts`, scalars: at(budgetValue(share)) };
  return $("compare").checked ? [full, less] : [less];
}

async function generate() {
  enable(true, true);
  $("status").textContent = "Generating.";
  $("answers").replaceChildren();
  const prompt = $("prompt").value;
  const temperature = Number($("temperature").value);
  const sampling = temperature ? { ...site.drawn, temperature } : { ...site.sampling, temperature: 0 };
  let other;
  try {
    for (const [id, { title, scalars }] of columns().entries()) {
      picture.show([]);
      running = new Answer($("answers"), $("answer"), { title, prompt, other, onChoose: chooseToken });
      chosen = running;
      const request = { id, prompt, chat: $("chat").checked, scalars, count: Number($("count").value), sampling, seed: 0 };
      const done = await engine.generate(request);
      showTokens();
      running.end(done);
      $("device-memory-of-webassembly").textContent = megabytes(done.memory);
      other = running;
      if (done.finish === "stopped") break;
    }
    const { tokens, rate } = other.figures;
    $("status").textContent = `Finished: ${tokens} tokens, ${rate.toFixed(1)} tokens per second.`;
  } catch (error) {
    showTokens();
    const failure = failureOf(error, "generating");
    $("status").textContent = `${failure.message} ${failure.advice}`;
  }
  enable(true, false);
  $("generate").focus();
}

/** Waits for a click before a large model is fetched for the first time. */
async function asked() {
  if (site.bytes <= AUTOMATIC || remember("loaded") || parameters.has("load")) return;
  $("loading-text").textContent = `The model has ${megabytes(site.bytes)}. It is fetched once and then kept in this browser.`;
  $("load").hidden = false;
  await new Promise((resolve) => $("load").addEventListener("click", resolve, { once: true }));
  $("load").hidden = true;
}

async function start() {
  const response = await fetch("site.json", { cache: "no-cache" });
  site = await response.json();
  describe();
  picture = new ExpertsPicture($("grid"), $("experts"), site.routing.map((layer) => layer.experts));
  await prepare();
  const device = await examine(site, parameters);
  device.notices.forEach(([kind, text]) => notice(kind, text, "plain"));
  await asked();
  const [opened, facts, why] = await openFastest(device);
  engine = opened;
  remember("loaded", true);
  showDevice(facts, why);
  $("loading-text").textContent = "The model is ready.";
  $("loading-bar").hidden = true;
  $("loading").dataset.state = "ready";
  enable(true, false);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", () => engine.stop());
$("budget").addEventListener("input", showBudget);
$("token").addEventListener("input", () => chooseToken(chosen, Number($("token").value)));
$("forget").addEventListener("click", async () => {
  await engine.empty();
  remember("loaded", false);
  $("status").textContent = "The stored model is deleted; it is fetched again at the next visit.";
});
start().catch((error) => showFailure(failureOf(error, "loading the model")));
