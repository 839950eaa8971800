// Where a message is written: Enter, the prompt library, drafts, files, who answers. The first message of a room and all others alike.

import { $, $$, ask, bytes, toast } from "../page.js";

export const newId = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0");

/** Characters as the server counts them. */
export const points = (text) => { let count = 0; for (const _ of text) count += 1; return count; };

/** Whether a key belongs to an input method. Safari says so by the code alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

export const isTooLong = (box) => box.value.length > Number(box.dataset.most) && points(box.value) > Number(box.dataset.most);

/** Texts that may not be longer than they say are never cut: it is told by how much, and they are not sent. */
export function bindLimits() {
  const show = (box) => {
    const place = $("[data-limit]", box.form ?? box.parentElement);
    if (!place) return;
    const long = isTooLong(box);
    box.toggleAttribute("aria-invalid", long);
    if (long) box.setAttribute("aria-invalid", "true");
    place.hidden = !long;
    if (!long) { place.replaceChildren(); return; }
    const count = new Intl.NumberFormat("en").format(points(box.value)), most = new Intl.NumberFormat("en").format(Number(box.dataset.most));
    place.replaceChildren(`${count} characters; ${most} are the most. Shorten it${"say" in box.dataset ? ", or " : "."}`);
    if (!("say" in box.dataset)) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Add it as a file";
    button.addEventListener("click", () => box.dispatchEvent(new CustomEvent("trellis:as-file")));
    place.append(button);
  };
  document.addEventListener("input", (event) => { if (event.target.matches?.("textarea[data-most]")) show(event.target); });
  document.addEventListener("submit", (event) => {
    const long = $$("textarea[data-most]", event.target).find(isTooLong);
    if (!long || event.submitter?.matches("[data-stop]")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    show(long);
    long.focus();
  }, { capture: true });
}

/** Enter sends; "/" at the start lists the prompt library. */
export function bindWriting(form, say) {
  const fit = () => { say.style.height = "auto"; say.style.height = `${Math.min(say.scrollHeight + 4, innerHeight * 0.4)}px`; };
  say.addEventListener("input", fit);
  const box = $("[data-prompt-box]", form);
  bindPrompts(say, box);
  say.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || isComposing(event)) return;
    event.preventDefault();
    // A prompt of the library takes the place of its name alone; whatever else begins with “/” is a message.
    const first = /^\/\S*$/.test(say.value) && !box.hidden && $(".prompt-row button", box);
    if (first) first.click(); else form.requestSubmit($("[data-send]", form));
  });
}

function bindPrompts(say, box) {
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
    if (!/^\/[^\n/]*$/.test(say.value)) { close(); return; } // a path is no command
    prompts ??= await ask("GET", "/api/rooms/prompts").catch(() => []);
    if (!/^\/[^\n/]*$/.test(say.value)) { close(); return; }
    const word = say.value.slice(1).toLowerCase();
    const found = prompts.filter((each) => each.name.toLowerCase().includes(word)).slice(0, 8);
    const rows = found.map((each) => {
      const row = document.createElement("div");
      row.className = "prompt-row";
      row.append(button(each.name, () => { say.value = each.text; close(); say.focus(); say.dispatchEvent(new Event("input", { bubbles: true })); }),
        Object.assign(button("×", async () => {
          await ask("DELETE", `/api/rooms/prompts/${each.id}`);
          prompts = null;
          say.dispatchEvent(new Event("input"));
        }), { ariaLabel: `Drop the prompt ${each.name}` }));
      return row;
    });
    const [, name, text] = /^\/([\p{L}\p{N}_-]+)\s+(\S.*)$/u.exec(say.value) ?? [];
    const help = document.createElement("p");
    help.className = "help";
    help.textContent = rows.length && !text ? "Choose a prompt; Enter takes the first."
      : text ? "Enter sends this as a message." : prompts.length ? "No prompt has this name. Enter sends this as a message." : "No prompts yet. Write one here as /name text, and keep it.";
    box.replaceChildren(help, ...rows);
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
  say.addEventListener("keydown", (event) => { if (event.key === "Escape" && !box.hidden) { event.preventDefault(); event.stopPropagation(); close(); } });
}

