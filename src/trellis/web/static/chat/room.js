// A room: words that grow as they come, a line that comes back by itself, and nothing that is sent twice or lost.

import { Line } from "./connection.js";
import { bindSteps, bindWriting, Draft, Files, isComposing, isTooLong, newId, points } from "./composer.js";
import { $, $$, announce, copyText, toast } from "../page.js";

const from = (text, start) => (start <= 0 ? text : [...text].slice(start).join(""));

export class Chat {
  constructor(root) {
    this.root = root;
    this.room = root.dataset.room;
    this.thread = $("[data-thread]", root);
    this.scroller = $("[data-scroller]", root);
    this.composer = $("[data-composer]", root);
    this.say = $("[data-say]", root);
    this.messages = new Map(); // what is known of each: text after the whole blocks, how much there is of it, its state
    this.growing = new Set();
    this.follows = true;
    this.sources = new Map(); // the HTML that was last fetched of each
    this.readThread();
    this.bindComposer();
    this.bindThread();
    this.bindScroll();
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.line = new Line(`${scheme}://${location.host}/ws/chat/${this.room}`, this.after, {
      onEvent: (event) => this.take(event), onState: (state) => this.showState(state),
    });
    this.showOutbox();
    this.toEnd();
  }

  // ── What is on the page ───────────────────────────────────────────────────────────────────────────

  /** Take over what the server has written into the thread. */
  readThread() {
    const after = Number($("[data-thread-state]", this.thread)?.dataset.after ?? 0);
    this.after = Math.max(this.after ?? 0, after);
    this.growing.clear();
    for (const element of $$("[data-message]", this.thread)) this.readMessage(element);
    this.showStop();
  }

  readMessage(element) {
    const { message: id, state, shown, length, request } = element.dataset;
    if (request) this.dropSent(request); // it has arrived, though nobody heard so
    const known = this.messages.get(id);
    const written = { state, shown: Number(shown), length: Number(length), tail: $("[data-tail]", element)?.textContent ?? "" };
    // What came over the line while this was fetched is newer than what was fetched.
    if (known && known.length > written.length && known.state === "growing") this.patch(element, known, written);
    else if (!known || known.state === "growing" || state !== "growing") this.messages.set(id, written);
    if (state === "growing" && this.messages.get(id).state === "growing") this.growing.add(id);
    if (state === "growing" && known && known.state !== "growing") this.fetchTurn({ id }); // it has ended since
    this.addCopies(element);
  }

  patch(element, known, written) {
    const blocks = (known.blocks ?? []).filter((block) => block.shown > written.shown);
    for (const block of blocks) $("[data-blocks]", element).insertAdjacentHTML("beforeend", block.html);
    $("[data-tail]", element).textContent = known.tail;
  }

  element(id) { return $(`[data-message="${CSS.escape(id)}"]`, this.thread); }

  /** A code block has a button that copies it. */
  addCopies(root) {
    for (const code of $$("pre", root)) {
      if (code.dataset.copies) continue;
      code.dataset.copies = "1";
      code.tabIndex = 0;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy-code";
      button.textContent = "Copy";
      button.dataset.copyCode = "";
      const frame = document.createElement("div");
      frame.className = "code-frame";
      if (code.dataset.lang) frame.dataset.lang = code.dataset.lang;
      code.replaceWith(frame);
      frame.append(code, button);
    }
  }

  // ── What happens ──────────────────────────────────────────────────────────────────────────────────

  take(event) {
    switch (event.type) {
      case "connected": this.flush(); break;
      case "message": this.takeMessage(event); break;
      case "delta": this.takeDelta(event); break;
      case "block": this.takeBlock(event); break;
      case "progress": this.takeProgress(event); break;
      case "done": case "stopped": this.takeEnd(event); break;
      case "error": this.takeError(event); break;
      case "room": this.takeRoom(event.room); break;
      case "closed": toast("This room was deleted."); setTimeout(() => { location.href = "/chat"; }, 1200); break;
    }
  }

  takeMessage({ message, head, seq }) {
    this.dropSent(message.request);
    const known = this.messages.get(message.id);
    if (known && seq && known.seq > seq) return;
    const tail = from(message.text, message.shown);
    this.messages.set(message.id, { state: message.state, shown: message.shown, length: points(message.text), tail, blocks: [], seq });
    if (message.state === "growing") this.growing.add(message.id); else this.growing.delete(message.id);
    this.head = head;
    this.showStop();
    this.fetchTurn(message);
    this.listChanged();
  }

