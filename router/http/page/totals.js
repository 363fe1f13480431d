// The figures of the last minute, each with its line since the page was opened.

import { draw, make, say } from "./dom.js";
import { count, parts, seconds, share } from "./words.js";

const NUM_POINTS = 120;

const FIGURES = [
  ["First token", (t) => seconds(t.ttft_p50_s), (t) => `p95 ${seconds(t.ttft_p95_s)}`, (t) => t.ttft_p50_s],
  ["Per token after", (t) => seconds(t.tpot_p50_s), (t) => `p95 ${seconds(t.tpot_p95_s)}`, (t) => t.tpot_p50_s],
  ["Tokens per second", (t) => (t.tokens_per_s === null ? "–" : count(t.tokens_per_s)), () => "drawn, last 5 s", (t) => t.tokens_per_s],
  ["Prompt tokens found", (t) => share(t.found), () => "KV reused", (t) => t.found],
  ["Active", (t, c) => count(c.num_active), (t, c) => `${count(c.num_waiting)} wait`, (t, c) => c.num_active],
  ["Ended", (t) => count(t.num_requests), (t) => (t.num_failed ? `${count(t.num_failed)} failed` : "in the last minute"), (t) => t.num_requests],
];

export class Totals {
  constructor(element) {
    this.figures = FIGURES.map(([name, value, note, point]) => {
      const number = make("span", { class: "value" });
      const unit = make("span", { class: "unit" });
      const under = make("span", { class: "quiet" });
      const line = draw("path");
      const spark = draw("svg", { class: "spark", viewBox: `0 0 ${NUM_POINTS} 24`, preserveAspectRatio: "none", "aria-hidden": "true" }, line);
      element.append(make("div", { class: "card figure" }, make("dt", { text: name }), make("dd", {}, number, unit, under), spark));
      return { value, note, point, number, unit, under, line, points: [] };
    });
  }

  reset() {
    for (const figure of this.figures) figure.points = [];
  }

  show({ totals, cluster }) {
    for (const figure of this.figures) {
      const [number, unit] = parts(figure.value(totals, cluster));
      say(figure.number, number);
      say(figure.unit, unit);
      say(figure.under, figure.note(totals, cluster));
      figure.points.push(figure.point(totals, cluster));
      if (figure.points.length > NUM_POINTS) figure.points.shift();
      figure.line.setAttribute("d", path(figure.points));
    }
  }
}

/** A line through what is known, from 0 up. */
function path(points) {
  const top = Math.max(...points.map((point) => point ?? 0)) || 1;
  let command = "M";
  return points
    .map((point, index) => {
      if (point === null) {
        command = "M";
        return "";
      }
      const text = `${command}${(index + NUM_POINTS - points.length).toFixed(1)} ${(22 - (20 * point) / top).toFixed(1)}`;
      command = "L";
      return text;
    })
    .join("");
}
