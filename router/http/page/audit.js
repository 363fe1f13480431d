// An audit: started from here, for those who run the cluster.

import { at, make } from "./dom.js";
import { ask } from "./feed.js";
import { seconds } from "./words.js";

export class Audit {
  constructor() {
    at("audit").addEventListener("click", () => this.run());
    at("audited-close").addEventListener("click", () => {
      at("audited").hidden = true;
      at("audit").focus();
    });
  }

  async run() {
    const button = at("audit");
    button.disabled = true;
    at("audited").hidden = false;
    at("audited-text").replaceChildren(make("p", { text: "Each process is asked what it owns …" }));
    const began = performance.now();
    try {
      const result = await ask("live/audit", { method: "POST", headers: { "tandem-page": "audit" } });
      at("audited-text").replaceChildren(...shown(result, (performance.now() - began) / 1000));
    } catch (error) {
      at("audited-text").replaceChildren(make("p", { class: "bad", text: `No audit: ${error.message}` }));
    } finally {
      button.disabled = false;
      at("audited").focus();
    }
  }
}

function shown({ ok, checks }, took) {
  const bad = checks.filter((check) => !check.ok);
  const text = ok ? `All ${checks.length} checks hold` : `${bad.length} of ${checks.length} checks fail`;
  const items = [...bad, ...checks.filter((check) => check.ok)].map((check) =>
    make("li", { class: check.ok ? "ok" : "bad" }, make("b", { text: check.check }), make("span", { class: "quiet", text: check.evidence })),
  );
  return [make("p", { class: ok ? "verdict ok" : "verdict bad", text: `${text} (${seconds(took)}).` }), make("ul", { class: "checks" }, ...items)];
}
