// The router's feed: server-sent events, read again and again, with the key that the router may ask for.
//
// `EventSource` can't carry a key, so the events are read by hand.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const SILENCE_MS = 6000; // The router says something each half a second; what is silent for so long is broken.
const KEY = "tandem-key";

/** Headers of whatever is asked of the router. */
export function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** What the router answers at `path`; an Error with its sentence if it refuses. */
export async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Error(body?.error?.message ?? `the router answered ${response.status}`);
  return body;
}

/** Calls `onMessage` with each message and `onState` with "live", "lost", "denied" or "full", for as long as the page is seen. */
export async function watch(onMessage, onState) {
  let pause = FIRST_PAUSE_MS;
  for (;;) {
    await seen();
    const state = await follow((message) => {
      pause = FIRST_PAUSE_MS;
      onState("live");
      onMessage(message);
    });
    if (document.hidden) continue;
    onState(state);
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(LONGEST_PAUSE_MS, 1.6 * pause);
  }
}

/** Reads one connection to its end, and says how it ended. */
async function follow(onMessage) {
  const stop = new AbortController();
  const hide = () => document.hidden && stop.abort();
  document.addEventListener("visibilitychange", hide);
  let watchdog;
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => stop.abort(), SILENCE_MS);
  };
  try {
    alive();
    const response = await fetch("live", { headers: headers(), cache: "no-store", signal: stop.signal });
    if (response.status === 401 || response.status === 403) return "denied";
    if (response.status === 429) return "full";
    if (!response.ok) return "lost";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return "lost";
      alive();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) onMessage(JSON.parse(data.join("\n")));
      }
    }
  } catch {
    return "lost";
  } finally {
    clearTimeout(watchdog);
    document.removeEventListener("visibilitychange", hide);
    stop.abort();
  }
}

function seen() {
  if (!document.hidden) return undefined;
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}