/** What is being written, kept over a reload and until it is sent. */
export class Draft {
  constructor(name, say, files) {
    Object.assign(this, { key: `trellis:draft:${name}`, say, files });
    try {
      const kept = JSON.parse(localStorage.getItem(this.key) ?? "null");
      if (kept) {
        say.value ||= kept.text; // the browser, or the server, may have brought it back
        files.set(kept.files ?? []);
        setTimeout(() => say.dispatchEvent(new Event("input", { bubbles: true })));
      }
    } catch { /* forbidden, or of another version */ }
    say.addEventListener("input", () => this.save());
    files.onChange = () => this.save();
  }

  save() {
    const files = this.files.list.filter((file) => file.id);
    try {
      if (this.say.value || files.length) localStorage.setItem(this.key, JSON.stringify({ text: this.say.value, files }));
      else localStorage.removeItem(this.key);
    } catch { /* full or forbidden */ }
  }

  clear() { try { localStorage.removeItem(this.key); } catch { /* forbidden */ } }

  /** Forget what was written as the first message of a room, now that it stands there. */
  static dropSent(texts) {
    try {
      const kept = JSON.parse(localStorage.getItem("trellis:draft:new") ?? "null");
      if (kept && texts.includes(kept.text.trim())) localStorage.removeItem("trellis:draft:new");
    } catch { /* forbidden */ }
  }
}

const MOST_BYTES = 12e6; // what the server reads of one file

/** Throws an Error for what the server would never see: a folder, a file that has gone, one that is far too large. */
async function requireReadable(file) {
  if (file.size > MOST_BYTES) {
    throw Object.assign(new Error(), { told: { message: `It has ${bytes(file.size)}; ${bytes(MOST_BYTES)} are the most.`, next_step: "Choose a smaller file, or a part of it." } });
  }
  try { await file.slice(0, 1).arrayBuffer(); } catch (cause) {
    throw Object.assign(new Error("", { cause }), { told: { message: "It cannot be read: it is a folder, or it has been moved or changed.", next_step: "Choose the files themselves." } });
  }
}

/** Files that go with a message, each refused at once and alone where it cannot be used. */
export class Files {
  constructor(root, form, say, place) {
    Object.assign(this, { form, place, list: [], onChange: () => {} });
    const label = $("[data-add-file]", root), input = $("[data-file-input]", root);
    label.hidden = input.hidden = false;
    input.tabIndex = 0;
    input.addEventListener("change", () => { this.add([...input.files]); input.value = ""; });
    root.addEventListener("dragover", (event) => { if (event.dataTransfer?.types.includes("Files")) { event.preventDefault(); root.classList.add("dropping"); } });
    root.addEventListener("dragleave", (event) => { if (!root.contains(event.relatedTarget)) root.classList.remove("dropping"); });
    root.addEventListener("drop", (event) => { if (event.dataTransfer?.files.length) { event.preventDefault(); root.classList.remove("dropping"); this.add([...event.dataTransfer.files]); } });
    say.addEventListener("paste", (event) => { const files = [...(event.clipboardData?.files ?? [])]; if (files.length) { event.preventDefault(); this.add(files); } });
    say.addEventListener("trellis:as-file", async () => {
      if (!await this.add([new File([say.value], "pasted.txt", { type: "text/plain" })])) return;
      say.value = "";
      say.dispatchEvent(new Event("input", { bubbles: true }));
      say.focus();
    });
  }

  get coming() { return this.list.some((file) => file.coming); }

  set(list) { this.list = list; this.show(); }

  /** Whether all of them were taken. */
  async add(files) {
    const models = $$("[data-model]", this.form).map((each) => each.value).filter(Boolean).map((each) => `&model=${encodeURIComponent(each)}`).join("");
    let all = true;
    for (const file of files) {
      const entry = { name: file.name || "pasted.txt", coming: true, file };
      this.set([...this.list, entry]);
      try {
        await requireReadable(file);
        Object.assign(entry, await ask("POST", this.place(entry.name) + models, file), { coming: false });
      } catch (error) {
        this.list = this.list.filter((each) => each !== entry);
        all = false;
        const more = error.offline ? "Add it again when it is back." : error.told.next_step;
        toast(`“${entry.name}” was not added. ${error.told.message}`, { more, error: true });
      }
      this.show();
    }
    return all;
  }

  show() {
    $("[data-chips]", this.form).replaceChildren(...this.list.map((file) => {
      const chip = document.createElement("li");
      chip.className = "chip";
      const name = document.createElement("span");
      name.textContent = file.coming ? `${file.name} …` : file.name;
      const away = document.createElement("button");
      away.type = "button";
      away.className = "quiet";
      away.textContent = "×";
      away.setAttribute("aria-label", `Take ${file.name} away`);
      away.addEventListener("click", () => this.set(this.list.filter((each) => each !== file)));
      chip.append(name, away);
      return chip;
    }));
    this.onChange();
  }
}

