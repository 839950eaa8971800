// The review page: curves whose values are read by pointer and arrow keys, and local times.

import { $, $$ } from "../page.js";

class Plot {
  constructor(field) {
    this.field = field;
    this.points = JSON.parse($("script", field).textContent);
    this.cursor = $("[data-cursor]", field);
    this.dot = $("[data-at-point]", field);
    this.readout = $("[data-readout]", field.closest("figure"));
    this.hint = this.readout.textContent;
    this.at = this.points.length - 1;
    field.addEventListener("pointermove", (event) => this.show(this.nearest(event)));
    field.addEventListener("pointerdown", (event) => this.show(this.nearest(event)));
    field.addEventListener("pointerleave", () => { if (document.activeElement !== field) this.hide(); });
    field.addEventListener("focus", () => this.show(this.at));
    field.addEventListener("blur", () => this.hide());
    field.addEventListener("keydown", (event) => this.press(event));
  }

  nearest(event) {
    const box = this.field.getBoundingClientRect();
    const x = 100 * (event.clientX - box.left) / box.width;
    let best = 0;
    this.points.forEach(([, , at], index) => { if (Math.abs(at - x) < Math.abs(this.points[best][2] - x)) best = index; });
    return best;
  }

  press(event) {
    const last = this.points.length - 1, page = Math.max(1, Math.round(last / 10));
    const to = { ArrowLeft: this.at - 1, ArrowDown: this.at - 1, ArrowRight: this.at + 1, ArrowUp: this.at + 1, PageDown: this.at - page, PageUp: this.at + page, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.show(Math.min(last, Math.max(0, to)));
  }

  show(index) {
    this.at = index;
    const [step, value, x, y] = this.points[index];
    const unit = this.field.dataset.unit;
    const label = `step ${step}: ${value}${unit}`;
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
    this.dot.hidden = false;
    this.dot.style.left = `${x}%`;
    this.dot.style.top = `${y}%`;
    this.readout.textContent = label;
    this.field.setAttribute("aria-valuenow", step);
    this.field.setAttribute("aria-valuetext", label);
  }

  hide() {
    this.cursor.setAttribute("visibility", "hidden");
    this.dot.hidden = true;
    this.readout.textContent = this.hint;
  }
}

export function bindCharts() {
  for (const field of $$("[data-points]")) new Plot(field);
  for (const time of $$("time[data-local-time]")) time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
