// The cluster as a picture: processes with their tiers, and the blocks that flow between them.
//
// Prefill workers are on the left, decode workers on the right, pool nodes below and the router above, both in the middle. Lines run
// through the middle, so none crosses a card.

import { bar, draw, make, say } from "./dom.js";
import { bytes, count, many, seconds } from "./words.js";

const CROWDED = 6; // Workers of one role, from which on their cards are small.
const FADE = 0.55; // What is left of a shown rate with each message in which nothing came.
const SILENT_S = 1;

export class Cluster {
  constructor(element, hidden) {
    this.hidden = hidden;
    this.element = element;
    this.lines = draw("svg", { class: "lines", "aria-hidden": "true" });
    this.places = Object.fromEntries(["router", "prefill", "decode", "pool"].map((role) => [role, make("ul", { class: `place ${role}`, "aria-label": role === "pool" ? "pool nodes" : role === "router" ? "router" : `${role} workers` })]));
    this.said = make("ul", { class: "unseen", "aria-label": "What was fetched" });
    element.append(this.lines, ...Object.values(this.places), this.said);
    this.cards = new Map();
    this.flows = new Map();
    this.links = [];
    new ResizeObserver(() => this.drawLines()).observe(element);
  }

  reset() {
    this.flows.clear();
  }

  show({ cluster, now_s: now }) {
    const router = { name: cluster.router, role: "router", served: true, tiers: [], num_dispatches: cluster.num_active, num_waiting: cluster.num_waiting };
    const processes = [router, ...cluster.processes];
    const names = new Set(processes.map((process) => process.name));
    for (const [name, card] of this.cards) {
      if (!names.has(name)) {
        card.element.remove();
        this.cards.delete(name);
      }
    }
    for (const process of processes) {
      let card = this.cards.get(process.name);
      if (card && card.role !== process.role) {
        card.element.remove();
        card = undefined;
      }
      if (!card) {
        card = new Card(process);
        this.cards.set(process.name, card);
      }
      card.show(process, cluster);
    }
    for (const [role, place] of Object.entries(this.places)) {
      const ours = processes.filter((process) => process.role === role);
      ours.forEach((process, index) => {
        const { element } = this.cards.get(process.name);
        if (place.children[index] !== element) place.insertBefore(element, place.children[index] ?? null);
      });
      place.classList.toggle("crowded", ours.length > CROWDED);
    }
    this.takeLinks(cluster, now);
    const left = cluster.num_processes - cluster.processes.length;
    this.hidden.hidden = left <= 0;
    say(this.hidden, `${many(left, "other process").replace("processs", "processes")} not shown`);
    this.drawLines();
  }

  /** Rates of each pair, from what the sinks have counted. */
  takeLinks(cluster, now) {
    const totals = new Map();
    for (const link of cluster.links) {
      const key = `${link.source} ${link.sink}`;
      const total = totals.get(key) ?? { source: link.source, sink: link.sink, transports: [], num_bytes: 0 };
      total.num_bytes += link.num_bytes;
      total.transports.push(link.transport);
      totals.set(key, total);
    }
    for (const key of [...this.flows.keys()]) if (!totals.has(key)) this.flows.delete(key);
    for (const [key, total] of totals) {
      const flow = this.flows.get(key) ?? { num_bytes: total.num_bytes, at: now, rate: 0 };
      if (now > flow.at) {
        const rate = Math.max(0, total.num_bytes - flow.num_bytes) / (now - flow.at);
        const faded = FADE * flow.rate;
        this.flows.set(key, { num_bytes: total.num_bytes, at: now, rate: Math.max(rate, faded < 1000 ? 0 : faded) });
      } else this.flows.set(key, flow);
    }
    this.links = [...totals.values()].map((total) => ({ ...total, rate: this.flows.get(`${total.source} ${total.sink}`).rate }));
    const texts = this.links.map((link) => `${link.sink} has fetched ${bytes(link.num_bytes)} from ${link.source} over ${link.transports.join(" and ")}`);
    if (texts.join() !== this.texts) {
      this.texts = texts.join();
      this.said.replaceChildren(...texts.map((text) => make("li", { text })));
    }
  }

