// Blind comparison: A, B and T judge, U takes back; each round is announced, and nothing is judged that was not seen.

import { $, announce } from "../page.js";

const SEEN = 300; // milliseconds that a round must have been there before it can be judged

export function bindBlind() {
  const place = $("[data-blind]");
  if (!place) return;
  let shown = $("[data-round]", place)?.dataset.round ?? "";
  let since = 0;
  const tell = () => {
    const round = $("[data-round]", place)?.dataset.round ?? "";
    if (round === shown) return;
    const waited = shown === "waiting";
    shown = round;
    since = performance.now();
    if (round === "result" || (waited && document.activeElement === document.body)) $("#result-title, #round-title", place)?.focus();
    if (round !== "result" && round !== "waiting") announce($("#round-title", place)?.textContent ?? "");
  };
  document.addEventListener("htmx:afterSettle", tell);
  place.addEventListener("htmx:confirm", (event) => {
    // The second press of a double click would judge a round that nobody has read.
    if (event.target.matches("[data-judge]") && performance.now() - since < SEEN) event.preventDefault();
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
