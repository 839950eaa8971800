// Long work on any page: each element with data-job shows its job's progress, and its part of the page is renewed at the end.

import { percent, size } from "../numbers.js";
import { $, $$, announce, toast } from "../page.js";
import { followJob, measures, showProgress } from "../streams.js";

const followed = new Set();

function followAll() {
  for (const card of $$("[data-job]")) {
    const job = card.dataset.job;
    if (followed.has(job)) continue;
    followed.add(job);
    const find = () => $(`[data-job="${CSS.escape(job)}"]`);
    let stage = "";
    followJob(job, (progress) => {
      const now = find();
      if (!now) return;
      $("[data-progress-text]", now).textContent = progress.message;
      $("[data-progress-more]", now).textContent = [percent(progress.fraction), measures(progress)].filter(Boolean).join(" · ");
      showProgress(now, progress);
      if (progress.stage !== stage) { stage = progress.stage; announce(progress.message); }
    }, (state, about) => {
      const what = $("h2, h3", find() ?? document.body)?.textContent ?? "Model";
      tell(state, about, what);
      renew(find());
    });
  }
}

function tell(state, about, what) {
  if (state === "failed") toast(about.message, { more: about.next_step, error: true });
  else if (state === "cancelled") {
    const given = about?.memory_before ? `${size(about.memory_before - about.memory_after)} freed` : "";
    toast("Cancelled", { more: given });
  } else toast(`${what} is ready`, { kind: "learned" });
}

function renew(card) {
  if ($("[data-reload-after]")) { location.reload(); return; }
  const part = card?.closest("#cards, #exports");
  if (part) htmx.trigger(part, part.id === "cards" ? "trellis:models" : "trellis:exports");
}

export function bindLoads() {
  followAll();
  document.addEventListener("htmx:afterSettle", followAll);
}
