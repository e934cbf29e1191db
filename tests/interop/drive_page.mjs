// Opens a page of `moec web` in Chromium, does what the JSON in the first argument says, and prints what it saw.
//
//   url, profile (folder), serviceWorkers ("allow" or "block"), init (script that runs before those of the page),
//   prompts (list), count, budget (percent), evaluate (an expression at the end), screenshots (path, width, height,
//   scheme), axe (path of axe.min.js), offline (reload without a network at the end)
import { readFileSync } from "node:fs";

import { chromium } from "playwright-core";

const asked = JSON.parse(process.argv[2]);
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
flags.push("--disable-component-update", "--disable-sync", ...(asked.flags ?? []));
const context = await chromium.launchPersistentContext(asked.profile, {
  executablePath: asked.browser,
  headless: true,
  args: flags,
  serviceWorkers: asked.serviceWorkers ?? "allow",
  viewport: { width: 1280, height: 900 },
});
const seen = { console: [], failed: [], answers: [] };

async function settled(page) {
  await page.waitForSelector("#loading[data-state]", { state: "attached", timeout: asked.timeout ?? 240_000 });
  seen.state = await page.getAttribute("#loading", "data-state");
}

async function answersOf(page) {
  return page.$$eval("article", (articles) =>
    articles.map((article) => ({
      title: article.querySelector("h3").textContent,
      text: article.querySelector(".text").textContent,
      tokens: [...article.querySelectorAll(".token")].map((piece) => Number(piece.dataset.token)),
      finish: article.dataset.finish,
      figures: Object.fromEntries([...article.querySelectorAll("dd")].map((cell) => [cell.dataset.figure, cell.textContent])),
    })),
  );
}

try {
  const page = context.pages()[0] ?? (await context.newPage());
  page.on("console", (message) => seen.console.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => seen.console.push(`pageerror: ${error}`));
  page.on("requestfailed", (request) => seen.failed.push(request.url()));
  if (asked.init) await page.addInitScript(asked.init);
  await page.goto(asked.url);
  await settled(page);
  for (const prompt of seen.state === "ready" ? (asked.prompts ?? []) : []) {
    await page.fill("#prompt", prompt);
    await page.fill("#count", String(asked.count ?? 64));
    if (asked.budget) await page.$eval("#budget", (slider, value) => {
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }, asked.budget);
    await page.click("#generate");
    await page.waitForFunction(() => !document.querySelector("#generate").disabled, null, { timeout: 300_000 });
    seen.answers.push(await answersOf(page));
  }
  seen.status = await page.textContent("#status");
  seen.notices = Object.fromEntries(await page.$$eval(".notice[data-notice]", (items) => items.map((item) => [item.dataset.notice, item.textContent])));
  seen.device = Object.fromEntries(await page.$$eval("#device > div", (rows) => rows.map((row) => [row.querySelector("dt").textContent, row.querySelector("dd").textContent])));
  if (asked.evaluate) seen.value = await page.evaluate(asked.evaluate);
  for (const { path, width, height, scheme } of asked.screenshots ?? []) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height });
    await page.waitForTimeout(300);
    await page.screenshot({ path, fullPage: true });
    seen.width = Math.max(seen.width ?? 0, (await page.evaluate(() => document.documentElement.scrollWidth)) - width);
    if (asked.axe) {
      // Playwright evaluates beside the page's Content-Security-Policy, which allows no foreign script in it.
      await page.evaluate(readFileSync(asked.axe, "utf8"));
      const { violations } = await page.evaluate(() => globalThis.axe.run());
      seen.violations = [...(seen.violations ?? []), ...violations.map(({ id, nodes }) => `${id}: ${nodes[0].html}`)];
    }
  }
  if (asked.offline) {
    await context.setOffline(true);
    await page.reload();
    await settled(page);
    seen.offline = { state: seen.state, device: await page.textContent("#device") };
  }
} finally {
  await context.close();
}
console.log(JSON.stringify(seen));