  /** Text that an answer grew by. A piece that is there already is not added again; one that is missing is asked for. */
  takeDelta({ message: id, text, at }) {
    const known = this.messages.get(id);
    if (!known) return;
    const size = points(text);
    if (at + size <= known.length) return;
    if (at > known.length) { this.line.sync(); return; }
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
    this.follow();
  }

  takeBlock({ message: id, html, shown }) {
    const known = this.messages.get(id);
    if (!known || shown <= known.shown) return;
    if (shown > known.length) { this.line.sync(); return; }
    known.tail = from(known.tail, shown - known.shown);
    known.shown = shown;
    (known.blocks ??= []).push({ html, shown });
    const element = this.element(id);
    if (!element) return;
    const blocks = $("[data-blocks]", element);
    blocks.insertAdjacentHTML("beforeend", html); // sanitised by the server
    $("[data-tail]", element).textContent = known.tail;
    this.addCopies(blocks);
    this.follow();
  }

  takeProgress({ message: id, stage, fraction, told, place, left_out: leftOut }) {
    const element = this.element(id);
    if (!element || this.messages.get(id)?.length) return;
    const percent = `${Math.round(fraction * 100)} %`;
    $("[data-growth]", element).textContent = stage === "queued"
      ? (place === 1 ? "You are next …" : `${place - 1} before you …`)
      : stage === "prompt"
        ? (fraction < 1 ? `Reading the conversation, ${percent} …` : leftOut ? `Leaving out the ${leftOut} oldest messages …` : "Waiting for the first word …")
        : `${told ?? "Loading the model"}, ${percent} …`;
    this.follow();
  }

  takeEnd({ message: id }) {
    const known = this.messages.get(id);
    if (known) known.state = "done";
    this.growing.delete(id);
    this.showStop();
    this.flush();
    this.fetchTurn({ id });
    announce(`The answer is there. ${this.element(id)?.querySelector(".said")?.textContent.slice(0, 300) ?? ""}`);
    this.listChanged();
  }

  takeError({ message: id, error, request }) {
    if (id) { this.takeEnd({ message: id }); announce(`${error.message} ${error.next_step}`); return; }
    const sent = this.outbox().find((each) => each.request === request);
    if (sent && error.code === "not_now") return; // another one answers first; it is sent again after that
    toast(error.message, { more: error.next_step, error: true });
    if (sent) { // what was refused comes back to where it was written
      this.dropSent(request);
      this.say.value = this.say.value ? `${sent.text}\n\n${this.say.value}` : sent.text;
      this.files.set([...(sent.files ?? []), ...this.files.list]);
      this.say.dispatchEvent(new Event("input"));
    }
  }

  takeRoom(room) {
    const title = $("[data-title]", this.root);
    if (document.activeElement !== title) title.value = room.title;
    document.title = `${room.title} · Chat · Trellis`;
    this.listChanged();
  }

  /** Fetch what has changed in the thread as the server writes it, one after the other, so that an answer stands under
   * what it answers; of many changes at once, all of it once. */
  fetchTurn({ id }) {
    (this.changed ??= new Set()).add(id);
    clearTimeout(this.changeTimer);
    this.changeTimer = setTimeout(() => {
      const changed = this.changed;
      this.changed = new Set();
      this.fetches = (this.fetches ?? Promise.resolve()).then(async () => {
        if (changed.size > 8) await this.fetchThread();
        else for (const each of changed) await this.fetchOne(each);
      }).catch(() => { /* the line says that it is gone; what is missing is told when it is back */ });
    }, 15);
  }

  /** Fetch one place in the thread, or all of it where the branch is another one. */
  async fetchOne(id) {
    const answer = await fetch(`/chat/${this.room}/messages/${id}`, { headers: { "hx-request": "true" } });
    if (!answer.ok) return;
    const source = await answer.text();
    if (this.sources.get(id) === source && this.element(id)) return; // what stands there is what was fetched
    const box = document.createElement("template");
    box.innerHTML = source;
    const turn = $("[data-turn]", box.content);
    const stands = this.element(id)?.closest("[data-turn]")
      ?? (turn.dataset.group && $(`[data-group="${CSS.escape(turn.dataset.group)}"]`, this.thread));
    const last = $$("[data-turn]", this.thread).at(-1);
    this.sources.set(id, source);
    if (stands) this.replaceTurn(stands, turn);
    else if ((last?.dataset.turn ?? "") === turn.dataset.parent && !turn.querySelector(".aside:only-child")) this.appendTurn(turn);
    else await this.fetchThread();
  }

