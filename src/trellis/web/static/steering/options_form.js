// The form of all options: checked while it is filled in, with the memory it would take and what would fit.

import { $, $$, announce, ask, bytes } from "../page.js";

class Setup {
  constructor(root) {
    this.root = root;
    this.form = $("[data-setup-form]", root);
    this.typed = $("[name=typed]", this.form);
    this.touched = new Set(this.typed.value.split(",").filter(Boolean));
    // What a browser has put back after a reload was typed too.
    for (const field of this.fields()) if (this.changed(field)) this.touched.add(field.name);
    // What the server refused is true until the field is changed: the check here cannot see all of it.
    this.refused = new Map($$("[data-field]", this.form).map((place) => [place.dataset.field, $("[data-error]", place).textContent]).filter(([, message]) => message));
    this.form.addEventListener("input", (event) => { this.touch(event.target.name); this.later(); });
    this.form.addEventListener("change", () => this.later());
    this.form.addEventListener("submit", (event) => this.begin(event));
    addEventListener("pageshow", () => this.idle());
    const preview = $("[data-preview]", this.form);
    preview.addEventListener("htmx:beforeRequest", () => this.wait($("#preview", this.form), preview, "Reading the prompts"));
    preview.addEventListener("htmx:afterRequest", (event) => { this.idle(); if (!event.detail.successful) $("#preview", this.form).replaceChildren(); });
    $$("[data-group] select[name='dataset.source']", this.form).forEach((select) => select.addEventListener("change", () => this.showSource()));
    document.addEventListener("trellis:uploaded", ({ detail }) => this.takeUpload(detail));
    $$(".presets a", root).forEach((link, index) => link.addEventListener("click", (event) => { event.preventDefault(); this.preset(index, link); }));
    this.presets = JSON.parse($("[data-presets]", root).textContent);
    this.defaults = JSON.parse($("[data-defaults]", root).textContent);
    this.showSource();
    this.check();
    $("[aria-invalid=true]", this.form)?.focus();
  }

  fields() {
    return $$("[data-field] input, [data-field] select, [data-field] textarea", this.form);
  }

  values() {
    const config = {};
    for (const field of this.fields()) {
      const value = field.type === "checkbox" ? field.checked : field.value;
      const text = field.tagName === "TEXTAREA" || (field.tagName === "INPUT" && field.type === "text");
      if (value === "" && !text) continue;
      const [outer, inner] = field.name.split(".");
      if (inner) (config[outer] ??= {})[inner] = value;
      else config[outer] = value;
    }
    return config;
  }

  changed(field) {
    if (field.type === "checkbox") return field.checked !== field.defaultChecked;
    if (field.tagName === "SELECT") return [...field.options].some((option) => option.selected !== option.defaultSelected) && [...field.options].some((option) => option.defaultSelected);
    return field.value !== field.defaultValue;
  }

  /** A person has set this option: no preset changes it, and what was refused of it is no longer what is there. */
  touch(name) {
    this.touched.add(name);
    this.typed.value = [...this.touched].join(",");
    if (this.refused.delete(name) && !this.refused.size) $$(".problem[role=alert]", this.root).forEach((old) => old.remove());
  }

  begin(event) {
    if (event.defaultPrevented || event.submitter === $("[data-preview]", this.form)) return;
    const hub = $("[name='dataset.source']", this.form)?.value === "hub";
    this.wait($("[data-beginning]", this.form), $("[data-begin]", this.form), hub ? "Checking the options and the data set on the hub" : "Checking the options and the prompts");
  }

  /** Say at once that something is being done, and for how long it has been. */
  wait(place, button, text) {
    this.idle();
    const line = document.createElement("p");
    line.className = "working";
    const words = document.createElement("span"), seconds = document.createElement("span"), spinner = document.createElement("span");
    spinner.className = "spinner";
    seconds.className = "num";
    for (const each of [spinner, seconds]) each.setAttribute("aria-hidden", "true"); // a count is nothing to listen to
    words.textContent = `${text} …`;
    line.append(spinner, words, seconds);
    place.replaceChildren(line);
    button.setAttribute("aria-busy", "true");
    const begun = performance.now();
    this.waiting = { line, button, timer: setInterval(() => { seconds.textContent = `${Math.round((performance.now() - begun) / 1000)} s`; }, 1000) };
  }

