// A chat on its page: the events of its connection handed to the messages and the commands, and the view that follows the text.

import { Connection } from "./connection.js";
import { Commands } from "./commands.js";
import { Messages } from "./messages.js";
import { $, announce, copyText, toast } from "../page.js";

export class Chat {
  constructor(root) {
    this.root = root;
    this.room = root.dataset.room;
    this.scroller = $("[data-scroller]", root);
    this.follows = true;
    this.messages = new Messages($("[data-thread]", root), this.room, {
      onArrived: (request) => this.commands.drop(request), onChange: () => this.update(), onGap: () => this.connection.sync(),
    });
    this.commands = new Commands(root, this.room, this.messages, { onSend: () => { this.follows = true; this.toEnd(); } });
    this.messages.read();
    this.bindScroll();
    this.bindThread();
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.connection = new Connection(`${scheme}://${location.host}/ws/chat/${this.room}`, this.messages.after, {
      onEvent: (event) => this.take(event), onState: (state) => this.showState(state),
    });
    this.commands.connect(this.connection);
    this.toEnd();
  }

  take(event) {
    switch (event.type) {
      case "connected": this.commands.flush(); break;
      case "message": this.messages.add(event); this.listChanged(); break;
      case "delta": this.messages.append(event); break;
      case "block": this.messages.addBlock(event); break;
      case "progress": this.messages.showProgress(event); break;
      case "done": case "stopped": this.end(event.message); break;
      case "error": this.takeError(event); break;
      case "room": this.takeRoom(event.room); break;
      case "closed": this.leave("Chat deleted"); break;
    }
  }

  end(id, words = "") {
    this.messages.end(id);
    this.commands.flush();
    announce(words || `Answer complete. ${this.messages.element(id)?.querySelector(".said")?.textContent.slice(0, 300) ?? ""}`);
    this.listChanged();
  }

  takeError({ message: id, error, request }) {
    if (id) this.end(id, `${error.message} ${error.next_step}`);
    else this.commands.refuse(request, error);
  }

  takeRoom(room) {
    const title = $("[data-title]", this.root);
    if (document.activeElement !== title) title.value = room.title;
    document.title = `${room.title} · Chat · Trellis`;
    this.listChanged();
  }

  leave(words) { toast(words); setTimeout(() => { location.href = "/chat"; }, 1500); }

  listChanged() {
    clearTimeout(this.listTimer);
    this.listTimer = setTimeout(() => {
      if (!$("#room-search").value) htmx.trigger($("#room-list", this.root), "trellis:rooms");
    }, 400);
  }

  showState(state) {
    const place = $("[data-connection]", this.root);
    place.dataset.state = state;
    $("[data-connection-text]", place).textContent = {
      connected: "Connected", reconnecting: "Reconnecting…", offline: "Offline", gone: "Chat deleted",
    }[state] ?? "Connecting…";
    if (state === "gone") this.leave("This chat no longer exists");
  }

  update() {
    $("[data-stop]", this.root).hidden = this.messages.growing.size === 0;
    this.follow();
  }

  bindScroll() {
    const button = $("[data-to-end]", this.root);
    let before = 0, touched = 0;
    for (const way of ["wheel", "touchmove", "keydown", "pointerdown"]) this.scroller.addEventListener(way, () => { touched = Date.now(); }, { passive: true });
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      // Growing content scrolls too: only scrolling up by hand ends following.
      if (scrollHeight - scrollTop - clientHeight < 48) this.follows = true;
      else if (scrollTop < before - 1 && Date.now() - touched < 1000) this.follows = false;
      before = scrollTop;
      button.hidden = this.follows;
    }, { passive: true });
    button.addEventListener("click", () => { this.follows = true; this.toEnd(); });
  }

  /** Keep the newest text in view unless the reader has scrolled up. At most once a frame. */
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
    document.addEventListener("htmx:afterRequest", ({ detail, target }) => {
      if (!detail.successful || target.tagName !== "FORM") return;
      const open = target.closest(".edit-message, .room-menu");
      if (open && !target.matches(".rename")) open.open = false;
    });
    document.addEventListener("trellis:taught", ({ detail }) => this.messages.showTraining(detail));
  }
}
