// The last requests as a timeline: a row each, the newest first, its phases on two scales that all rows share.

import { at, draw, make, percent, say } from "./dom.js";
import { explain } from "./explain.js";
import { count, seconds, share } from "./words.js";

const MAX_ROWS = 50;
const NAMES = { queue: "queue", fetch: "fetch", prefill: "prefill", handover: "hand-over", decode: "decode" };
const STEPS = [1, 1.5, 2, 3, 5, 7.5, 10];
const TICK_MS = 100;

export class Requests {
  constructor(list, none) {
    this.list = list;
    this.none = none;
    this.rows = new Map();
    this.ahead_s = 0; // The router's clock less the page's.
    this.scale = { first: 0.1, rest: 1 };
    setInterval(() => this.tick(), TICK_MS);
  }

  show(message) {
    this.ahead_s = message.now_s - performance.now() / 1000;
    if (message.whole) this.keepOnly(new Set(message.requests.map((request) => request.id)));
    for (const request of message.requests) this.take(request);
    for (const id of message.lost) this.drop(id);
    const rows = [...this.rows.values()].sort((a, b) => b.request.accepted_at_s - a.request.accepted_at_s);
    for (const row of rows.splice(MAX_ROWS)) this.drop(row.request.id);
    this.order(rows);
    this.rescale();
    this.none.hidden = rows.length > 0;
    for (const row of rows) row.draw(this.now(), this.scale);
  }

  now() {
    return performance.now() / 1000 + this.ahead_s;
  }

  tick() {
    if (document.hidden || document.body.classList.contains("stale")) return;
    for (const row of this.rows.values()) if (!row.request.outcome) row.draw(this.now(), this.scale);
  }

  take(request) {
    const row = this.rows.get(request.id);
    if (row) row.update(request);
    else this.rows.set(request.id, new Row(request));
  }

  drop(id) {
    this.rows.get(id)?.element.remove();
    this.rows.delete(id);
  }

  keepOnly(ids) {
    for (const id of [...this.rows.keys()]) if (!ids.has(id)) this.drop(id);
  }

  /** New rows go where they belong; those that are there are not touched, and keep the focus. */
  order(rows) {
    let before = null;
    for (const row of rows.reverse()) {
      if (row.element.nextSibling !== before || row.element.parentNode !== this.list) this.list.insertBefore(row.element, before);
      before = row.element;
    }
  }

  /** Both scales fit nine in ten of the rows. */
  rescale() {
    const first = [];
    const rest = [];
    for (const { request } of this.rows.values()) {
      const total = request.total_s ?? this.now() - request.accepted_at_s;
      first.push(Math.max(request.ttft_s ?? total, request.predicted_ttft_s ?? 0));
      if (request.ttft_s !== null) rest.push(total - request.ttft_s);
    }
    this.scale = { first: fitting(first), rest: fitting(rest) };
    for (const name of ["first", "rest"]) say(at(`axis-${name}`).lastElementChild, seconds(this.scale[name]));
  }
}

/** A round number of seconds that nine in ten of `values` don't exceed. */
function fitting(values) {
  const sorted = values.sort((a, b) => a - b);
  const most = Math.max(0.01, 1.05 * (sorted[Math.ceil(0.9 * sorted.length) - 1] ?? 0));
  const power = 10 ** Math.floor(Math.log10(most));
  return power * STEPS.find((step) => step * power >= most);
}

class Row {
  constructor(request) {
    const id = `why-${request.id}`;
    this.cells = Object.fromEntries(["name", "prompt", "found", "answer", "ttft", "total"].map((name) => [name, make("span", { class: `cell ${name}` })]));
    this.first = draw("svg", { class: "bar first", "aria-hidden": "true" });
    this.rest = draw("svg", { class: "bar rest", "aria-hidden": "true" });
    const { name, prompt, found, answer, ttft, total } = this.cells;
    this.button = make("button", { type: "button", "aria-expanded": "false", "aria-controls": id }, name, prompt, found, answer, this.first, this.rest, ttft, total);
    this.why = make("div", { class: "why", id, hidden: true });
    this.element = make("li", { "data-id": request.id }, this.button, this.why);
    this.button.addEventListener("click", () => this.toggle());
    this.update(request);
  }

