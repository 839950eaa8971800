// Where a message is written: Enter, saved prompts, drafts, models. The same for the first message of a chat and all others.

import { $, $$, ask, make, toast } from "../page.js";

export const newId = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0");

/** Characters as the server counts them. */
export const points = (text) => { let count = 0; for (const _ of text) count += 1; return count; };

/** Whether a key belongs to an input method. Safari tells by the code alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** The models that a composer asks, each once. */
export const chosenModels = (form) => [...new Set($$("[data-model]", form).map((each) => each.value).filter(Boolean))];

export const isTooLong = (box) => box.value.length > Number(box.dataset.most) && points(box.value) > Number(box.dataset.most);

/** Text over its limit is not cut: the limit is shown, and the form is not sent. */
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
    place.replaceChildren(`${count} characters; the limit is ${most}. Shorten it${"say" in box.dataset ? " or " : "."}`);
    if (!("say" in box.dataset)) return;
    const button = make("button", { type: "button", textContent: "Attach it as a file" });
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

/** Enter sends; "/" at the start lists the saved prompts; the box is as high as its text, up to what the style sheet allows. */
export function bindWriting(form, say) {
  const fit = () => { say.style.height = "auto"; say.style.height = `${say.scrollHeight + 4}px`; };
  if (!CSS.supports("field-sizing", "content")) say.addEventListener("input", fit);
  const box = $("[data-prompt-box]", form);
  bindPrompts(say, box);
  say.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || isComposing(event)) return;
    event.preventDefault();
    // A saved prompt replaces its bare name; anything else that begins with “/” is a message.
    const first = /^\/\S*$/.test(say.value) && !box.hidden && $(".prompt-row button", box);
    if (first) first.click(); else form.requestSubmit($("[data-send]", form));
  });
}

function bindPrompts(say, box) {
  let prompts = null;
  const close = () => { box.hidden = true; box.replaceChildren(); };
  const button = (text, act) => {
    const made = make("button", { type: "button", className: "quiet", textContent: text });
    made.addEventListener("click", act);
    return made;
  };
  say.addEventListener("input", async () => {
    if (!/^\/[^\n/]*$/.test(say.value)) { close(); return; } // a path is not a command
    prompts ??= await ask("GET", "/api/rooms/prompts").catch(() => []);
    if (!/^\/[^\n/]*$/.test(say.value)) { close(); return; }
    const word = say.value.slice(1).toLowerCase();
    const found = prompts.filter((each) => each.name.toLowerCase().includes(word)).slice(0, 8);
    const rows = found.map((each) => {
      const row = make("div", { className: "prompt-row" });
      row.append(button(each.name, () => { say.value = each.text; close(); say.focus(); say.dispatchEvent(new Event("input", { bubbles: true })); }),
        Object.assign(button("×", async () => {
          await ask("DELETE", `/api/rooms/prompts/${each.id}`);
          prompts = null;
          toast(`Deleted /${each.name}`);
          say.dispatchEvent(new Event("input"));
        }), { ariaLabel: `Delete /${each.name}` }));
      return row;
    });
    const [, name, text] = /^\/([\p{L}\p{N}_-]+)\s+(\S.*)$/u.exec(say.value) ?? [];
    const help = make("p", { className: "help" });
    help.textContent = rows.length && !text ? "Choose a prompt; Enter inserts the first."
      : text ? "Enter sends this as a message." : prompts.length ? "No prompt with this name. Enter sends this as a message." : "No saved prompts yet. Type /name and the text to save one.";
    box.replaceChildren(help, ...rows);
    if (text) {
      box.append(button(`Save as /${name}`, async () => {
        prompts = await ask("PUT", "/api/rooms/prompts", { name, text });
        say.value = text;
        close();
        say.focus();
        toast(`Saved as /${name}`);
      }));
    }
    box.hidden = false;
  });
  say.addEventListener("keydown", (event) => { if (event.key === "Escape" && !box.hidden) { event.preventDefault(); event.stopPropagation(); close(); } });
}

/** A message that is being written, kept across reloads until it is sent. */
export class Draft {
  constructor(name, say, files) {
    Object.assign(this, { key: `trellis:draft:${name}`, say, files });
    try {
      const kept = JSON.parse(localStorage.getItem(this.key) ?? "null");
      if (kept) {
        say.value ||= kept.text; // the browser or the server may have restored it
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

  /** Forget the draft of a first message that is in its chat now. */
  static dropSent(texts) {
    try {
      const kept = JSON.parse(localStorage.getItem("trellis:draft:new") ?? "null");
      if (kept && texts.includes(kept.text.trim())) localStorage.removeItem("trellis:draft:new");
    } catch { /* forbidden */ }
  }
}

/** Let any step of a session be chosen. */
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
      const chosen = select.selectedOptions[0]; // another may have been chosen meanwhile
      for (const old of $$("optgroup[data-steps]", select)) { // the chosen one stays
        if (old.contains(chosen)) select.prepend(chosen);
        old.remove();
      }
      if (!versions.length) return;
      const group = make("optgroup", { label: "Steps, newest first" });
      group.dataset.steps = "";
      for (const each of versions) {
        if (each.name === chosen.value) { group.append(chosen); continue; }
        const about = [each.head && "current", each.newest && "newest"].filter(Boolean).join(", ");
        group.append(new Option(`${each.label}${about ? ` (${about})` : ""}`, each.name));
      }
      select.prepend(group);
      chosen.selected = true; // listing the steps selects none
      select.focus();
      try { select.showPicker?.(); } catch { /* not allowed here: the user opens the list */ }
    });
  }
}

/** Letters typed outside of a field go into the message, on every page of chat. */
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