  drawLines() {
    const box = this.element.getBoundingClientRect();
    if (!box.width) return;
    this.lines.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
    const place = (name) => {
      const card = this.cards.get(name);
      if (!card) return null;
      const rect = card.element.getBoundingClientRect();
      return { role: card.role, left: rect.left - box.left, right: rect.right - box.left, top: rect.top - box.top, bottom: rect.bottom - box.top };
    };
    const wanted = new Map();
    for (const [name, card] of this.cards) {
      if (card.role !== "prefill" && card.role !== "decode") continue;
      const router = [...this.cards.entries()].find(([, other]) => other.role === "router");
      wanted.set(`router ${name}`, { ...fromRouter(place(router[0]), place(name)), control: true, busy: card.num_dispatches > 0, rate: 0 });
    }
    for (const link of this.links) {
      const source = place(link.source);
      const sink = place(link.sink);
      if (source && sink) wanted.set(`${link.source} ${link.sink}`, { ...between(source, sink), rate: link.rate, title: `${link.source} → ${link.sink} over ${link.transports.join(", ")}: ${bytes(link.num_bytes)} so far` });
    }
    this.drawn ??= new Map();
    for (const [key, line] of this.drawn) {
      if (!wanted.has(key)) {
        line.element.remove();
        this.drawn.delete(key);
      }
    }
    for (const [key, link] of wanted) {
      if (!this.drawn.has(key)) this.drawn.set(key, new Line(this.lines, link.control));
      this.drawn.get(key).show(link);
    }
  }
}

class Card {
  constructor({ name, role }) {
    this.role = role;
    this.state = make("span", { class: "quiet" });
    this.tiers = make("div", { class: "tiers" });
    this.element = make("li", { class: `process ${role}`, "data-name": name }, make("p", { class: "title" }, make("b", { text: name }), this.state), this.tiers);
  }

  show(process, cluster) {
    this.num_dispatches = process.num_dispatches;
    say(this.state, this.role === "router" ? `${count(process.num_dispatches)} active, ${count(process.num_waiting)} wait` : stateOf(process));
    this.element.classList.toggle("away", process.served === false || process.draining === true || process.heard_s > SILENT_S);
    const key = JSON.stringify(process.tiers);
    if (key === this.key) return;
    this.key = key;
    this.tiers.replaceChildren(
      ...process.tiers.map((tier) => {
        const share = (number) => number / Math.max(1, tier.num_blocks);
        const held = tier.num_used + tier.num_cached;
        const label = `${tier.tier}: ${count(tier.num_used)} blocks in use, ${count(tier.num_cached)} cached, of ${count(tier.num_blocks)}; ${count(tier.num_leased)} leased`;
        const size = cluster.slab_bytes ? `${bytes(held * cluster.slab_bytes)} of ${bytes(tier.num_blocks * cluster.slab_bytes)}` : "";
        return make(
          "div",
          { class: "tier", title: `${label}${size ? `; ${size}` : ""}` },
          make("span", { class: "tier-name", text: tier.tier }),
          bar([["used", share(tier.num_used)], ["cached", share(tier.num_cached)]], label),
          make("span", { class: "tier-count", text: `${count(held)} / ${count(tier.num_blocks)}` }),
        );
      }),
    );
  }
}

function stateOf(process) {
  if (!process.served) return "another group";
  if (process.draining) return "leaving";
  if (process.heard_s > SILENT_S) return `silent for ${seconds(process.heard_s)}`;
  if (process.role === "pool") return "";
  const words = [`${count(process.num_running)} run`];
  if (process.num_waiting) words.push(`${count(process.num_waiting)} wait`);
  return words.join(", ");
}

