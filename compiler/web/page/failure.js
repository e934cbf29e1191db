// What can go wrong, in words: a kind for the page and its tests, what happened, and what the reader can do.

export class Failure extends Error {
  constructor(kind, message, advice = "") {
    super(message);
    this.kind = kind;
    this.advice = advice;
  }
}

const NO_MEMORY = /allocat|out of memory|bad_alloc|memory access|Maximum (call stack|memory)|invalid array length/i;

/** The failure that an exception means; `doing` says what the page was doing. */
export function failureOf(error, doing) {
  if (error instanceof Failure) return error;
  const text = typeof error === "number" ? `error code ${error}` : String(error?.message ?? error);
  // A number is an exception of the runtime, which in WebAssembly is nearly always one of memory.
  if (typeof error === "number" || error instanceof RangeError || NO_MEMORY.test(text)) {
    return new Failure(
      "memory",
      `There is not enough memory while ${doing}: ${text}`,
      "Close other tabs and load the page again, or export the model with smaller weights (--quantize int4).",
    );
  }
  return new Failure("runtime", `An error occurred while ${doing}: ${text}`, "Load the page again.");
}
