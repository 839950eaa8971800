// The messages of a chat: what is known of each, how its text grows on the page, and the HTML that the server makes of it.

import { points } from "./composer.js";
import { $, $$, make, toast } from "../page.js";

const from = (text, start) => (start <= 0 ? text : [...text].slice(start).join(""));

export class Messages {
  constructor(thread, room, { onArrived, onChange, onGap }) {
    Object.assign(this, { thread, room, onArrived, onChange, onGap, after: 0 });
    this.known = new Map(); // of each: its state, how long it is, how much of it is in whole blocks, the text after those
    this.growing = new Set();
    this.sources = new Map(); // the HTML that was last fetched of each
    this.changed = new Set();
    this.fetches = Promise.resolve();
    this.showsAll = new URLSearchParams(location.search).has("all");
    document.addEventListener("htmx:afterSwap", (event) => {
      if (event.detail.target !== thread) return;
      this.showsAll = true; // the only part that is swapped here is all of it
      this.read();
    });
  }

  element(id) { return $(`[data-message="${CSS.escape(id)}"]`, this.thread); }

  /** Take over what the server has rendered into the thread. */
  read() {
    this.after = Math.max(this.after, Number($("[data-thread-state]", this.thread)?.dataset.after ?? 0));
    this.growing.clear();
    for (const element of $$("[data-message]", this.thread)) this.readOne(element);
    this.onChange();
  }

  readOne(element) {
    const { message: id, state, shown, length, request } = element.dataset;
    if (request) this.onArrived(request); // even where its event was missed
    const known = this.known.get(id);
    const fetched = { state, shown: Number(shown), length: Number(length), tail: $("[data-tail]", element)?.textContent ?? "" };
    // What came over the connection while this was fetched is newer than what was fetched.
    if (known && known.length > fetched.length && known.state === "growing") this.patch(element, known, fetched);
    else if (!known || known.state === "growing" || state !== "growing") this.known.set(id, fetched);
    if (state === "growing" && this.known.get(id).state === "growing") this.growing.add(id);
    if (state === "growing" && known && known.state !== "growing") this.fetch(id); // it has ended since
    this.addCopyButtons(element);
  }

  patch(element, known, fetched) {
    const blocks = (known.blocks ?? []).filter((block) => block.shown > fetched.shown);
    for (const block of blocks) $("[data-blocks]", element).insertAdjacentHTML("beforeend", block.html);
    $("[data-tail]", element).textContent = known.tail;
  }

  addCopyButtons(root) {
    for (const code of $$("pre", root)) {
      if (code.dataset.copies) continue;
      code.dataset.copies = "1";
      code.tabIndex = 0;
      const button = make("button", { type: "button", className: "copy-code", textContent: "Copy" }), frame = make("div", { className: "code-frame" });
      button.dataset.copyCode = "";
      if (code.dataset.lang) frame.dataset.lang = code.dataset.lang;
      code.replaceWith(frame);
      frame.append(code, button);
    }
  }

  // ── Events ────────────────────────────────────────────────────────────────────────────────────────

  add({ message, seq }) {
    this.onArrived(message.request);
    const known = this.known.get(message.id);
    if (known && seq && known.seq > seq) return;
    const tail = from(message.text, message.shown);
    this.known.set(message.id, { state: message.state, shown: message.shown, length: points(message.text), tail, blocks: [], seq });
    if (message.state === "growing") this.growing.add(message.id); else this.growing.delete(message.id);
    this.onChange();
    this.fetch(message.id);
  }

  /** Append text at a place. Text that is there already is not added again; a gap is reported. */
  append({ message: id, text, at }) {
    const known = this.known.get(id);
    if (!known) return;
    const size = points(text);
    if (at + size <= known.length) return;
    if (at > known.length) { this.onGap(); return; }
    const more = from(text, known.length - at);
    known.length = at + size;
    known.tail += more;
    const element = this.element(id);
    if (!element) return;
    const tail = $("[data-tail]", element);
    // A text node grows in place: nothing is parsed, nothing is laid out twice.
    if (tail.firstChild?.nodeType === Node.TEXT_NODE) tail.firstChild.appendData(more); else tail.append(more);
    const growth = $("[data-growth]", element);
    if (growth?.textContent) growth.textContent = "";
    this.onChange();
  }

  addBlock({ message: id, html, shown }) {
    const known = this.known.get(id);
    if (!known || shown <= known.shown) return;
    if (shown > known.length) { this.onGap(); return; }
    known.tail = from(known.tail, shown - known.shown);
    known.shown = shown;
    (known.blocks ??= []).push({ html, shown });
    const element = this.element(id);
    if (!element) return;
    const blocks = $("[data-blocks]", element);
    blocks.insertAdjacentHTML("beforeend", html); // sanitised by the server
    $("[data-tail]", element).textContent = known.tail;
    this.addCopyButtons(blocks);
    this.onChange();
  }

