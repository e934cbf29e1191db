// Renders a page in Chromium at one width and colour scheme, lets axe-core judge it, and keeps a screenshot.
// Arguments: address, width, "light" or "dark", file of the screenshot, path of the browser.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [address, width, scheme, picture, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const context = await browser.newContext({ viewport: { width: Number(width), height: 900 }, colorScheme: scheme });
const page = await context.newPage();
await page.goto(address);
// The pages show details on demand: what is closed would not be judged.
await page.evaluate(() => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
await page.addScriptTag({ content: readFileSync(createRequire(import.meta.url).resolve("axe-core"), "utf8") });
const result = await page.evaluate(() => axe.run(document, { resultTypes: ["violations", "incomplete"] }));
await page.screenshot({ path: picture, fullPage: true });
await browser.close();
const told = (found) => found.map((each) => ({
  rule: each.id, help: each.help, nodes: each.nodes.map((node) => `${node.target}: ${node.failureSummary}`),
}));
console.log(JSON.stringify({
  violations: told(result.violations), incomplete: told(result.incomplete), passes: result.passes.map((each) => each.id),
}));
