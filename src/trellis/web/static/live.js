// The live parts of the pages: one event stream a tab, text set as text, forms kept working without this file.

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const LETTERS = "ABCDEFGH";

// ── Notices ──────────────────────────────────────────────────────────────────────────────────────

function toast(message, { more = "", error = false, kind = "" } = {}) {
  const box = document.createElement("div");
  box.className = `toast ${error ? "error" : kind}`;
  for (const text of [message, more].filter(Boolean)) {
    const line = document.createElement("p");
    line.textContent = text;
    box.append(line);
  }
  // A notice replaces the last one, and an error that it has made old.
  for (const old of $$(".toast")) old.remove();
  $(".toasts").append(box);
  setTimeout(() => box.remove(), error ? 9000 : 3000);
}

document.addEventListener("htmx:responseError", (event) => {
  if (event.detail.xhr.status === 404 && event.target.closest("[data-session]")) {
    // The session is gone, or this was never one: the first page knows what there is.
    setTimeout(() => { location.href = "/"; }, 2500);
  }
  let error = { message: "The studio could not do that.", next_step: "Try again." };
  try { error = JSON.parse(event.detail.xhr.responseText).error ?? error; } catch { /* not ours: the plain words stand */ }
  toast(error.message, { more: error.next_step, error: true });
});
document.addEventListener("htmx:sendError", () =>
  toast("The studio does not answer.", { more: "It is tried again by itself; nothing is lost.", error: true }));

document.addEventListener("submit", (event) => {
  const question = event.target.dataset?.confirm;
  if (question && !confirm(question)) event.preventDefault();
  else if ("once" in (event.target.dataset ?? {})) {
    // A second press of a button that starts something must not start two.
    if (event.target.dataset.sent) event.preventDefault();
    event.target.dataset.sent = "1";
  }
});
addEventListener("pageshow", () => $$("[data-once]").forEach((form) => delete form.dataset.sent));

// ── Streams ──────────────────────────────────────────────────────────────────────────────────────

/** An event stream that resumes after its last event, whatever cut it. `handlers` maps event names to functions. */
function follow(url, after, handlers, { onState = () => {} } = {}) {
  let source, timer, last = after, wait = 500, ended = false;
  const open = () => {
    source = new EventSource(last ? `${url}?after=${encodeURIComponent(last)}` : url);
    source.onopen = () => { wait = 500; onState(true); };
    source.onerror = () => {
      onState(false);
      if (ended || source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
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
  const close = () => { ended = true; clearTimeout(timer); source.close(); };
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted) { ended = false; open(); } });
  open();
  return close;
}

