// Blind comparison: A, B and T judge; each round is announced, and the result takes the focus.

import { $, announce } from "./page.js";

export function bindBlind() {
  const place = $("[data-blind]");
  if (!place) return;
  let shown = "";
  const tell = () => {
    const round = $("[data-round]", place)?.dataset.round ?? "";
    if (round === shown) return;
    shown = round;
    if (round === "result") $("#result-title", place).focus();
    else if (round !== "waiting") announce($("#round-title", place)?.textContent ?? "");
  };
  document.addEventListener("htmx:afterSettle", tell);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.repeat) return;
    if (event.target.closest("input, textarea, select")) return;
    const button = $(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`, place);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  });
}
