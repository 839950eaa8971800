// Files that are attached to a message.

import { chosenModels } from "./composer.js";
import { $, ask, bytes, make, toast } from "../page.js";

const MOST_BYTES = 12e6; // what the server reads of one file

/** Throws an Error for a folder, a file that is gone, and one that is far too large: the server would not see them. */
async function requireReadable(file) {
  if (file.size > MOST_BYTES) {
    throw Object.assign(new Error(), { told: { message: `It is ${bytes(file.size)}; the limit is ${bytes(MOST_BYTES)}.`, next_step: "Choose a smaller file, or part of it." } });
  }
  try { await file.slice(0, 1).arrayBuffer(); } catch (cause) {
    throw Object.assign(new Error("", { cause }), { told: { message: "It can't be read: it is a folder, or it was moved or changed.", next_step: "Choose the files themselves." } });
  }
}

/** The attached files. One that cannot be used is refused at once, alone. */
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
    const models = chosenModels(this.form).map((each) => `&model=${encodeURIComponent(each)}`).join("");
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
        const more = error.offline ? "Attach it again when the connection is back." : error.told.next_step;
        toast(`“${entry.name}” was not attached. ${error.told.message}`, { more, error: true });
      }
      this.show();
    }
    return all;
  }

  show() {
    $("[data-chips]", this.form).replaceChildren(...this.list.map((file) => {
      const chip = make("li", { className: "chip" });
      const remove = make("button", { type: "button", className: "quiet", textContent: "×", ariaLabel: `Remove ${file.name}` });
      remove.addEventListener("click", () => this.set(this.list.filter((each) => each !== file)));
      chip.append(make("span", { textContent: file.coming ? `${file.name} …` : file.name }), remove);
      return chip;
    }));
    this.onChange();
  }
}