  replaceTurn(old, turn) {
    if ($(".edit-message[open]", old)) { this.freshen(old, turn); return; } // what is being written there stays
    const open = new Set($$(".thought[open]", old).map((each) => $$(".thought", old).indexOf(each)));
    const focus = document.activeElement?.dataset?.focus;
    old.replaceWith(turn);
    $$(".thought", turn).forEach((each, place) => { each.open = open.has(place); });
    this.arrive(turn);
    if (focus) $(`[data-focus="${CSS.escape(focus)}"]`, turn)?.focus({ preventScroll: true });
  }

  freshen(old, turn) {
    for (const fresh of $$("[data-message]", turn)) {
      const place = $(`[data-message="${CSS.escape(fresh.dataset.message)}"]`, old);
      if (!place) continue;
      for (const part of ["[data-blocks]", "[data-tail]"]) {
        const here = $(part, place), there = $(part, fresh);
        if (here && there) here.replaceChildren(...there.childNodes);
      }
    }
  }

  appendTurn(turn) {
    $(".nothing-said", this.thread)?.remove();
    this.thread.append(turn);
    this.arrive(turn);
  }

  arrive(turn) {
    htmx.process(turn);
    for (const element of $$("[data-message]", turn)) this.readMessage(element);
    this.showStop();
    this.follow();
  }

  /** Fetch the branch that is looked at. */
  async fetchThread() {
    const answer = await fetch(`/chat/${this.room}/thread${this.showsAll ? "?all=true" : ""}`, { headers: { "hx-request": "true" } });
    if (!answer.ok || answer.redirected) return;
    this.sources.clear();
    this.thread.innerHTML = await answer.text();
    htmx.process(this.thread);
    this.readThread();
    this.follow();
  }

  listChanged() {
    clearTimeout(this.listTimer);
    this.listTimer = setTimeout(() => {
      const list = $("#room-list", this.root);
      if (!$("#room-search").value) htmx.trigger(list, "trellis:rooms");
    }, 400);
  }

  showState(state) {
    const place = $("[data-connection]", this.root);
    place.dataset.state = state;
    $("[data-connection-text]", place).textContent = {
      connected: "Connected", reconnecting: "Reconnecting …", offline: "Offline", gone: "This room is gone",
    }[state] ?? "Connecting";
    if (state === "gone") { toast("This room is not there any more."); setTimeout(() => { location.href = "/chat"; }, 1500); }
  }

  showStop() { $("[data-stop]", this.root).hidden = this.growing.size === 0; }

  // ── What is said ──────────────────────────────────────────────────────────────────────────────────