function showProgress(root, progress) {
  const percent = Math.round(progress.fraction * 100);
  const bar = $("[data-load]", root);
  if (!bar) return;
  bar.hidden = false;
  bar.removeAttribute("hidden");
  bar.setAttribute("aria-valuenow", percent);
  $("[data-load-bar]", bar).setAttribute("width", percent);
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function describeProgress(progress) {
  const parts = [progress.message];
  if (progress.bytes && progress.total_bytes) parts.push(`${megabytes(progress.bytes)} of ${megabytes(progress.total_bytes)}`);
  if (progress.rate) parts.push(`${megabytes(progress.rate)}/s`);
  if (progress.seconds_left > 1) parts.push(`${Math.round(progress.seconds_left)} s left`);
  return parts.join(" · ");
}

// ── The workbench ────────────────────────────────────────────────────────────────────────────────

class Workbench {
  constructor(root) {
    this.root = root;
    this.id = root.dataset.session;
    this.state = JSON.parse($("[data-state]", root).textContent);
    this.learned = null; // what the last click did, until the next one
    this.options = $$(".option", root);
    this.bindKeys();
    this.bindForms();
    this.bindTabs();
    addEventListener("resize", () => { $(".options-grid", root).style.minHeight = ""; });
    this.showAll();
    follow(`/api/steering/sessions/${this.id}/events`, root.dataset.after, {
      state: (state) => {
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
      node_added: (node) => this.nodeAdded(node),
      head_moved: (head) => this.headMoved(head),
      control: () => this.refresh("figures"),
      failed: ({ error, can_undo, can_redo }) => {
        Object.assign(this.state, { error, can_undo, can_redo, status: "failed", learning: null });
        this.showStatus();
        this.showChoice();
      },
      done: (_, close) => { close(); toast("This session was deleted."); setTimeout(() => { location.href = "/"; }, 1500); },
    }, { onState: (live) => { $("[data-connection]", root).hidden = live; } });
  }

  // What happened

  offerStarted(offer) {
    // The grid keeps its height while new answers grow, so that nothing moves under the hand.
    const grid = $(".options-grid", this.root);
    grid.style.minHeight = `${grid.offsetHeight}px`;
    const fresh = this.state.offer?.id !== offer.offer;
    this.state.offer = { id: offer.offer, node: offer.node, prompt: offer.prompt, options: offer.options, status: "streaming" };
    this.state.status = "offering";
    this.state.error = this.state.load = this.state.learning = null;
    this.showAll();
    if (fresh) this.flash();
  }

  optionDelta({ offer, index, text }) {
    if (this.state.offer?.id !== offer) return;
    this.state.offer.options[index].text += text;
    // A text node grows in place: nothing is parsed, nothing is laid out twice.
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
  }

  nodeAdded(node) {
    this.added = true; // the move of the head that follows is this one's, and has been told
    this.state.learning = null;
    if (!node.metrics) { this.learned = null; toast("Skipped. Nothing was learned."); return; }
    const percent = (share) => `${Math.round(share * 100)} %`;
    const { share_before: before, share_after: after } = node.metrics;
    const what = typeof node.choice === "number" ? LETTERS[node.choice]
      : node.choice === "none" ? "none of these" : node.choice?.written ? "your answer" : "your choice";
    const times = after / before;
    this.learned = times < 1.05 && times > 0.95
      ? `Learned: ${what} stays about as likely a choice (${percent(before)} → ${percent(after)}).`
      : `Learned: ${what} is now ${times.toFixed(1)} times as likely a choice (${percent(before)} → ${percent(after)}).`;
    toast(`Step ${node.step}: learned from ${what}.`, { kind: "learned" });
  }

  headMoved(head) {
    if (head.node !== this.state.head.node && !this.added) {
      this.learned = null;
      toast(head.step > this.state.head.step
        ? `On to step ${head.step}, where you have been before.`
        : `Back at step ${head.step}, with the options that were shown there.`);
    }
    this.added = false;
    Object.assign(this.state.head, { node: head.node, step: head.step });
    this.state.dataset.position = head.position;
    Object.assign(this.state, { can_undo: head.can_undo, can_redo: head.can_redo, learning: null, error: null, status: "offering" });
    this.showStatus();
    this.refresh("tree", "figures");
  }

  // What is shown

  showAll() {
    const { offer } = this.state;
    if (offer) {
      $("[data-prompt]", this.root).textContent = offer.prompt;
      const edit = $("#edit-text");
      if (!$("[data-edit]", this.root).open) edit.value = offer.prompt;
      $("#choose [name=offer]", this.root).value = offer.id;
      // An answer that is being written belongs to the offer that it was begun for.
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
      ? `${option.tokens} tokens${option.finish === "length" ? ", cut" : ""} · ${Math.round(likely)} % sure` : "";
    $("[data-likely]", card).setAttribute("width", likely.toFixed(1));
  }

  showChoice() {
    const choice = this.state.learning?.choice;
    const chosen = Array.isArray(choice) ? choice : [choice];
    this.options.forEach((card, index) => card.classList.toggle("chosen", chosen.includes(index)));
    $(".options-grid", this.root).classList.toggle("none-chosen", choice === "none");
  }

  showStatus() {
    const { status, error, load, learning } = this.state;
    this.root.dataset.status = status;
    const strip = $("[data-strip]", this.root);
    const words = {
      loading: (learning ? "Your choice is kept. " : "") + (load ? describeProgress(load) : "Getting the model ready"),
      offering: this.learned ? `${this.learned} Writing the next options` : "Writing the options",
      learning: "Learning from your choice",
      ready: this.learned ?? "Choose the answer you like best.",
      failed: error ? `${error.message} ${error.next_step}` : "",
    };
    strip.dataset.kind = this.learned && (status === "ready" || status === "offering") ? "learned" : status;
    $("[data-strip-text]", strip).textContent = words[status] ?? "";
    $("[data-load]", strip).toggleAttribute("hidden", !load);
    if (load) showProgress(strip, load);
    $("[data-resume]", strip).hidden = status !== "failed";
    $("[data-engine-text]").textContent = `${this.state.config.model} · ${status}`;
    const can = {
      ready: status === "ready", undo: this.state.can_undo && status !== "learning", redo: this.state.can_redo && status !== "learning",
      skip: Boolean(this.state.offer) && ["ready", "offering", "failed"].includes(status),
    };
    $$("[data-needs]", this.root).forEach((button) => { button.disabled = !can[button.dataset.needs]; });
    $$(".letter", this.root).forEach((button) => { button.disabled = !can.ready; });
    this.root.setAttribute("aria-busy", String(status !== "ready" && status !== "failed"));
    if (this.state.dataset && this.state.offer) {
      const position = $("[data-position]", this.root);
      position.textContent = `${this.state.dataset.position + 1} of ${this.state.dataset.total}`;
    }
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

  // What a person does

  bindForms() {
    // Each action has a name of its own, so that a press that is sent twice is done once.
    const name = () => $$("[name=request]", this.root).forEach((input) => { input.value = crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0"); });
    this.root.addEventListener("htmx:afterRequest", (event) => {
      name();
      if (!event.detail.successful) { this.showChoice(); this.showStatus(); return; }
      for (const details of $$("[data-edit], [data-write]", this.root)) {
        if (details.contains(event.target)) { details.open = false; $("textarea", details).value = ""; }
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
      const card = event.target.closest(".option");
      if (!card || event.target.closest("button") || String(getSelection())) return;
      $(".letter", card).click();
    });
    for (const details of $$("[data-edit], [data-write]", this.root)) {
      details.addEventListener("toggle", () => {
        if (details.open) $("textarea", details).focus();
        else { $("summary", details).focus(); this.showAll(); }
      });
    }
    name();
  }

  bindKeys() {
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { $$("details[open]", this.root).forEach((details) => { details.open = false; }); return; }
      if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
      if (event.target.closest("input, textarea, select, [contenteditable]")) return;
      const place = $(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`, this.root);
      if (!place || place.disabled) return;
      event.preventDefault();
      place.click();
    });
  }

  bindTabs() {
    for (const tab of $$("[data-tab]", this.root)) {
      tab.addEventListener("click", () => {
        this.root.dataset.view = tab.dataset.tab;
        $$("[data-tab]", this.root).forEach((other) => other.setAttribute("aria-pressed", String(other === tab)));
      });
    }
  }
}

// ── The models ───────────────────────────────────────────────────────────────────────────────────

const followed = new Map();

function followLoads() {
  for (const card of $$("[data-job]")) {
    const job = card.dataset.job;
    if (followed.has(job)) continue;
    const ended = (error) => (data, close) => {
      close();
      followed.delete(job);
      if (error && data.error) toast(data.error.message, { more: data.error.next_step, error: true });
      htmx.trigger("#cards", "trellis:models");
    };
    followed.set(job, follow(`/api/jobs/${job}/events`, null, {
      progress: (progress) => {
        const now = $(`[data-job="${CSS.escape(job)}"]`);
        if (!now) return;
        $("[data-progress-text]", now).textContent = describeProgress(progress);
        showProgress(now, progress);
      },
      done: ended(false), failed: ended(true), cancelled: ended(false),
    }));
  }
}

const workbench = $("[data-session]");
if (workbench) new Workbench(workbench);
if ($("#cards")) {
  followLoads();
  document.addEventListener("htmx:afterSettle", followLoads);
}