/** Of a session, any step can be chosen. */
export function bindSteps(form) {
  const shown = (select) => {
    const button = $("[data-step-of]", select.parentElement);
    if (button) button.hidden = !/^session:/.test(select.value);
  };
  for (const select of $$("[data-model]", form)) {
    shown(select);
    select.addEventListener("change", () => shown(select));
    $("[data-step-of]", select.parentElement)?.addEventListener("click", async () => {
      const session = select.value.replace(/^session:/, "").split("@")[0];
      const versions = await ask("GET", `/api/rooms/speakers/${encodeURIComponent(session)}/versions`).catch((error) => {
        toast(error.told.message, { more: error.told.next_step, error: true });
        return [];
      });
      const chosen = select.selectedOptions[0]; // as it is now: another may have been chosen meanwhile
      for (const old of $$("optgroup[data-steps]", select)) { // the one that is chosen stays, whatever is listed
        if (old.contains(chosen)) select.prepend(chosen);
        old.remove();
      }
      if (!versions.length) return;
      const group = document.createElement("optgroup");
      group.label = "Steps of this session, the newest first";
      group.dataset.steps = "";
      for (const each of versions) {
        if (each.name === chosen.value) { group.append(chosen); continue; }
        const about = [each.head && "where it stands", each.newest && "the newest"].filter(Boolean).join(", ");
        group.append(new Option(`${each.label}${about ? ` (${about})` : ""}`, each.name));
      }
      select.prepend(group);
      chosen.selected = true; // looking at the steps chooses none
      select.focus();
      try { select.showPicker?.(); } catch { /* not allowed here: the list opens by hand */ }
    });
  }
}

/** The page on which a room begins. */
export function bindStart(root) {
  const form = $("[data-composer]", root), say = $("[data-say]", root);
  bindWriting(form, say);
  bindSteps(form);
  const files = new Files(root, form, say, (name) => `/api/rooms/new/files?name=${encodeURIComponent(name)}`);
  const draft = new Draft("new", say, files);
  form.addEventListener("submit", async (event) => {
    if (!files.list.length) return; // the draft goes when the room shows the message
    event.preventDefault();
    if (files.coming) { delete form.dataset.sent; toast("A file is still on its way.", { more: "Send when it is there." }); return; }
    if (form.dataset.sending) return;
    form.dataset.sending = "1";
    try {
      location.href = await begin(form, say.value, files.list);
      draft.clear();
    } catch (error) {
      toast(error.told?.message ?? "It could not be sent.", { more: error.told?.next_step ?? "Try again.", error: true });
    } finally {
      delete form.dataset.sending;
      delete form.dataset.sent; // it may be pressed again
    }
  });
}

/** Make a room, give it the files, say the first message. Each step is done once, however often it is tried. */
async function begin(form, text, files) {
  const request = $("[name=request]", form).value;
  const models = [...new Set($$("[data-model]", form).map((each) => each.value).filter(Boolean))];
  const once = (key) => ({ headers: { "content-type": "application/json", "idempotency-key": key } });
  const room = await ask("POST", "/api/rooms", { models }, once(request));
  for (const each of files) each.sent ??= (await ask("POST", `/api/rooms/${room.id}/files?name=${encodeURIComponent(each.name)}`, each.file)).id;
  await ask("POST", `/api/rooms/${room.id}/messages`, { text, models, attachments: files.map((each) => each.sent) }, once(`${request}-first`));
  return `/chat/${room.id}`;
}

/** What works on every page of chat: letters that are typed outside of a field are written into the message. */
export function bindKeys() {
  const keys = $("[data-keys]"), button = $("[data-show-keys]"), say = $("[data-say]");
  if (!keys || !say) return;
  button.hidden = false;
  button.addEventListener("click", () => keys.showModal());
  document.addEventListener("keydown", (event) => {
    const at = event.target.closest?.("input, textarea, select, dialog, [contenteditable]") || $("dialog[open]");
    if (at || event.ctrlKey || event.metaKey || event.altKey || isComposing(event) || !/^\S$/u.test(event.key)) return;
    say.focus(); // the letter itself follows
  });
}
