// Event streams that resume after the last event, and polling where streams are blocked.

import { duration, percent, size } from "./numbers.js";
import { $, ask } from "./page.js";

const GIVE_UP = 3; // failed attempts to open a stream before polling starts

/**
 * Follow the event stream at `url` after an event id. `handlers` maps event names to functions of (data, close).
 * While the stream cannot be opened, call `poll(close)` instead, with exponential back-off.
 */
export function follow(url, after, handlers, { onState = () => {}, poll = null } = {}) {
  let source, timer, last = after, wait = 500, failures = 0, ended = false, pollWait = 500, polling = false;
  const open = () => {
    source = new EventSource(last ? `${url}?after=${encodeURIComponent(last)}` : url);
    source.onopen = () => { wait = 500; failures = 0; polling = false; onState(true); };
    source.onerror = () => {
      if (ended) return;
      failures += 1;
      if (!polling) onState(false);
      if (failures >= GIVE_UP && poll && !polling) { polling = true; pollWait = 500; ask_again(); }
      if (source.readyState !== EventSource.CLOSED && failures < GIVE_UP) return; // the browser reconnects
      source.close();
      clearTimeout(timer);
      timer = setTimeout(open, wait * (0.5 + Math.random()));
      wait = Math.min(wait * 2, 15000);
    };
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        if (event.lastEventId) last = event.lastEventId;
        // A network error has no data; an event called "failed" has.
        if (event.data !== undefined) handle(JSON.parse(event.data), close);
      });
    }
  };
  const ask_again = async () => {
    if (ended || !polling) return;
    try {
      const moved = await poll(close);
      onState(true);
      pollWait = moved ? 500 : Math.min(pollWait * 2, 8000);
    } catch {
      onState(false);
      pollWait = Math.min(pollWait * 2, 15000);
    }
    if (!ended && polling) setTimeout(ask_again, pollWait * (0.75 + Math.random() / 2));
  };
  const close = () => { ended = true; clearTimeout(timer); source?.close(); };
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted && ended) { ended = false; open(); } });
  open();
  return close;
}

export function showProgress(root, progress) {
  const bar = $("[data-load]", root);
  if (!bar) return;
  bar.removeAttribute("hidden");
  bar.setAttribute("aria-valuenow", Math.round(progress.fraction * 100));
  bar.setAttribute("aria-valuetext", `${percent(progress.fraction)}, ${progress.message}`);
  $("[data-load-bar]", bar).setAttribute("width", Math.round(progress.fraction * 100));
}

export function measures(progress) {
  const parts = [];
  if (progress.bytes && progress.total_bytes) parts.push(`${size(progress.bytes)} of ${size(progress.total_bytes)}`);
  if (progress.rate) parts.push(`${size(progress.rate)}/s`);
  if (progress.seconds_left > 1) parts.push(`${duration(Math.round(progress.seconds_left) * 1000)} left`);
  return parts.join(" · ");
}

export const describeProgress = (progress) => [progress.message, measures(progress)].filter(Boolean).join(" · ");

/** Follow a job to its end: `moves(progress)`, then `ended(state, result or error)`. */
export function followJob(job, moves, ended) {
  let seen = "";
  const finish = (state) => (data, close) => { close(); ended(state, data.error ?? data.result ?? null); };
  return follow(`/api/jobs/${job}/events`, null, {
    progress: moves, done: finish("done"), failed: finish("failed"), cancelled: finish("cancelled"),
  }, {
    poll: async (close) => {
      const now = await ask("GET", `/api/jobs/${job}`);
      if (["done", "failed", "cancelled"].includes(now.state)) {
        close();
        ended(now.state, now.error ?? now.result);
        return true;
      }
      const changed = JSON.stringify(now.progress) !== seen;
      seen = JSON.stringify(now.progress);
      moves(now.progress);
      return changed;
    },
  });
}
