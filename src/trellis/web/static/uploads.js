// Files sent piece by piece, gone on with where they broke off: after a lost connection by itself, after a reload when
// the same files are chosen again.

import { duration, percent, size } from "./numbers.js";
import { $, $$, ask, toast } from "./page.js";

const pause = (seconds) => new Promise((done) => { setTimeout(done, seconds * 1000); });

class Upload {
  constructor(box) {
    this.box = box;
    this.kind = box.dataset.upload;
    this.status = $("[data-upload-status]", box);
    box.hidden = false;
    $("[data-upload-input]", box).addEventListener("change", (event) => this.begin([...event.target.files], event.target));
  }

  async begin(files, input) {
    if (!files.length) return;
    // Of a folder only its own files: what lies deeper is other formats of the same model.
    const chosen = this.kind === "model" ? files.filter((file) => file.webkitRelativePath.split("/").length <= 2 && !file.name.startsWith(".") && /\.(safetensors|json|txt|md|jinja|model|tiktoken)$|^(LICENSE|NOTICE)$/.test(file.name)) : files;
    const folder = files[0].webkitRelativePath?.split("/")[0];
    const name = $("[data-upload-name]", this.box)?.value.trim() || folder || files[0].name;
    this.abort = new AbortController();
    this.show(name, 0, 1, 0);
    try {
      let state = await ask("POST", "/api/uploads", { kind: this.kind, name, files: chosen.map((file) => ({ path: file.name, bytes: file.size })), mark: chosen.map((file) => file.lastModified).sort().join(",") });
      this.id = state.id;
      state = await this.send(state, chosen, name);
      this.done(state.result);
    } catch (error) {
      if (this.cancelled || error.aborted) this.say("Upload cancelled.");
      else this.fail(error.told ?? { message: String(error), next_step: "Try again." });
    } finally {
      input.value = "";
    }
  }

  async send(state, files, name) {
    const total = files.reduce((sum, file) => sum + file.size, 0);
    const already = state.files.reduce((sum, file) => sum + file.received, 0);
    const begun = performance.now();
    let wait = 0.5;
    while (state.state !== "done") {
      const number = state.files.findIndex((file) => file.received < file.bytes);
      const { path, received } = state.files[number];
      const piece = files.find((file) => file.name === path).slice(received, received + state.piece);
      try {
        state = await ask("PUT", `/api/uploads/${state.id}/files/${number}?offset=${received}`, piece, { signal: this.abort.signal });
        wait = 0.5;
      } catch (error) {
        if (error.told?.code === "wrong_offset") state = error.said.upload;
        else if (error.offline || error.status >= 502) {
          this.say("Connection lost. Retrying…");
          await pause(wait);
          wait = Math.min(wait * 2, 15);
          continue;
        } else throw error;
      }
      const sent = state.files.reduce((sum, file) => sum + file.received, 0);
      const seconds = (performance.now() - begun) / 1000;
      this.show(name, state.state === "done" ? total : sent, total, (sent - already) / Math.max(seconds, 0.1));
    }
    return state;
  }

  show(name, sent, total, rate) {
    const part = Math.floor(100 * sent / Math.max(total, 1)) / 100;
    if (!$("progress", this.status)) {
      this.status.replaceChildren();
      const bar = document.createElement("progress");
      bar.max = 100;
      bar.setAttribute("aria-label", `Uploading ${name}`);
      const text = document.createElement("p");
      text.className = "help num";
      const stop = document.createElement("button");
      stop.type = "button";
      stop.textContent = "Cancel upload";
      stop.addEventListener("click", () => this.cancel());
      this.status.append(bar, text, stop);
    }
    $("progress", this.status).value = 100 * part;
    const left = rate > 0 ? (total - sent) / rate : 0;
    $("p", this.status).textContent = `${name}: ${percent(part)} · ${size(sent)} of ${size(total)}${rate ? ` · ${size(rate)}/s` : ""}${left > 1 ? ` · ${duration(Math.round(left) * 1000)} left` : ""}`;
  }

  async cancel() {
    this.cancelled = true;
    this.abort.abort();
    if (this.id) await ask("DELETE", `/api/uploads/${this.id}`).catch(() => {});
    this.say("Upload cancelled.");
    this.cancelled = false;
  }

  say(text) {
    const line = $("p", this.status) ?? this.status.appendChild(document.createElement("p"));
    line.textContent = text;
    if (text.startsWith("Cancelled")) this.status.replaceChildren(line);
  }

  fail({ message, next_step: next }) {
    this.say("");
    const line = document.createElement("p");
    line.className = "field-error";
    line.textContent = `${message} ${next}`;
    this.status.replaceChildren(line);
  }

  done(name) {
    this.say(`“${name}” uploaded`);
    this.status.replaceChildren($("p", this.status));
    toast(`“${name}” uploaded`, { kind: "learned" });
    this.box.dispatchEvent(new CustomEvent("trellis:uploaded", { bubbles: true, detail: { kind: this.kind, name } }));
  }
}

export function bindUploads() {
  for (const box of $$("[data-upload]")) new Upload(box);
  document.addEventListener("trellis:uploaded", ({ detail, target }) => {
    const file = $("#import-file");
    if (file && target.closest("[data-then-name]")) file.value = detail.name;
    if (detail.kind === "model" && $("#cards")) htmx.trigger("#cards", "trellis:models");
  });
}