  showProgress({ message: id, stage, fraction, told, place, left_out: leftOut }) {
    const element = this.element(id);
    if (!element || this.known.get(id)?.length) return;
    const percent = `${Math.round(fraction * 100)}%`;
    $("[data-growth]", element).textContent = stage === "queued"
      ? (place === 1 ? "Queued: you're next" : `Queued: ${place - 1} before you`)
      : stage === "prompt"
        ? (fraction < 1 ? `Processing prompt ${percent}` : leftOut ? `Leaving out the ${leftOut} oldest messages…` : "Generating…")
        : `${told ?? "Loading the model"} ${percent}`;
    this.onChange();
  }

  end(id) {
    const known = this.known.get(id);
    if (known) known.state = "done";
    this.growing.delete(id);
    this.onChange();
    this.fetch(id);
  }

  showTraining({ message: id, session, url }) {
    toast(`Training “${session}” on this answer`);
    const message = this.element(id), note = message && $("[data-taught]", message);
    if (!note) return;
    $(".teach", message)?.removeAttribute("open");
    note.replaceChildren(`Training “${session}” on this answer. `, make("a", { href: url, textContent: "Show progress" }));
    note.hidden = false;
  }

  // ── HTML of the server ────────────────────────────────────────────────────────────────────────────

  /** Fetch changed messages one after the other, so that an answer stands under what it answers; many at once as a whole thread. */
  fetch(id) {
    this.changed.add(id);
    clearTimeout(this.changeTimer);
    this.changeTimer = setTimeout(() => {
      const changed = this.changed;
      this.changed = new Set();
      this.fetches = this.fetches.then(async () => {
        if (changed.size > 8) await this.fetchThread();
        else for (const each of changed) await this.fetchTurn(each);
      }).catch(() => { /* the page shows that the connection is gone; what is missing comes when it is back */ });
    }, 15);
  }

  /** Fetch one place in the thread, or the whole thread where the branch is another one. */
  async fetchTurn(id) {
    const answer = await fetch(`/chat/${this.room}/messages/${id}`, { headers: { "hx-request": "true" } });
    if (!answer.ok) return;
    const source = await answer.text();
    if (this.sources.get(id) === source && this.element(id)) return;
    const turn = $("[data-turn]", make("template", { innerHTML: source }).content);
    const old = this.element(id)?.closest("[data-turn]")
      ?? (turn.dataset.group && $(`[data-group="${CSS.escape(turn.dataset.group)}"]`, this.thread));
    const last = $$("[data-turn]", this.thread).at(-1);
    this.sources.set(id, source);
    if (old) this.replace(old, turn);
    else if ((last?.dataset.turn ?? "") === turn.dataset.parent && !turn.querySelector(".aside:only-child")) {
      $(".no-messages", this.thread)?.remove();
      this.thread.append(turn);
      this.process(turn);
    } else await this.fetchThread();
  }

  replace(old, turn) {
    if ($(".edit-message[open]", old)) { this.updateText(old, turn); return; } // an open editor keeps what was typed
    const open = new Set($$(".thought[open]", old).map((each) => $$(".thought", old).indexOf(each)));
    const focus = document.activeElement?.dataset?.focus;
    old.replaceWith(turn);
    $$(".thought", turn).forEach((each, place) => { each.open = open.has(place); });
    this.process(turn);
    if (focus) $(`[data-focus="${CSS.escape(focus)}"]`, turn)?.focus({ preventScroll: true });
  }

  updateText(old, turn) {
    for (const fresh of $$("[data-message]", turn)) {
      const place = $(`[data-message="${CSS.escape(fresh.dataset.message)}"]`, old);
      if (!place) continue;
      for (const part of ["[data-blocks]", "[data-tail]"]) {
        const here = $(part, place), there = $(part, fresh);
        if (here && there) here.replaceChildren(...there.childNodes);
      }
    }
  }

  process(turn) {
    htmx.process(turn);
    for (const element of $$("[data-message]", turn)) this.readOne(element);
    this.onChange();
  }

  async fetchThread() {
    const answer = await fetch(`/chat/${this.room}/thread${this.showsAll ? "?all=true" : ""}`, { headers: { "hx-request": "true" } });
    if (!answer.ok || answer.redirected) return;
    this.sources.clear();
    this.thread.innerHTML = await answer.text();
    htmx.process(this.thread);
    this.read();
  }
}
