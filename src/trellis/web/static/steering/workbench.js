// The workbench of steering: shows events as they arrive; each key and button does one thing.

import { factor, number, percent } from "../numbers.js";
import { $, $$, LETTERS, announce, ask, toast } from "../page.js";
import { describeProgress, follow, showProgress } from "../streams.js";

const ENGINE = { loading: "loading", offering: "generating", learning: "learning", ready: "ready", failed: "error" };
const stepName = (step) => step ? `step ${number(step)}` : "the base model";

export class Workbench {
  constructor(root) {
    this.root = root;
    this.id = root.dataset.session;
    this.state = JSON.parse($("[data-state]", root).textContent);
    this.learned = null; // what the last choice did, until the next one
    this.marks = []; // ticked options, in the order of ticking
    this.options = $$(".option", root);
    this.bindKeys();
    this.bindForms();
    this.bindTabs();
    this.bindMarks();
    this.keepDrafts();
    $("#tree").addEventListener("htmx:afterSwap", () => this.showHead());
    this.showHead();
    addEventListener("resize", () => { $(".options-grid", root).style.minHeight = ""; });
    this.showAll();
    follow(`/api/steering/sessions/${this.id}/events`, root.dataset.after, {
      state: (state) => {
        if (state.offer?.id !== this.state.offer?.id) this.clearMarks();
        this.state = state;
        document.title = `${state.name} · Trellis`;
        this.showAll();
        this.refresh("tree", "figures");
      },
      load_progress: (progress) => { this.state.load = progress; this.state.status = "loading"; this.showStatus(); },
      offer_started: (offer) => this.offerStarted(offer),
      option_delta: (delta) => this.optionDelta(delta),
      offer_ready: (ready) => this.offerReady(ready),
      learning: (what) => { this.state.learning = what; this.state.status = "learning"; this.learned = null; this.showStatus(); this.showChoice(); },
      queued: ({ place }) => { this.state.queue = place; this.showStatus(); },
      engine: ({ state }) => { this.state.engine = state; this.showStatus(); },
      notice: ({ message }) => toast(message),
      node_named: () => this.refresh("tree"),
      node_added: (node) => this.nodeAdded(node),
      head_moved: (head) => this.headMoved(head),
      control: () => this.refresh("figures"),
      assessed: () => this.refresh("figures"),
      node_fitted: () => { toast("Training finished. New step added.", { kind: "learned" }); this.refresh("tree"); },
      failed: ({ error, can_undo, can_redo }) => {
        Object.assign(this.state, { error, can_undo, can_redo, status: "failed", learning: null });
        this.showStatus();
        this.showChoice();
        announce(`${error.message} ${error.next_step}`);
      },
      done: (_, close) => { close(); toast("Session deleted"); setTimeout(() => { location.href = "/"; }, 1500); },
    }, {
      onState: (live) => { $("[data-connection]", root).hidden = live; },
      poll: async () => {
        const before = JSON.stringify(this.state);
        const state = await ask("GET", `/api/steering/sessions/${this.id}`);
        if (JSON.stringify(state) === before) return false;
        const moved = state.head.node !== this.state.head.node;
        if (state.offer?.id !== this.state.offer?.id) this.clearMarks();
        this.state = state;
        this.showAll();
        if (moved) this.refresh("tree", "figures");
        return true;
      },
    });
  }

  // Events

  offerStarted(offer) {
    // Keep the height of the last answers while new ones grow, so that nothing moves under the pointer: at most half
    // the screen, and not the height of all answers before.
    const grid = $(".options-grid", this.root);
    grid.style.minHeight = "";
    grid.style.minHeight = `${Math.min(grid.offsetHeight, innerHeight / 2)}px`;
    const fresh = this.state.offer?.id !== offer.offer;
    this.state.offer = { id: offer.offer, node: offer.node, prompt: offer.prompt, options: offer.options, status: "streaming" };
    this.state.status = "offering";
    this.state.error = this.state.load = this.state.learning = null;
    if (fresh) this.clearMarks();
    this.showAll();
    if (fresh) this.flash();
  }

  optionDelta({ offer, index, text }) {
    if (this.state.offer?.id !== offer) return;
    this.state.offer.options[index].text += text;
    // Append to the text node: nothing is parsed again.
    const place = $("[data-text]", this.options[index]);
    if (place.firstChild?.nodeType === Node.TEXT_NODE) place.firstChild.appendData(text);
    else place.append(text);
  }

