// The page: what the feed says, given to those who show it.

import { Audit } from "./audit.js";
import { Cluster } from "./cluster.js";
import { at, say } from "./dom.js";
import { useKey, watch } from "./feed.js";
import { Prefixes } from "./prefixes.js";
import { Requests } from "./requests.js";
import { Totals } from "./totals.js";

const STATES = {
  lost: "not connected; trying again",
  denied: "a key is needed",
  full: "too many are watching; trying again",
};

const cluster = new Cluster(at("cluster"), at("hidden-processes"));
const prefixes = new Prefixes(at("prefixes"));
const requests = new Requests(at("list"), at("no-requests"));
const totals = new Totals(at("totals"));
new Audit();

let epoch = null;

function show(message) {
  const { cluster: what } = message;
  if (epoch !== message.epoch) {
    epoch = message.epoch;
    cluster.reset();
    totals.reset();
  }
  say(at("model"), what.model);
  say(at("router"), what.router);
  at("audit").hidden = !message.admin;
  state(what.ready ? "ready" : "waiting", what.ready ? "ready" : "no decode worker yet");
  totals.show(message);
  cluster.show(message);
  requests.show(message);
  if (message.prefixes) prefixes.show(message);
}

function state(name, text) {
  const element = at("state");
  element.dataset.state = name;
  say(element, text);
  document.body.classList.toggle("stale", name in STATES);
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key-text").value);
  at("key-text").value = "";
  at("key").hidden = true;
});

watch(show, (name) => {
  if (name === "live") {
    at("key").hidden = true;
    return;
  }
  if (name === "denied" && at("key-text").value === "") at("key").hidden = false;
  state(name, STATES[name]);
});