  bindComposer() {
    bindWriting(this.composer, this.say);
    bindSteps(this.composer);
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      if (event.submitter?.matches("[data-stop]")) { this.stop(); return; }
      this.submit();
    });
    this.files = new Files(this.root, this.composer, this.say, (name) => `/api/rooms/${this.room}/files?name=${encodeURIComponent(name)}`);
    this.draft = new Draft(this.room, this.say, this.files);
    Draft.dropSent($$(".message.user [data-tail]", this.thread).slice(0, 1).map((each) => each.textContent.trim()));
    document.addEventListener("keydown", (event) => {
      if (isComposing(event) || $("dialog[open]")) return;
      if (event.key === "Escape" && !event.defaultPrevented && this.growing.size) { event.preventDefault(); this.stop(); return; }
      if (event.key === "ArrowUp" && event.target === this.say && !this.say.value) {
        const edit = $$(".message.user .edit-message", this.thread).at(-1);
        if (edit) { event.preventDefault(); edit.open = true; $("textarea", edit).focus(); }
      }
    });
  }

  submit() {
    const text = this.say.value;
    if (!text.trim() && !this.files.list.length) { this.say.focus(); return; }
    if (isTooLong(this.say)) { this.say.focus(); return; }
    if (this.files.coming) { toast("A file is still on its way.", { more: "Send when it is there." }); return; }
    if (this.growing.size) { toast("The answer is still growing.", { more: "Wait for its end, or stop it." }); return; }
    const models = $$("[data-model]", this.composer).map((each) => each.value).filter(Boolean);
    const command = { type: "send", text, request: newId(), model: [...new Set(models)], attachments: this.files.list.map((file) => file.id), files: this.files.list };
    this.keep([...this.outbox(), command]);
    this.say.value = "";
    this.files.set([]);
    this.draft.clear();
    this.say.dispatchEvent(new Event("input"));
    this.follows = true;
    if (this.line.live) this.flush(); else announce("You are offline. It is sent when you are back.");
    this.showOutbox();
    this.toEnd();
  }

  stop() {
    if (!this.line.send({ type: "stop" })) fetch(`/chat/${this.room}/stop`, { method: "POST", headers: { "hx-request": "true" } });
  }

  /** What was said and is not known to have arrived. It is sent again when the line is back; the server takes it once. */
  outbox() {
    if (this.waiting) return this.waiting;
    try { return JSON.parse(sessionStorage.getItem(`trellis:outbox:${this.room}`) ?? "[]"); } catch { return []; }
  }

  keep(commands) {
    try { sessionStorage.setItem(`trellis:outbox:${this.room}`, JSON.stringify(commands)); this.waiting = null; } catch { this.waiting = commands; } // full
    this.showOutbox();
  }

  dropSent(request) {
    const left = this.outbox().filter((each) => each.request !== request);
    if (left.length !== this.outbox().length) this.keep(left);
  }

  /** Send what waits, one after the other: the next when the answer to the one before is whole. */
  flush() {
    const [next] = this.outbox();
    if (!next || this.growing.size) return;
    const { files, ...command } = next;
    this.line.send(command);
  }

  showOutbox() {
    const place = $("[data-outbox]", this.root);
    place.replaceChildren(...this.outbox().map((command) => {
      const box = document.createElement("article");
      box.className = "message user waiting";
      const said = document.createElement("div");
      said.className = "tail";
      said.textContent = command.text;
      const meta = document.createElement("p");
      meta.className = "meta";
      meta.textContent = this.line?.live ? "Sending …" : "Waits for the connection, and is sent then.";
      box.append(said, meta);
      return box;
    }));
  }

  // ── Reading along ─────────────────────────────────────────────────────────────────────────────────

  bindScroll() {
    const button = $("[data-to-end]", this.root);
    let before = 0, touched = 0;
    for (const way of ["wheel", "touchmove", "keydown", "pointerdown"]) this.scroller.addEventListener(way, () => { touched = Date.now(); }, { passive: true });
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      // What grows or is drawn anew meanwhile is no reader who scrolled: only a way up by hand is.
      if (scrollHeight - scrollTop - clientHeight < 48) this.follows = true;
      else if (scrollTop < before - 1 && Date.now() - touched < 1000) this.follows = false;
      before = scrollTop;
      button.hidden = this.follows;
    }, { passive: true });
    button.addEventListener("click", () => { this.follows = true; this.toEnd(); });
  }

  /** The view goes along with the words, unless the reader has scrolled up. Once a frame, however many come. */
  follow() {
    if (!this.follows || this.framed) return;
    this.framed = requestAnimationFrame(() => { this.framed = 0; if (this.follows) this.toEnd(); });
  }

  toEnd() { this.scroller.scrollTop = this.scroller.scrollHeight; }

  bindThread() {
    this.root.addEventListener("click", async (event) => {
      const code = event.target.closest("[data-copy-code]");
      const copy = event.target.closest("[data-copy]");
      if (code) await copyText($("code", code.parentElement).textContent, code);
      if (copy) {
        const message = copy.closest("[data-message]");
        await copyText($("textarea[name=text]", message)?.value ?? $(".said", message).textContent, copy);
      }
      if (event.target.closest("[data-close]")) event.target.closest("details").open = false;
      if (event.target.closest("[data-rooms-switch]")) this.root.dataset.view = this.root.dataset.view === "rooms" ? "thread" : "rooms";
    });
    document.addEventListener("htmx:afterRequest", (event) => {
      const edit = event.target.closest?.(".edit-message, .room-menu");
      if (event.detail.successful && edit && event.target.tagName === "FORM" && !event.target.matches(".rename")) edit.open = false;
    });
    document.addEventListener("trellis:taught", ({ detail }) => {
      const message = this.element(detail.message), note = message && $("[data-taught]", message);
      toast(`“${detail.session}” learns from this answer.`);
      if (!note) return;
      const teach = $(".teach", message);
      if (teach) teach.open = false;
      const link = document.createElement("a");
      link.href = detail.url;
      link.textContent = "See how it goes";
      note.replaceChildren(`“${detail.session}” learns from this. `, link);
      note.hidden = false;
    });
    this.showsAll = new URLSearchParams(location.search).has("all");
    document.addEventListener("htmx:afterSwap", (event) => {
      if (event.detail.target !== this.thread) return;
      this.showsAll = true; // the only part that is swapped here is all of it
      this.readThread();
    });
  }
}
