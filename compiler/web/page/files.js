// Files of the model: checked piece by piece by SHA-256, kept in the browser's own storage, and fetched where they
// are missing or damaged. A piece counts only by its digest, so a download that broke goes on where it broke, and
// stored bytes are trusted no more than fetched ones.

import { Failure } from "./failure.js";

const ATTEMPTS = 5;
const DAMAGED_ATTEMPTS = 3;
const PAUSE_MS = 400;
const DAMAGED = Symbol("a piece came damaged");

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The browser's storage for one model, or null where it cannot be used: then every visit fetches the files. */
export async function openStorage(key) {
  try {
    const root = await navigator.storage.getDirectory();
    for await (const name of root.keys()) {
      if (name.startsWith("moec-") && name !== key) await root.removeEntry(name, { recursive: true });
    }
    return await root.getDirectoryHandle(key, { create: true });
  } catch {
    return null;
  }
}

/** Deletes what is stored of every model. */
export async function emptyStorage() {
  const root = await navigator.storage.getDirectory();
  for await (const name of root.keys()) if (name.startsWith("moec-")) await root.removeEntry(name, { recursive: true });
}

async function openStored(storage, path) {
  try {
    const handle = await storage.getFileHandle(path.replaceAll("/", "_"), { create: true });
    return await handle.createSyncAccessHandle();
  } catch {
    return null; // another tab has it open, or the storage is full or absent
  }
}

/** One file. `tell` gets {kind, file, done, total} for progress and notices. Returns its bytes. */
export async function loadFile(file, { base, storage, pieceSize, tell }) {
  const loading = new Loading(file, { base, stored: storage && (await openStored(storage, file.path)), pieceSize, tell });
  try {
    return await loading.run();
  } finally {
    loading.stored?.close();
  }
}

class Loading {
  constructor(file, { base, stored, pieceSize, tell }) {
    Object.assign(this, { file, stored, pieceSize, tell, url: new URL(file.path, base) });
    this.bytes = new Uint8Array(file.bytes);
    this.missing = [];
    this.damage = new Map();
    this.reload = false;
  }

  async run() {
    await this.readStored();
    let failures = 0;
    while (this.missing.length) {
      const before = this.missing.length;
      try {
        await this.fetchRun();
        if (this.missing.length === before) throw new Error("the connection ended early");
      } catch (error) {
        if (error instanceof Failure) throw error;
        if (error === DAMAGED) continue;
        failures = this.missing.length < before ? 1 : failures + 1;
        await this.broke(error, failures);
      }
    }
    this.stored?.truncate(this.bytes.length);
    return this.bytes;
  }

  piece(index) {
    const start = index * this.pieceSize;
    return this.bytes.subarray(start, Math.min(start + this.pieceSize, this.bytes.length));
  }

  progress() {
    const done = this.bytes.length - this.missing.reduce((sum, index) => sum + this.piece(index).length, 0);
    this.tell({ kind: this.fetched ? "fetching" : "checking", file: this.file.path, done, total: this.bytes.length });
  }

  async readStored() {
    const size = this.stored ? this.stored.getSize() : 0;
    for (let index = 0; index < this.file.pieces.length; index++) {
      const piece = this.piece(index);
      const start = index * this.pieceSize;
      const there = size >= start + piece.length && this.stored.read(piece, { at: start }) === piece.length;
      if (!there || (await sha256(piece)) !== this.file.pieces[index]) this.missing.push(index);
      if (there) this.progress();
    }
    if (this.missing.length && size >= this.bytes.length) {
      this.tell({ kind: "stored-damaged", file: this.file.path, done: this.missing.length, total: this.file.pieces.length });
    }
  }

  /** Fetches the first run of missing pieces that are neighbours. */
  async fetchRun() {
    let count = 1;
    while (this.missing[count] === this.missing[0] + count) count++;
    const start = this.missing[0] * this.pieceSize;
    const stop = Math.min(start + count * this.pieceSize, this.bytes.length);
    const whole = start === 0 && stop === this.bytes.length;
    this.fetched = true;
    const response = await fetch(this.url, {
      headers: whole ? {} : { Range: `bytes=${start}-${stop - 1}` },
      cache: this.reload ? "reload" : "no-store",
      credentials: "same-origin",
    });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    // A server without ranges sends the whole file; what is not needed of it is passed over.
    await this.receive(response.body.getReader(), response.status === 206 ? start : 0, stop);
  }

  async receive(reader, position, stop) {
    try {
      while (true) {
        const { done, value } = await reader.read();
        if (done) return;
        if (position >= stop) break;
        position = await this.take(value, position);
      }
      await reader.cancel();
    } catch (error) {
      reader.cancel().catch(() => {});
      throw error;
    }
  }

  /** Puts received bytes in their place, and checks each piece that they complete. */
  async take(value, position) {
    let offset = 0;
    while (offset < value.length && position < this.bytes.length) {
      const index = Math.floor(position / this.pieceSize);
      const end = Math.min((index + 1) * this.pieceSize, this.bytes.length);
      const length = Math.min(value.length - offset, end - position);
      if (this.missing.includes(index)) this.bytes.set(value.subarray(offset, offset + length), position);
      offset += length;
      position += length;
      if (position === end && this.missing[0] === index) await this.complete(index);
    }
    return position;
  }

  async complete(index) {
    const piece = this.piece(index);
    if ((await sha256(piece)) === this.file.pieces[index]) {
      this.store(piece, index * this.pieceSize);
      this.missing.shift();
      this.progress();
      return;
    }
    const times = (this.damage.get(index) ?? 0) + 1;
    this.damage.set(index, times);
    this.reload = true;
    if (times >= DAMAGED_ATTEMPTS) {
      throw new Failure(
        "damaged",
        `${this.file.path} is damaged: it does not have the SHA-256 digest that it was built with.`,
        "It was fetched anew and came damaged each time: copy the site to the server again.",
      );
    }
    this.tell({ kind: "damaged", file: this.file.path, done: times, total: DAMAGED_ATTEMPTS });
    throw DAMAGED;
  }

  store(piece, at) {
    try {
      this.stored?.write(piece, { at });
    } catch {
      this.stored.close();
      this.stored = null; // the storage is full
      this.tell({ kind: "not-kept", file: this.file.path, done: 0, total: 0 });
    }
  }

  async broke(error, failures) {
    if (failures >= ATTEMPTS) {
      throw new Failure(
        "download",
        `The download of ${this.file.path} broke ${failures} times: ${error.message}.`,
        "Load the page again when the connection is back: what arrived is kept.",
      );
    }
    this.tell({ kind: "broken", file: this.file.path, done: failures, total: ATTEMPTS });
    await pause(PAUSE_MS * 2 ** (failures - 1));
  }
}