  offerReady({ offer, options }) {
    if (this.state.offer?.id !== offer) return;
    Object.assign(this.state.offer, { options, status: "ready" });
    this.state.status = "ready";
    this.showAll();
    this.refresh("figures");
    const shown = options.filter((option) => (option.equal ?? [option.index])[0] === option.index).length;
    announce(`${this.learned ? `${this.learned} ` : ""}${shown} new answer${shown === 1 ? "" : "s"}.`);
  }

  nodeAdded(node) {
    this.added = true; // the head_moved event that follows needs no notice
    this.state.learning = null;
    if (!node.metrics) { this.learned = null; toast("Skipped"); return; }
    const { share_before: before, share_after: after } = node.metrics, times = after / before;
    const what = node.choice === "none" ? "None of these" : node.choice?.written ? "Your answer" : "Your last pick";
    const change = times > 0.95 && times < 1.05 ? "little change" : factor(times);
    this.learned = node.choice === "none" && times >= 1.05
      ? "Learned. Answers like these are now less likely."
      : `Learned. ${what}: ${percent(before)} → ${percent(after)} (${change}).`;
  }

  headMoved(head) {
    if (head.node !== this.state.head.node && !this.added) {
      this.learned = null;
      toast(`${head.step > this.state.head.step ? "Moved" : "Back"} to ${stepName(head.step)}`);
    }
    this.added = false;
    Object.assign(this.state.head, { node: head.node, step: head.step });
    this.state.dataset.position = head.position;
    Object.assign(this.state, { can_undo: head.can_undo, can_redo: head.can_redo, learning: null, error: null, status: "offering" });
    this.showStatus();
    this.refresh("tree", "figures");
  }

  // Rendering

  showAll() {
    const { offer } = this.state;
    if (offer) {
      $("[data-prompt]", this.root).textContent = offer.prompt;
      const edit = $("#edit-text");
      if (!$("[data-edit]", this.root).open) edit.value = offer.prompt;
      $("#choose [name=offer]", this.root).value = offer.id;
      // An answer being written belongs to the offer that it was started for.
      if (!$("[data-write]", this.root).open) $("[data-write] [name=offer]", this.root).value = offer.id;
      offer.options.forEach((option, index) => this.showOption(option, this.options[index]));
    }
    this.showStatus();
    this.showChoice();
  }

  showOption(option, card) {
    if (!card) return;
    const place = $("[data-text]", card);
    if (place.textContent !== option.text) place.textContent = option.text;
    place.classList.toggle("growing", !option.finish && this.state.status !== "failed");
    const likely = option.tokens ? 100 * Math.exp(option.logprob / option.tokens) : 0;
    $("[data-length]", card).textContent = option.finish
      ? `${number(option.tokens)} tokens · avg. confidence ${percent(likely / 100)}${option.finish === "length" ? "; truncated" : ""}` : "";
    $("[data-likely]", card).setAttribute("width", likely.toFixed(1));
    // Identical answers are shown once, with how often they were generated.
    const equal = option.equal ?? [option.index];
    card.hidden = equal[0] !== option.index;
    const times = $("[data-times]", card);
    times.hidden = equal.length === 1;
    times.textContent = `×${equal.length}`;
    times.title = equal.length > 1 ? `Generated ${equal.length} times: ${equal.map((each) => LETTERS[each]).join(", ")}` : "";
  }

  showChoice() {
    const choice = this.state.learning?.choice;
    const chosen = Array.isArray(choice) ? choice : choice?.ranking ?? [choice];
    this.options.forEach((card, index) => card.classList.toggle("chosen", chosen.includes(index)));
    $(".options-grid", this.root).classList.toggle("none-chosen", choice === "none");
  }