class Line {
  constructor(svg, control) {
    this.base = draw("path", { class: control ? "line control" : "line" });
    this.flow = control ? null : draw("path", { class: "flow" });
    this.text = control ? null : draw("text", { class: "rate" });
    this.title = draw("title");
    this.element = draw("g", {}, this.title, this.base, this.flow, this.text);
    svg.append(this.element);
  }

  show({ d, label, rate, busy, title }) {
    if (d !== this.d) {
      this.d = d;
      this.base.setAttribute("d", d);
      this.flow?.setAttribute("d", d);
    }
    this.base.classList.toggle("busy", Boolean(busy));
    if (!this.flow) return;
    this.title.textContent = title;
    const flows = rate > 0;
    this.element.classList.toggle("flowing", flows);
    if (!flows) return;
    // A decade more bytes a second is a step quicker: a hundred kilobytes crawl, gigabytes run.
    const pace = Math.max(0, Math.min(5, Math.round(Math.log10(rate) - 5)));
    if (pace !== this.pace) {
      this.pace = pace;
      this.flow.style.animationDuration = `${[1.6, 1.1, 0.75, 0.5, 0.35, 0.25][pace]}s`;
    }
    this.text.setAttribute("x", label.x.toFixed(1));
    this.text.setAttribute("y", label.y.toFixed(1));
    say(this.text, `${bytes(rate)}/s`);
  }
}

const middleOf = (box) => (box.left + box.right) / 2;
const isLeft = (box) => box.role === "prefill";

/** Where a worker's lines begin: at its inner side, at a part of its height. */
const inner = (box, part) => ({ x: isLeft(box) ? box.right : box.left, y: box.top + part * (box.bottom - box.top) });

/** From `far` up or down, then sideways to the worker, with one round corner; or the other way round. `label` is where its rate is. */
function corner(far, worker, toWorker) {
  // What comes is said above its line, what goes below: the two of a worker are close.
  const radius = Math.min(18, Math.abs(worker.x - far.x), Math.abs(worker.y - far.y));
  const down = Math.sign(worker.y - far.y) * radius;
  const side = Math.sign(worker.x - far.x) * radius;
  const d = toWorker
    ? `M${far.x} ${far.y}V${worker.y - down}Q${far.x} ${worker.y} ${far.x + side} ${worker.y}H${worker.x}`
    : `M${worker.x} ${worker.y}H${far.x + side}Q${far.x} ${worker.y} ${far.x} ${worker.y - down}V${far.y}`;
  return { d, label: { x: (far.x + worker.x) / 2, y: worker.y + (toWorker ? -6 : 15) } };
}

function curve(from, to, out) {
  const [first, second] = out === undefined ? [(from.x + to.x) / 2, (from.x + to.x) / 2] : [out, out];
  const d = `M${from.x} ${from.y}C${first} ${from.y} ${second} ${to.y} ${to.x} ${to.y}`;
  return { d, label: { x: (from.x + 3 * first + 3 * second + to.x) / 8, y: (from.y + to.y) / 2 - 6 } };
}

function fromRouter(router, worker) {
  return corner({ x: middleOf(router) + (isLeft(worker) ? -10 : 10), y: router.bottom }, inner(worker, 0.24), true);
}

/** The line of what `sink` fetches. */
function between(source, sink) {
  if (source.role === "pool" && sink.role === "pool") {
    const right = source.left < sink.left;
    return curve({ x: right ? source.right : source.left, y: source.top + 24 }, { x: right ? sink.left : sink.right, y: sink.top + 24 });
  }
  if (sink.role === "pool") return corner({ x: middleOf(sink) + (isLeft(source) ? -44 : 44), y: sink.top }, inner(source, 0.86), false);
  if (source.role === "pool") return corner({ x: middleOf(source) + (isLeft(sink) ? -28 : 28), y: source.top }, inner(sink, 0.66), true);
  if (source.role !== sink.role) return curve(inner(source, 0.45), inner(sink, 0.45));
  const from = inner(source, 0.5);
  return curve(from, inner(sink, 0.5), from.x + (isLeft(source) ? 30 : -30));
}
