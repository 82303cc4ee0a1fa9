// One page in Debian's chromium. Each line of standard input is an action in JSON, and is answered with one line.
//
//     node browser.js /usr/bin/chromium
//
// It ends at the end of its input. An action that fails is answered with {"error": ...}.
'use strict';

const { readFileSync } = require('node:fs');
const { createInterface } = require('node:readline');
const { chromium } = require('playwright-core');

const DEADLINE_MS = 60_000;
const POLL_MS = 20;
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

let browser;
let page;
let seen;

const actions = {
  /** Open a page in a new profile. The settings are those of Playwright's newContext. */
  async open({ url, settings }) {
    await page?.context().close();
    page = await (await browser.newContext(settings)).newPage();
    page.setDefaultTimeout(DEADLINE_MS);
    seen = { errors: [], requests: [] };
    const { requests, errors } = seen;
    page.on('request', (request) => requests.push(request.url()));
    page.on('pageerror', (error) => errors.push(String(error)));
    page.on('console', (message) => {
      if (['error', 'warning'].includes(message.type())) {
        errors.push(message.text());
      }
    });
    await page.goto(url, { waitUntil: 'domcontentloaded' });
  },
  /** Return all errors and requests of this page. */
  seen: () => seen,
  evaluate: ({ script }) => page.evaluate(script),
  /** Wait until an expression is true. Playwright's own wait needs eval, which the page's policy forbids. */
  async wait({ script }) {
    const end = Date.now() + DEADLINE_MS;
    while (!(await page.evaluate(script))) {
      if (Date.now() > end) {
        throw new Error(`not within ${DEADLINE_MS} ms: ${script}`);
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  },
  prefer: ({ settings }) => page.emulateMedia(settings),
  press: ({ key }) => page.keyboard.press(key),
  screenshot: async ({ path, settings }) => void (await page.screenshot({ path, ...settings })),
  /** Return the problems that axe finds: rule and element. */
  async axe() {
    await page.evaluate(AXE);
    const { violations } = await page.evaluate('axe.run()');
    return violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html} ${node.failureSummary}`));
  },
};

async function main() {
  const args = process.getuid() === 0 ? ['--no-sandbox'] : [];
  browser = await chromium.launch({ executablePath: process.argv[2], args });
  console.log(JSON.stringify({ result: 'ready' }));
  for await (const line of createInterface({ input: process.stdin })) {
    const { action, ...options } = JSON.parse(line);
    let answer;
    try {
      answer = { result: (await actions[action](options)) ?? null };
    } catch (error) {
      answer = { error: String(error) };
    }
    console.log(JSON.stringify(answer));
  }
  await browser.close();
}

main();