  showStatus() {
    const { status, error, load, learning, queue } = this.state;
    const turn = !queue ? "" : queue === 1 ? ". Queued: you're next" : `. Queued: ${number(queue - 1)} ahead of you`;
    this.root.dataset.status = status;
    const strip = $("[data-strip]", this.root);
    const words = {
      loading: (learning ? "Choice saved. " : "") + (load ? describeProgress(load) : "Loading the model"),
      offering: (this.learned ? `${this.learned} Generating answers` : "Generating answers") + turn,
      learning: `Learning from your choice${turn}`,
      ready: this.learned ?? "Choose the answer you like best.",
      failed: error ? `${error.message} ${error.next_step}` : "",
    };
    strip.dataset.kind = this.learned && (status === "ready" || status === "offering") ? "learned" : status;
    $("[data-strip-text]", strip).textContent = words[status] ?? "";
    $("[data-load]", strip).toggleAttribute("hidden", !load);
    if (load) showProgress(strip, load);
    $("[data-resume]", strip).hidden = status !== "failed";
    const stuck = status === "failed" && !this.state.offer;
    $("[data-stuck]", this.root).hidden = !stuck;
    for (const part of ["[data-prompt-card]", "[data-choose]", ".actions"]) $(part, this.root).hidden = stuck;
    const asleep = this.state.engine === "unloaded" && status === "ready";
    $("[data-engine-text]").textContent = `${this.state.config.model} · ${asleep ? "unloaded" : ENGINE[status]}`;
    $("[data-engine]").classList.toggle("asleep", asleep);
    const can = {
      ready: status === "ready", marked: status === "ready" && this.marks.length > 0, ranked: status === "ready" && this.marks.length > 1, undo: this.state.can_undo && status !== "learning", redo: this.state.can_redo && status !== "learning",
      skip: Boolean(this.state.offer) && ["ready", "offering", "failed"].includes(status),
    };
    $$("[data-needs]", this.root).forEach((button) => { button.disabled = !can[button.dataset.needs]; });
    $$(".letter", this.root).forEach((button) => { button.disabled = !can.ready; });
    $$("[data-mark], [data-edit-answer]", this.root).forEach((each) => { each.disabled = !can.ready; });
    this.root.setAttribute("aria-busy", String(status !== "ready" && status !== "failed"));
    if (this.state.dataset?.notes) {
      $("[data-notes]", this.root).hidden = !this.state.dataset.notes.length;
      $("[data-notes-list]", this.root).replaceChildren(...this.state.dataset.notes.map((note) => {
        const item = document.createElement("li");
        item.textContent = note;
        return item;
      }));
    }
    if (this.state.dataset && this.state.offer) {
      const position = $("[data-position]", this.root);
      position.textContent = `${number(this.state.dataset.position + 1)} of ${this.state.dataset.total == null ? "…" : number(this.state.dataset.total)}`;
    }
  }

  /** Scroll the tree to the current step, where the tree has a scroll bar of its own. */
  showHead() {
    const plant = $(".plant", this.root), head = $("[aria-current]", plant);
    if (head) plant.scrollTop += head.getBoundingClientRect().top - plant.getBoundingClientRect().top - plant.clientHeight / 2;
  }

  flash() {
    const card = $("[data-prompt-card]", this.root);
    card.classList.remove("flash");
    requestAnimationFrame(() => card.classList.add("flash"));
  }

  refresh(...parts) {
    for (const part of parts) {
      clearTimeout(this[`timer_${part}`]);
      this[`timer_${part}`] = setTimeout(() => htmx.trigger(`#${part}`, `trellis:${part}`), 60);
    }
  }

  // User actions

  bindForms() {
    this.root.addEventListener("htmx:afterRequest", (event) => {
      if (!event.detail.successful) { this.showChoice(); this.showStatus(); return; }
      if (event.target.matches("[data-keep]")) this.refresh("tree"); // it may still show an earlier step
      for (const details of $$("[data-edit], [data-write]", this.root)) {
        if (details.contains(event.target)) { details.open = false; $("textarea", details).value = ""; this.dropDrafts(); }
      }
    });
    this.root.addEventListener("htmx:beforeRequest", (event) => {
      const pressed = event.detail.requestConfig?.triggeringEvent?.submitter;
      if (pressed?.classList.contains("letter")) {
        this.options.forEach((card) => card.classList.toggle("chosen", card.contains(pressed)));
        $$(".letter, [data-needs]", this.root).forEach((button) => { button.disabled = true; });
      }
    });
    this.root.addEventListener("click", (event) => {
      if (event.target.closest("[data-close]")) { event.target.closest("details").open = false; return; }
      const edited = event.target.closest("[data-edit-answer]");
      if (edited) { this.editAnswer(Number(edited.dataset.editAnswer)); return; }
      const card = event.target.closest(".option");
      if (!card || event.target.closest("button, label, input") || String(getSelection())) return;
      $(".letter", card).click();
    });
    for (const details of $$("[data-edit], [data-write]", this.root)) {
      details.addEventListener("toggle", () => {
        if (details.open) $("textarea", details).focus();
        else { $("summary", details).focus(); this.showAll(); }
      });
    }
  }

