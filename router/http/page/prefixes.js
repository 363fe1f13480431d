// The tree of prefixes that the last requests share.

import { bar, make } from "./dom.js";
import { count, many, share } from "./words.js";

export class Prefixes {
  constructor(element) {
    this.element = element;
  }

  show({ prefixes, cluster }) {
    if (!prefixes.length) {
      this.element.replaceChildren(make("p", { class: "quiet", text: "No two prompts have begun alike yet." }));
      return;
    }
    const most = Math.max(...prefixes.map((prefix) => prefix.num_requests));
    const depths = [];
    const rows = prefixes.map((prefix, number) => {
      depths[number] = prefix.parent === null ? 0 : depths[prefix.parent] + 1;
      const tokens = `${count(prefix.begin * cluster.block_tokens)}–${count(prefix.end * cluster.block_tokens)}`;
      const width = prefix.num_requests / most;
      const label = `tokens ${tokens}, ${many(prefix.num_requests, "request")}, ${share(prefix.found)} found`;
      const name = make("span", { class: "name" }, make("code", { text: prefix.name || `#${number + 1}` }), make("span", { class: "quiet", text: ` ${tokens}` }));
      name.style.setProperty("--depth", Math.min(depths[number], 6));
      return make(
        "li",
        { title: prefix.holders.length ? `held by ${prefix.holders.join(", ")}` : null },
        name,
        bar([["found", width * prefix.found], ["missed", width * (1 - prefix.found)]], label),
        make("span", { class: "number", text: `${count(prefix.num_requests)}×` }),
        make("span", { class: "number quiet", text: share(prefix.found) }),
      );
    });
    this.element.replaceChildren(make("ol", { class: "prefixes" }, ...rows));
  }
}