  idle() {
    if (!this.waiting) return;
    clearInterval(this.waiting.timer);
    this.waiting.line.remove();
    this.waiting.button.removeAttribute("aria-busy");
    this.waiting = null;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), 250);
  }

  async check() {
    this.asking?.abort();
    this.asking = new AbortController();
    try {
      const found = await ask("POST", "/api/steering/check", { config: this.values() }, { signal: this.asking.signal });
      this.showErrors(found.errors);
      if (found.memory) this.showMemory(found.memory);
    } catch { /* the server checks again when the form is sent */ }
  }

  showErrors(errors) {
    const wrong = new Map([...this.refused, ...errors.map((entry) => [entry.field.replace(/^config\./, ""), entry.message])]);
    for (const place of $$("[data-field]", this.form)) {
      const message = wrong.get(place.dataset.field) ?? "";
      const input = $("input, select, textarea", place);
      const shown = $("[data-error]", place);
      if (shown.textContent !== message) {
        shown.textContent = message;
        if (message) place.closest("details")?.setAttribute("open", ""); // what must be seen is not folded away
      }
      if (message) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
    const named = [...wrong.keys()].map((name) => $(`[data-field="${CSS.escape(name)}"] label`, this.form)?.textContent.trim() ?? name);
    const text = named.length ? `Still to be put right: ${named.join(", ")}.` : "";
    const place = $("[data-problems]", this.form);
    if (place.textContent !== text) place.textContent = text;
    const model = $("[name=model]", this.form).value.trim();
    $("[data-begin]", this.form).textContent = model ? `Load ${model} and start` : "Load the model and start";
  }

  showMemory(memory) {
    const box = $("[data-memory]", this.form);
    const text = $("[data-memory-text]", box), parts = $("[data-memory-parts]", box), ways = $("[data-memory-ways]", box);
    box.classList.toggle("tight", memory.known && !memory.fits);
    ways.replaceChildren();
    if (!memory.known) {
      text.textContent = "How much memory it needs is not known before its files are here. The check comes after the download, before anything is read.";
      parts.textContent = "";
      return;
    }
    const need = memory.needed;
    text.textContent = `${bytes(need.total)} at most in ${memory.precision}, ${bytes(memory.free)} free. ${memory.fits ? "It fits." : "It may not fit."}`;
    parts.textContent = `Weights ${bytes(need.weights)}, adapter and optimiser ${bytes(need.adapter)}, answers ${bytes(need.answers)}, learning ${bytes(need.learning)}, libraries ${bytes(need.libraries)}; with the longest prompts and answers that these options allow.`;
    $("[data-memory-bar]", box)?.setAttribute("width", Math.min(100, 100 * need.total / Math.max(memory.free, 1)).toFixed(1));
    for (const way of memory.would_fit) {
      const line = document.createElement("li");
      const what = Object.entries(way.change).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "quiet";
      button.textContent = `Use ${what}: ${bytes(way.total)}, which fits`;
      button.addEventListener("click", () => { this.set(way.change); Object.keys(way.change).forEach((name) => this.touch(name)); this.check(); });
      line.append(button);
      ways.append(line);
    }
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.fields().find((each) => each.name === name);
      if (!field) continue;
      if (field.type === "checkbox") field.checked = Boolean(value);
      else field.value = value ?? "";
    }
  }

  preset(index, link) {
    // What was typed by hand stays, and so do the model and the prompts; all else becomes what a preset means: its
    // options over the defaults.
    const values = { ...this.defaults, ...this.presets[index] };
    for (const name of Object.keys(values)) {
      if (this.touched.has(name) || name === "model" || name.startsWith("dataset.")) delete values[name];
    }
    this.set(values);
    $$(".presets a", this.root).forEach((each) => { each.classList.toggle("chosen", each === link); each.removeAttribute("aria-current"); });
    link.setAttribute("aria-current", "true");
    announce(`Preset ${link.textContent} is set.`);
    this.check();
  }

  showSource() {
    const source = $("[name='dataset.source']", this.form)?.value;
    const shown = { demo: ["source", "shuffle"], file: ["source", "id", "split", "column", "rows", "shuffle"] }[source];
    for (const place of $$("[data-field^='dataset.']", this.form)) {
      place.hidden = Boolean(shown) && !shown.includes(place.dataset.field.split(".")[1]);
    }
    $("[data-upload=prompts]", this.form).hidden = source === "hub";
  }

  takeUpload({ kind, name }) {
    if (kind !== "prompts") return;
    this.set({ "dataset.source": "file", "dataset.id": name });
    this.touch("dataset.source");
    this.touch("dataset.id");
    this.showSource();
    this.check();
    $("[data-preview]", this.form).click();
  }
}

export function bindSetup() {
  const root = $("[data-setup]");
  if (root) new Setup(root);
}