  bindKeys() {
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { $$("details[open]", this.root).forEach((details) => { details.open = false; }); return; }
      const box = event.target.closest("textarea");
      if (box && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        $(".primary:not(:disabled)", box.form)?.click();
        return;
      }
      if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
      const typing = event.target.closest("input, textarea, select, [contenteditable]");
      if (typing && typing.type !== "checkbox") return;
      if (event.shiftKey) {
        const mark = $(`[data-mark="${CSS.escape(event.key.toLowerCase())}"]`, this.root);
        if (mark && !mark.disabled && !mark.closest("[hidden]")) { event.preventDefault(); mark.click(); }
        return;
      }
      const place = $(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`, this.root);
      if (!place || place.disabled || place.closest("[hidden]")) return;
      event.preventDefault();
      place.click();
    });
  }

  bindTabs() {
    const show = (view) => {
      this.root.dataset.view = view;
      $$("[data-tab]", this.root).forEach((tab) => {
        if (tab.dataset.tab === view) tab.setAttribute("aria-current", "true");
        else tab.removeAttribute("aria-current");
      });
    };
    for (const tab of $$("[data-tab]", this.root)) {
      tab.addEventListener("click", (event) => {
        event.preventDefault();
        if (this.root.dataset.view === tab.dataset.tab) return;
        history.pushState({}, "", tab.href);
        show(tab.dataset.tab);
      });
    }
    addEventListener("popstate", () => show(new URLSearchParams(location.search).get("view") ?? "answers"));
  }

  // Ticks and rankings

  bindMarks() {
    $$("[data-mark]", this.root).forEach((box, index) => {
      box.checked = false;
      // Enter would submit the form with its first button: an unintended choice.
      box.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); box.click(); } });
      box.addEventListener("change", () => {
        this.marks = this.marks.filter((mark) => mark !== index);
        if (box.checked) this.marks.push(index);
        this.showMarks();
      });
    });
    $("[data-clear]", this.root).addEventListener("click", () => this.clearMarks());
    $$("[data-edit-answer]", this.root).forEach((button) => { button.hidden = false; });
    this.showMarks();
  }

  clearMarks() {
    this.marks = [];
    this.showMarks();
  }

  showMarks() {
    $$("[data-mark]", this.root).forEach((box, index) => {
      const rank = this.marks.indexOf(index);
      box.checked = rank >= 0;
      this.options[index].classList.toggle("marked", rank >= 0);
      $("[data-rank]", box.parentElement).textContent = rank >= 0 ? rank + 1 : "";
    });
    $("[data-order]", this.root).value = this.marks.join(",");
    const letters = this.marks.map((index) => LETTERS[index]);
    $("[data-marked-text]", this.root).textContent = letters.length ? `Ticked: ${letters.join(" › ")}` : "";
    $("[data-clear]", this.root).hidden = !letters.length;
    this.root.classList.toggle("marking", letters.length > 0);
    this.showStatus();
  }

  /** Start a written answer from the text of an option. */
  editAnswer(index) {
    const details = $("[data-write]", this.root);
    details.open = true;
    const place = $("textarea", details);
    place.value = this.state.offer.options[index].text;
    place.focus();
    place.setSelectionRange(place.value.length, place.value.length);
    this.saveDraft();
  }

  // Drafts, which survive a reload

  get draftKey() { return `draft-${this.id}`; }

  keepDrafts() {
    for (const details of $$("[data-edit], [data-write]", this.root)) {
      $("textarea", details).addEventListener("input", () => this.saveDraft());
      details.addEventListener("toggle", () => { if (!details.open) this.dropDrafts(); });
    }
    try {
      const kept = JSON.parse(sessionStorage.getItem(this.draftKey) ?? "null");
      if (kept && kept.offer === this.state.offer?.id) {
        const details = $(kept.write ? "[data-write]" : "[data-edit]", this.root);
        details.open = true;
        $("textarea", details).value = kept.text;
      } else this.dropDrafts();
    } catch { /* storage is forbidden: no drafts */ }
  }

  saveDraft() {
    const details = $$("[data-edit], [data-write]", this.root).find((each) => each.open);
    if (!details) return;
    const kept = { offer: this.state.offer?.id, write: details.matches("[data-write]"), text: $("textarea", details).value };
    try { sessionStorage.setItem(this.draftKey, JSON.stringify(kept)); } catch { /* full or forbidden */ }
  }

  dropDrafts() {
    try { sessionStorage.removeItem(this.draftKey); } catch { /* forbidden */ }
  }
}
