// What this browser offers, and what of it the model can use.

import { Failure } from "./failure.js";

const MAX_THREADS = 8; // more of them wait for each other in steps of a single token
const WASM_LIMIT = 4 * 2 ** 30;
const READY_MS = 5000;
const RELOADED = "moec-reloaded";

/** Registers the service worker; reloads the page once where that makes it cross-origin isolated. */
export async function prepare() {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("sw.js");
    // Where a browser blocks it, it may never be ready.
    await Promise.race([navigator.serviceWorker.ready, new Promise((_, reject) => setTimeout(reject, READY_MS))]);
  } catch {
    return; // blocked by the browser or its user
  }
  if (crossOriginIsolated || sessionStorage.getItem(RELOADED)) return;
  sessionStorage.setItem(RELOADED, "1");
  location.reload();
  await new Promise(() => {}); // the page is on its way out
}

/** What the page can use: `threads`, `gpu` (whether there is WebGPU), and `notices` for the reader. */
export async function examine(site, parameters) {
  if (!isSecureContext || !crypto.subtle) {
    throw new Failure(
      "insecure",
      "The browser lets this page neither check nor store files, because it came over plain HTTP.",
      "Serve it over https, or open it as http://localhost.",
    );
  }
  checkMemory(site);
  const notices = [];
  const most = Math.min(navigator.hardwareConcurrency || 1, MAX_THREADS);
  const threads = crossOriginIsolated ? Math.min(Number(parameters.get("threads")) || most, most) : 1;
  if (!crossOriginIsolated) {
    notices.push([
      "no-threads",
      "One thread computes, because the page is not cross-origin isolated. It could use " +
        `${most} if the server sent Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp.`,
    ]);
  }
  const gpu = await hasGpu();
  if (!gpu) notices.push(["no-webgpu", "This browser offers no WebGPU here, so the processor computes, by WebAssembly."]);
  return { threads, gpu, notices };
}

async function hasGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

/** Refuses a model that cannot fit, before anything is downloaded. */
function checkMemory(site) {
  const need = site.memory;
  const advice = "Export the model with smaller weights (--quantize int4), or use a device with more memory.";
  const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
  if (need > WASM_LIMIT) {
    throw new Failure(
      "memory",
      `The model needs about ${gigabytes(need)} of memory, and WebAssembly has at most ${gigabytes(WASM_LIMIT)}.`,
      advice,
    );
  }
  const device = (navigator.deviceMemory ?? 8) * 2 ** 30; // browsers name no more than 8 GB
  if (need > device) {
    throw new Failure(
      "memory",
      `The model needs about ${gigabytes(need)} of memory, and this device has ${gigabytes(device)}.`,
      advice,
    );
  }
}
