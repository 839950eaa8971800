// The form of all options: checked while it is filled in, with the memory it would take and what would fit.

import { size } from "../numbers.js";
import { $, $$, ask } from "../page.js";

/** `Must be 5 or less.`, from `must be 5 or less, got “9”.`: the field shows its name and its value itself. */
const besideField = (message) => message[0].toUpperCase() + message.slice(1).replace(/, got (“[^”]*”|nothing|a very large number)\.$/, ".");

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
    preview.addEventListener("htmx:beforeRequest", () => this.wait($("#preview", this.form), preview, "Reading prompts"));
    preview.addEventListener("htmx:afterRequest", (event) => { this.idle(); if (!event.detail.successful) $("#preview", this.form).replaceChildren(); });
    $$("[data-group] select[name='dataset.source']", this.form).forEach((select) => select.addEventListener("change", () => this.showSource()));
    document.addEventListener("trellis:uploaded", ({ detail }) => this.takeUpload(detail));
    $$(".presets button", root).forEach((button, index) => button.addEventListener("click", (event) => { event.preventDefault(); this.preset(index, button); }));
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
      const text = field.tagName === "TEXTAREA" || (field.type === "text" && !("number" in field.dataset));
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
    this.wait($("[data-beginning]", this.form), $("[data-begin]", this.form), hub ? "Checking options and the Hugging Face dataset" : "Checking options and prompts");
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
    const wrong = new Map([...this.refused, ...errors.map((entry) => [entry.field.replace(/^config\./, ""), besideField(entry.message)])]);
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
    const text = wrong.size ? `Needs fixing: ${this.titles([...wrong.keys()])}` : "";
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
      text.textContent = "Checked after the download, before anything loads.";
      parts.textContent = "";
      return;
    }
    const need = memory.needed;
    text.textContent = `${size(need.total)} needed (${memory.precision}), ${size(memory.free)} free: ${memory.fits ? "fits" : "may not fit"}.`;
    parts.textContent = `At most: weights ${size(need.weights)}, adapter and optimizer ${size(need.adapter)}, answers ${size(need.answers)}, learning ${size(need.learning)}, libraries ${size(need.libraries)}.`;
    $("[data-memory-bar]", box)?.setAttribute("width", Math.min(100, 100 * need.total / Math.max(memory.free, 1)).toFixed(1));
    for (const way of memory.would_fit) {
      const line = document.createElement("li");
      const what = Object.entries(way.change).map(([name, value]) => name === "precision" ? value : `${this.titles([name])} ${value}`).join(", ");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "quiet";
      button.textContent = `Use ${what}: ${size(way.total)}, fits`;
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

  titles(names) {
    return names.map((name) => $(`[data-field="${CSS.escape(name)}"] label`, this.form)?.textContent.trim() ?? name).join(", ");
  }

  preset(index, button) {
    // What was typed by hand stays, and so do the prompts; all else becomes what the preset means: its options over the
    // defaults.
    const wanted = this.fields().map((each) => each.name).filter((name) => name in this.presets[index]);
    const values = { ...this.defaults, ...this.presets[index] };
    for (const name of Object.keys(values)) {
      if (this.touched.has(name) || name.startsWith("dataset.")) delete values[name];
    }
    this.set(values);
    for (const name of wanted.filter((each) => each in values && values[each] !== this.defaults[each])) $(`[data-field="${CSS.escape(name)}"]`, this.form)?.closest("details")?.setAttribute("open", "");
    $("[name=under]", this.form).value = button.value;
    $$(".presets button", this.root).forEach((each) => { each.classList.toggle("chosen", each === button); each.setAttribute("aria-pressed", each === button); });
    const notes = [["Set by the preset", (name) => name in values], ["Kept as you set them", (name) => !(name in values)]];
    $("[data-preset-note]", this.root).textContent = notes.map(([what, fits]) => [what, wanted.filter(fits)]).filter(([, names]) => names.length).map(([what, names]) => `${what}: ${this.titles(names)}.`).join(" ");
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
