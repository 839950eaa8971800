// A room: words that grow as they come, a line that comes back by itself, and nothing that is sent twice or lost.

import { $, $$, announce, ask, copyText, toast } from "./page.js";

const points = (text) => { let count = 0; for (const _ of text) count += 1; return count; };
const from = (text, start) => (start <= 0 ? text : [...text].slice(start).join(""));
const newId = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0");

/** A socket that opens again with a growing pause, and says how it is. */
class Line {
  constructor(url, after, { onEvent, onState }) {
    Object.assign(this, { url, last: after, onEvent, onState });
    this.wait = 500;
    this.ended = false;
    this.open();
    addEventListener("online", () => this.soon());
    addEventListener("offline", () => this.onState("offline"));
    addEventListener("pagehide", () => { this.ended = true; this.socket?.close(); });
    addEventListener("pageshow", (event) => { if (event.persisted) { this.ended = false; this.open(); } });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.soon(); });
    setInterval(() => this.beat(), 10000);
  }

  get live() { return this.socket?.readyState === WebSocket.OPEN; }

  open() {
    clearTimeout(this.timer);
    if (this.ended) return;
    this.socket = new WebSocket(`${this.url}?after=${this.last}`);
    const socket = this.socket;
    this.heard = Date.now();
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.heard = Date.now();
      const event = JSON.parse(data);
      if (event.type === "connected") { this.wait = 500; this.onState("connected"); }
      this.onEvent(event);
      if (event.seq > this.last && !["connected", "pong"].includes(event.type) && !(event.type === "error" && !event.message)) this.last = event.seq;
    };
    socket.onclose = ({ code }) => {
      if (socket !== this.socket || this.ended) return;
      if (code === 4404) { this.ended = true; this.onState("gone"); return; }
      this.onState(navigator.onLine ? "reconnecting" : "offline");
      this.timer = setTimeout(() => this.open(), this.wait * (0.5 + Math.random()));
      this.wait = Math.min(this.wait * 2, 15000);
    };
  }

  /** Try now instead of later. */
  soon() { if (!this.ended && !this.live && this.socket?.readyState !== WebSocket.CONNECTING) { this.wait = 500; this.open(); } }

  beat() {
    if (this.ended || !this.live) return;
    if (Date.now() - this.heard > 25000) { this.socket.close(); return; } // nobody is there, whatever the network says
    this.socket.send(JSON.stringify({ type: "ping" }));
  }

  send(command) {
    if (!this.live) return false;
    this.socket.send(JSON.stringify(command));
    return true;
  }

  /** Have everything after the last event that was understood told again. */
  sync() { this.send({ type: "sync", after: this.last }); }
}

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
    this.files = [];
    this.follows = true;
    this.sources = new Map(); // the HTML that was last fetched of each
    this.readThread();
    this.bindComposer();
    this.bindThread();
    this.bindScroll();
    this.bindFiles();
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
    if (sent) {
      this.dropSent(request);
      if (!this.say.value) this.say.value = sent.text;
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
    const draft = `trellis:draft:${this.room}`;
    if (!this.say.value) this.say.value = sessionStorage.getItem(draft) ?? "";
    this.say.addEventListener("input", () => sessionStorage.setItem(draft, this.say.value));
    this.clearDraft = () => sessionStorage.removeItem(draft);
    document.addEventListener("keydown", (event) => {
      const dialog = $("dialog[open]");
      const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
      if (event.key === "Escape" && !dialog && this.growing.size) { event.preventDefault(); this.stop(); return; }
      if (event.key === "ArrowUp" && event.target === this.say && !this.say.value) {
        const edit = $$(".message.user .edit-message", this.thread).at(-1);
        if (edit) { event.preventDefault(); edit.open = true; $("textarea", edit).focus(); }
        return;
      }
      if (typing || dialog || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "w") { event.preventDefault(); this.say.focus(); }
      if (event.key === "r" && !this.growing.size) { event.preventDefault(); this.again(); }
    });
  }

  submit() {
    const text = this.say.value;
    if (!text.trim() && !this.files.length) { this.say.focus(); return; }
    if (this.files.some((file) => file.coming)) { toast("A file is still on its way.", { more: "Send when it is there." }); return; }
    if (this.growing.size) { toast("The answer is still growing.", { more: "Wait for its end, or stop it." }); return; }
    const models = $$("[data-model]", this.composer).map((each) => each.value).filter(Boolean);
    const command = { type: "send", text, request: newId(), model: [...new Set(models)], attachments: this.files.map((file) => file.id) };
    this.keep([...this.outbox(), command]);
    this.say.value = "";
    this.clearDraft();
    this.files = [];
    this.showFiles();
    this.follows = true;
    if (this.line.live) this.flush(); else announce("You are offline. It is sent when you are back.");
    this.showOutbox();
    this.toEnd();
  }

  /** Have the last answer made once more. */
  again() {
    const last = $$("[data-turn]", this.thread).at(-1)?.dataset.turn;
    if (last && !this.line.send({ type: "regenerate", message: last, request: newId() })) toast("You are offline.", { more: "Press again when you are back.", error: true });
  }

  stop() {
    if (!this.line.send({ type: "stop" })) fetch(`/chat/${this.room}/stop`, { method: "POST", headers: { "hx-request": "true" } });
  }

  /** What was said and is not known to have arrived. It is sent again when the line is back; the server takes it once. */
  outbox() {
    try { return JSON.parse(sessionStorage.getItem(`trellis:outbox:${this.room}`) ?? "[]"); } catch { return []; }
  }

  keep(commands) {
    sessionStorage.setItem(`trellis:outbox:${this.room}`, JSON.stringify(commands));
    this.showOutbox();
  }

  dropSent(request) {
    const left = this.outbox().filter((each) => each.request !== request);
    if (left.length !== this.outbox().length) this.keep(left);
  }

  /** Send what waits, one after the other: the next when the answer to the one before is whole. */
  flush() { const [next] = this.outbox(); if (next && !this.growing.size) this.line.send(next); }

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
    this.showsAll = new URLSearchParams(location.search).has("all");
    document.addEventListener("htmx:afterSwap", (event) => {
      if (event.detail.target !== this.thread) return;
      this.showsAll = true; // the only part that is swapped here is all of it
      this.readThread();
    });
  }

  // ── Files ─────────────────────────────────────────────────────────────────────────────────────────

  bindFiles() {
    const label = $("[data-add-file]", this.root), input = $("[data-file-input]", this.root);
    label.hidden = input.hidden = false;
    input.tabIndex = 0;
    input.addEventListener("change", () => { this.addFiles([...input.files]); input.value = ""; });
    this.root.addEventListener("dragover", (event) => { if (event.dataTransfer?.types.includes("Files")) { event.preventDefault(); this.root.classList.add("dropping"); } });
    this.root.addEventListener("dragleave", (event) => { if (!this.root.contains(event.relatedTarget)) this.root.classList.remove("dropping"); });
    this.root.addEventListener("drop", (event) => { if (event.dataTransfer?.files.length) { event.preventDefault(); this.root.classList.remove("dropping"); this.addFiles([...event.dataTransfer.files]); } });
    this.say.addEventListener("paste", (event) => { const files = [...(event.clipboardData?.files ?? [])]; if (files.length) { event.preventDefault(); this.addFiles(files); } });
  }

  async addFiles(files) {
    for (const file of files) {
      const entry = { name: file.name || "pasted.txt", coming: true };
      this.files.push(entry);
      this.showFiles();
      try {
        Object.assign(entry, await ask("POST", `/api/rooms/${this.room}/files?name=${encodeURIComponent(entry.name)}`, file), { coming: false });
      } catch (error) {
        this.files = this.files.filter((each) => each !== entry);
        toast(error.told.message, { more: error.told.next_step, error: true });
      }
      this.showFiles();
    }
  }

  showFiles() {
    $("[data-chips]", this.composer).replaceChildren(...this.files.map((file) => {
      const chip = document.createElement("li");
      chip.className = "chip";
      const name = document.createElement("span");
      name.textContent = file.coming ? `${file.name} …` : file.name;
      const away = document.createElement("button");
      away.type = "button";
      away.className = "quiet";
      away.textContent = "×";
      away.setAttribute("aria-label", `Take ${file.name} away`);
      away.addEventListener("click", () => { this.files = this.files.filter((each) => each !== file); this.showFiles(); });
      chip.append(name, away);
      return chip;
    }));
  }
}

