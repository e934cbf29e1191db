// Logits of a site of `moec web` by its own model.js in onnxruntime-web under Node.js; see web_families.py.
// node web_logits.mjs SITE '[[token, ...], [token], ...]': feeds the lists one after another and prints the last logits
// of each, and the version of the runtime, as JSON.

import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import * as ort from "onnxruntime-web";

const [folder, steps] = [resolve(process.argv[2]), JSON.parse(process.argv[3])];
const site = JSON.parse(readFileSync(join(folder, "site.json"), "utf8"));
const { Model } = await import(pathToFileURL(join(folder, "model.js")).href);
const files = new Map(site.files.map(({ path }) => [path, new Uint8Array(readFileSync(join(folder, path)))]));
ort.env.logLevel = "error";
ort.env.wasm.numThreads = 1;
const options = { executionProviders: ["wasm"], extra: { session: site.session } };
const model = await Model.open(ort, site, files, options);
const scalars = site.budget ? { [site.budget.input]: site.budget.full } : {};
const logits = [];
for (const tokens of steps) logits.push(Array.from((await model.feed(tokens, scalars)).logits));
console.log(JSON.stringify({ logits, version: ort.env.versions.web }));
