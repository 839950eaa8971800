// What a person does in a chat: send, stop, edit. A message is kept until the server has it, and is sent once.

import { bindSteps, bindWriting, chosenModels, Draft, isComposing, isTooLong, newId } from "./composer.js";
import { Files } from "./files.js";
import { $, $$, announce, make, toast } from "../page.js";

export class Commands {
  constructor(root, room, messages, { onSend }) {
    Object.assign(this, { root, room, messages, onSend });
    this.composer = $("[data-composer]", root);
    this.say = $("[data-say]", root);
    bindWriting(this.composer, this.say);
    bindSteps(this.composer);
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      if (event.submitter?.matches("[data-stop]")) this.stop(); else this.submit();
    });
    this.files = new Files(root, this.composer, this.say, (name) => `/api/rooms/${room}/files?name=${encodeURIComponent(name)}`);
    this.draft = new Draft(room, this.say, this.files);
    Draft.dropSent($$(".message.user [data-tail]", messages.thread).slice(0, 1).map((each) => each.textContent.trim()));
    document.addEventListener("keydown", (event) => {
      if (isComposing(event) || $("dialog[open]")) return;
      if (event.key === "Escape" && !event.defaultPrevented && messages.growing.size) { event.preventDefault(); this.stop(); return; }
      if (event.key === "ArrowUp" && event.target === this.say && !this.say.value) {
        const edit = $$(".message.user .edit-message", messages.thread).at(-1);
        if (edit) { event.preventDefault(); edit.open = true; $("textarea", edit).focus(); }
      }
    });
  }

  connect(connection) {
    this.connection = connection;
    this.showOutbox();
  }

  submit() {
    const text = this.say.value;
    if (!text.trim() && !this.files.list.length) { this.say.focus(); return; }
    if (isTooLong(this.say)) { this.say.focus(); return; }
    if (this.files.coming) { toast("Still uploading.", { more: "Send when the file is attached." }); return; }
    if (this.messages.growing.size) { toast("Still generating.", { more: "Wait until it is done, or stop it." }); return; }
    const files = this.files.list;
    this.keep([...this.outbox(), { type: "send", text, request: newId(), model: chosenModels(this.composer), attachments: files.map((file) => file.id), files }]);
    this.say.value = "";
    this.files.set([]);
    this.draft.clear();
    this.say.dispatchEvent(new Event("input"));
    if (this.connection.live) this.flush(); else announce("You're offline. The message is sent when you are back.");
    this.onSend();
  }

  stop() {
    if (!this.connection.send({ type: "stop" })) fetch(`/chat/${this.room}/stop`, { method: "POST", headers: { "hx-request": "true" } });
  }

  /** Messages that are not known to have arrived. They are sent again on reconnection; the server takes each once. */
  outbox() {
    if (this.unsaved) return this.unsaved;
    try { return JSON.parse(sessionStorage.getItem(`trellis:outbox:${this.room}`) ?? "[]"); } catch { return []; }
  }

  keep(commands) {
    try { sessionStorage.setItem(`trellis:outbox:${this.room}`, JSON.stringify(commands)); this.unsaved = null; } catch { this.unsaved = commands; } // full
    this.showOutbox();
  }

  drop(request) {
    const left = this.outbox().filter((each) => each.request !== request);
    if (left.length !== this.outbox().length) this.keep(left);
  }

  /** Send what waits: the next message when the answer to the one before is complete. */
  flush() {
    const [next] = this.outbox();
    if (!next || this.messages.growing.size) return;
    const { files, ...command } = next;
    this.connection.send(command);
  }

  /** Show an error, and put the message that it refuses back into the composer. */
  refuse(request, error) {
    const sent = this.outbox().find((each) => each.request === request);
    if (sent && error.code === "not_now") return; // another answer comes first; it is sent again after that
    toast(error.message, { more: error.next_step, error: true });
    if (!sent) return;
    this.drop(request);
    this.say.value = this.say.value ? `${sent.text}\n\n${this.say.value}` : sent.text;
    this.files.set([...(sent.files ?? []), ...this.files.list]);
    this.say.dispatchEvent(new Event("input"));
  }

  showOutbox() {
    $("[data-outbox]", this.root).replaceChildren(...this.outbox().map((command) => {
      const box = make("article", { className: "message user waiting" });
      const state = this.connection?.live ? "Sending…" : "Waiting for the connection";
      box.append(make("div", { className: "tail", textContent: command.text }), make("p", { className: "meta", textContent: state }));
      return box;
    }));
  }
}
