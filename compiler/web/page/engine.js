// The worker that computes, as the page sees it: a task at a time, and events meanwhile.

import { Failure } from "./failure.js";

export class Engine {
  /** `onEvent` gets every message of the worker that does not end a task. */
  constructor(onEvent) {
    this.onEvent = onEvent;
    this.worker = startWorker();
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) =>
      this.receive({ type: "failure", kind: "runtime", message: `The worker ended: ${event.message ?? "it could not be loaded"}`, advice: "Load the page again." });
  }

  load(description, backend, threads, keep) {
    return this.run({ type: "load", doing: "loading the model", description, backend, threads, keep }, "ready");
  }

  measure(count) {
    return this.run({ type: "measure", doing: "measuring the speed", count }, "measured");
  }

  generate(request) {
    return this.run({ type: "generate", doing: "generating", ...request }, "done");
  }

  empty() {
    return this.run({ type: "empty", doing: "deleting the stored model" }, "emptied");
  }

  stop() {
    this.worker.postMessage({ type: "stop" });
  }

  close() {
    this.worker.terminate();
  }

  run(message, last) {
    return new Promise((resolve, reject) => {
      this.task = { last, resolve, reject };
      this.worker.postMessage(message);
    });
  }

  receive(data) {
    const task = this.task;
    if (data.type === "failure") task?.reject(new Failure(data.kind, data.message, data.advice));
    else if (data.type === task?.last) task.resolve(data);
    else this.onEvent(data);
  }
}

/** A worker whose script is a blob has the Content-Security-Policy of the page; one with an address would have none. */
function startWorker() {
  const script = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  return new Worker(address, { type: "module" });
}