/** Enter sends; "/" at the start lists the prompt library. */
function bindWriting(form, say) {
  const fit = () => { say.style.height = "auto"; say.style.height = `${Math.min(say.scrollHeight + 4, innerHeight * 0.4)}px`; };
  say.addEventListener("input", fit);
  say.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.ctrlKey) return;
    event.preventDefault();
    const first = $("[data-prompt-box]:not([hidden]) button", form);
    if (first) first.click(); else form.requestSubmit($("[data-send]", form));
  });
  const box = $("[data-prompt-box]", form);
  if (box) bindPrompts(form, say, box);
}

function bindPrompts(form, say, box) {
  let prompts = null;
  const close = () => { box.hidden = true; box.replaceChildren(); };
  const button = (text, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "quiet";
    made.textContent = text;
    made.addEventListener("click", act);
    return made;
  };
  say.addEventListener("input", async () => {
    if (!say.value.startsWith("/") || say.value.includes("\n")) { close(); return; }
    prompts ??= await ask("GET", "/api/rooms/prompts").catch(() => []);
    const word = say.value.slice(1).toLowerCase();
    const found = prompts.filter((each) => each.name.toLowerCase().includes(word)).slice(0, 8);
    const rows = found.map((each) => {
      const row = document.createElement("div");
      row.className = "prompt-row";
      row.append(button(each.name, () => { say.value = each.text; close(); say.focus(); say.dispatchEvent(new Event("input")); }),
        Object.assign(button("×", async () => {
          await ask("DELETE", `/api/rooms/prompts/${each.id}`);
          prompts = null;
          say.dispatchEvent(new Event("input"));
        }), { ariaLabel: `Drop the prompt ${each.name}` }));
      return row;
    });
    const help = document.createElement("p");
    help.className = "help";
    help.textContent = prompts.length ? "Choose a prompt; Enter takes the first." : "No prompts yet. Write one here as /name text, and keep it.";
    box.replaceChildren(help, ...rows);
    const [, name, text] = /^\/(\S+)\s+([\s\S]+)$/.exec(say.value) ?? [];
    if (text) {
      box.append(button(`Keep as “${name}”`, async () => {
        prompts = await ask("PUT", "/api/rooms/prompts", { name, text });
        say.value = text;
        close();
        say.focus();
        toast(`Kept. “/${name}” brings it back.`);
      }));
    }
    box.hidden = false;
  });
  say.addEventListener("keydown", (event) => { if (event.key === "Escape" && !box.hidden) { event.stopPropagation(); close(); } });
}

