// Why a request went where it went: every worker that was weighed, what was chosen, how it turned out.

import { bar, make } from "./dom.js";
import { ask } from "./feed.js";
import { bytes, count, many, seconds } from "./words.js";

/** Elements that explain the request. */
export async function explain(request) {
  if (!request.outcome) return [make("p", { class: "quiet", text: `${placed(request)} Its explanation comes with its end.` })];
  try {
    return shown(await ask(`live/requests/${encodeURIComponent(request.id)}`));
  } catch (error) {
    return [make("p", { class: "bad", text: error.message })];
  }
}

function placed({ prefill, decode }) {
  if (!decode) return "It waits for its place.";
  return prefill ? `${prefill} computes its prompt, ${decode} generates.` : `${decode} computes its prompt and generates.`;
}

function shown(why) {
  const elements = [make("p", { text: sentence(why) })];
  if (why.error) elements.push(make("p", { class: "bad", text: why.error }));
  for (const decision of why.decisions) elements.push(...decided(decision));
  if (why.runs.length) elements.push(...turnedOut(why.runs));
  return elements;
}

function sentence(why) {
  const words = [`${why.outcome[0].toUpperCase()}${why.outcome.slice(1)}.`];
  if (why.ttft_s !== undefined) {
    words.push(`The first token came after ${seconds(why.ttft_s)}; ${seconds(why.predicted_ttft_s)} had been predicted.`);
    if (why.best_process) {
      const regret = why.regret_s > 0 ? `${why.best_process} might have had it after ${seconds(why.best_ttft_s)}: a regret of ${seconds(why.regret_s)}.` : "In hindsight nobody would have been sooner: no regret.";
      words.push(regret);
    }
  }
  return words.join(" ");
}

function decided(decision) {
  const who = decision.prefill ? `${decision.prefill} prefills, ${decision.decode} decodes` : `${decision.decode} prefills and decodes`;
  const head = make("h3", {}, `${who} `, make("span", { class: "quiet", text: `decided after ${seconds(decision.after_s)}` }));
  const rows = [...decision.candidates].sort((a, b) => a.ttft_s - b.ttft_s).slice(0, 16);
  const most = Math.max(1e-9, ...rows.map((row) => row.ttft_s));
  const body = rows.map((row) => {
    const wait = Math.max(row.queue_s, row.fetch_s);
    const parts = [
      [row.queue_s >= row.fetch_s ? "queue" : "fetch", wait / most, `wait ${seconds(wait)}`],
      ["prefill", row.compute_s / most, `compute ${seconds(row.compute_s)}`],
      ["overhead", decision.overhead_s / most, `messages ${seconds(decision.overhead_s)}`],
    ];
    return make(
      "tr",
      { class: row.chosen ? "chosen" : null },
      make("th", { scope: "row" }, row.process, row.chosen && make("span", { class: "mark", text: " chosen" })),
      number(count(row.hit_tokens)),
      number(seconds(row.queue_s)),
      number(seconds(row.fetch_s)),
      number(seconds(row.compute_s)),
      make("td", { class: "graph" }, bar(parts, `predicted ${seconds(row.ttft_s)}`)),
      number(seconds(row.ttft_s)),
    );
  });
  const left = decision.candidates.length - rows.length;
  const sources = decision.sources.map((source) => `${source.process} (${source.tier}, ${many(source.num_blocks, "block")})`);
  return [
    head,
    make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Workers that were weighed" },
      make("table", {},
        make("thead", {}, make("tr", {}, ...["weighed", "hit tokens", "queue", "fetch", "compute", "", "first token"].map((text) => make("th", { scope: "col", text })))),
        make("tbody", {}, ...body))),
    decision.overhead_s >= 1e-4 && make("p", { class: "quiet", text: `Each first token is predicted with ${seconds(decision.overhead_s)} for messages.` }),
    left > 0 && make("p", { class: "quiet", text: `and ${left} others that were predicted to be later` }),
    sources.length > 0 && make("p", { class: "quiet", text: `To fetch from, in this order: ${sources.join(", ")}` }),
  ].filter(Boolean);
}

function turnedOut(runs) {
  const body = runs.map((run) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, run.process, make("span", { class: "quiet", text: ` ${run.role}${run.attempt ? `, attempt ${run.attempt + 1}` : ""}` })),
      number(count(run.local_hit_tokens)),
      number(count(run.fetched_tokens)),
      number(count(run.computed_tokens)),
      number(seconds(run.queue_s)),
      number(seconds(run.fetch_s)),
      number(seconds(run.compute_s)),
    ),
  );
  const fetched = runs.flatMap((run) =>
    run.fetched.map((item) => `${run.process} ← ${item.process} ${item.tier} over ${item.transport}: ${many(item.num_blocks, "block")}, ${bytes(Number(item.num_bytes))}`),
  );
  return [
    make("h3", { text: "How it turned out" }),
    make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "What its workers did" },
      make("table", {},
        make("thead", {}, make("tr", {}, ...["worker", "had", "fetched", "computed", "queue", "fetch", "compute"].map((text) => make("th", { scope: "col", text })))),
        make("tbody", {}, ...body))),
    ...fetched.map((text) => make("p", { class: "quiet", text })),
  ];
}

const number = (text) => make("td", { class: "number", text });