  update(request) {
    const ended = request.outcome && this.request && !this.request.outcome;
    this.request = request;
    this.element.dataset.outcome = request.outcome || "active";
    say(this.cells.name, request.id.slice(0, 8));
    say(this.cells.prompt, count(request.num_prompt_tokens));
    const found = request.num_cached_tokens === null ? null : request.num_cached_tokens / request.num_prompt_tokens;
    say(this.cells.found, share(found));
    say(this.cells.answer, count(request.num_generated_tokens));
    say(this.cells.ttft, seconds(request.ttft_s));
    const marks = [];
    if (request.num_failures) marks.push(`dispatched again ${request.num_failures}×`);
    if (request.resume_no) marks.push(`resumed ${request.resume_no}×`);
    if (!request.exact) marks.push("other numerics");
    this.cells.name.title = [request.id, ...marks].join(" · ");
    this.cells.name.classList.toggle("marked", marks.length > 0);
    const words = [
      `Request ${request.id.slice(0, 8)}`,
      request.outcome || "active",
      `${request.num_prompt_tokens} prompt tokens`,
      found === null ? null : `${share(found)} found`,
      `${request.num_generated_tokens} tokens drawn`,
      request.ttft_s === null ? "no token yet" : `first token after ${seconds(request.ttft_s)}`,
      ...marks,
    ];
    this.button.setAttribute("aria-label", words.filter(Boolean).join(", "));
    if (ended && !this.why.hidden) this.explain();
  }

  draw(now, scale) {
    const { request } = this;
    const age = request.total_s ?? Math.max(0, now - request.accepted_at_s);
    const first = request.ttft_s ?? age;
    say(this.cells.total, request.outcome && request.outcome !== "completed" ? request.outcome : seconds(age));
    const key = request.outcome ? `${scale.first} ${scale.rest} ${request.outcome}` : null;
    if (key !== null && key === this.drawn) return;
    this.drawn = key;
    fill(this.first, request.spans, 0, first, age, scale.first);
    fill(this.rest, request.spans, first, age, age, scale.rest);
    if (request.predicted_ttft_s !== null) {
      const x = percent(request.predicted_ttft_s / scale.first);
      this.first.append(draw("line", { class: "tick", x1: x, x2: x, y1: "0", y2: "100%" }, draw("title", { text: `predicted ${seconds(request.predicted_ttft_s)}` })));
    }
  }

  toggle() {
    this.why.hidden = !this.why.hidden;
    this.button.setAttribute("aria-expanded", String(!this.why.hidden));
    if (!this.why.hidden) this.explain();
  }

  async explain() {
    this.why.replaceChildren(...(await explain(this.request)));
  }
}

/** The parts of `spans` between two times, on a scale that begins at the first. What is too long for it is cut, and marked so. */
function fill(svg, spans, from, to, age, scale) {
  const rects = [];
  for (const [phase, begin, end] of spans) {
    const left = Math.max(begin, from);
    const right = Math.min(end ?? age, to);
    if (right <= left) continue;
    const rect = draw("rect", { class: phase, x: percent((left - from) / scale), width: percent((Math.min(right, from + scale) - left) / scale), height: "100%" });
    rect.append(draw("title", { text: `${NAMES[phase]} ${seconds((end ?? age) - begin)}` }));
    rects.push(rect);
  }
  if (to - from > 1.001 * scale) rects.push(draw("line", { class: "cut", x1: "99%", x2: "99%", y1: "0", y2: "100%" }));
  svg.replaceChildren(...rects);
}