/** Of a session, any step can be chosen. */
function bindSteps(form) {
  const shown = (select) => {
    const button = $("[data-step-of]", select.parentElement);
    if (button) button.hidden = !/^session:/.test(select.value);
  };
  for (const select of $$("[data-model]", form)) {
    shown(select);
    select.addEventListener("change", () => shown(select));
    $("[data-step-of]", select.parentElement)?.addEventListener("click", async () => {
      const session = select.value.replace(/^session:/, "").split("@")[0];
      const name = select.selectedOptions[0].textContent.split(", ")[0];
      const versions = await ask("GET", `/api/rooms/speakers/${session}/versions`).catch(() => []);
      const group = document.createElement("optgroup");
      group.label = `Steps of ${name}`;
      for (const each of versions) {
        const option = new Option(`${name}, ${each.label}${each.head ? " (the newest)" : ""}`, each.name);
        group.append(option);
      }
      $(`optgroup[label="${CSS.escape(group.label)}"]`, select)?.remove();
      select.prepend(group);
      select.value = versions[0]?.name ?? select.value;
      select.focus();
      select.showPicker?.();
    });
  }
}

/** The page on which a room begins. */
export function bindStart(root) {
  const form = $("[data-composer]", root), say = $("[data-say]", root);
  bindWriting(form, say);
  bindSteps(form);
}

/** Keys that work on every page of chat. */
export function bindKeys() {
  const keys = $("[data-keys]");
  if (!keys) return;
  document.addEventListener("keydown", (event) => {
    if (event.target.closest?.("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "?") { event.preventDefault(); keys.showModal(); }
    if (event.key === "s") { event.preventDefault(); $("[data-room], [data-chat-start]").dataset.view = "rooms"; $("#room-search").focus(); }
    if (event.key === "n") { event.preventDefault(); location.href = "/chat"; }
  });
}
