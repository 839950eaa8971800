// The blind test: keys A, B and T vote, U undoes; each new round is announced, and a round must be visible before a vote.

import { $, announce } from "../page.js";

const MIN_VISIBLE = 300; // milliseconds that a round must be visible before a vote counts

export function bindBlind() {
  const place = $("[data-blind]");
  if (!place) return;
  let shown = $("[data-round]", place)?.dataset.round ?? "";
  let since = 0;
  const onRoundChange = () => {
    const round = $("[data-round]", place)?.dataset.round ?? "";
    if (round === shown) return;
    const wasWaiting = shown === "waiting";
    shown = round;
    since = performance.now();
    if (round === "result" || (wasWaiting && document.activeElement === document.body)) $("#result-title, #round-title", place)?.focus();
    if (round !== "result" && round !== "waiting") announce($("#round-title", place)?.textContent ?? "");
  };
  document.addEventListener("htmx:afterSettle", onRoundChange);
  place.addEventListener("htmx:confirm", (event) => {
    // The second press of a double click must not vote on the next, unread round.
    if (event.target.matches("[data-judge]") && performance.now() - since < MIN_VISIBLE) event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat && event.target.closest("[data-judge] button")) { event.preventDefault(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.repeat) return;
    if (event.target.closest("input, textarea, select")) return;
    const button = $(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`, place);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  });
}
