// The page on which a chat begins: its first message, with files.

import { bindSteps, bindWriting, chosenModels, Draft } from "./composer.js";
import { Files } from "./files.js";
import { $, ask, toast } from "../page.js";

export function bindStart(root) {
  const form = $("[data-composer]", root), say = $("[data-say]", root);
  bindWriting(form, say);
  bindSteps(form);
  const files = new Files(root, form, say, (name) => `/api/rooms/new/files?name=${encodeURIComponent(name)}`);
  const draft = new Draft("new", say, files);
  form.addEventListener("submit", async (event) => {
    if (!files.list.length) return; // the draft is dropped when the chat shows the message
    event.preventDefault();
    if (files.coming) { delete form.dataset.sent; toast("Still uploading.", { more: "Send when the file is attached." }); return; }
    if (form.dataset.sending) return;
    form.dataset.sending = "1";
    try {
      location.href = await begin(form, say.value, files.list);
      draft.clear();
    } catch (error) {
      toast(error.told?.message ?? "The message was not sent.", { more: error.told?.next_step ?? "Try again.", error: true });
    } finally {
      delete form.dataset.sending;
      delete form.dataset.sent; // it may be pressed again
    }
  });
}

/** Create a chat, upload the files, send the first message. Each step is done once, however often it is tried. */
async function begin(form, text, files) {
  const request = $("[name=request]", form).value;
  const models = chosenModels(form);
  const once = (key) => ({ headers: { "content-type": "application/json", "idempotency-key": key } });
  const room = await ask("POST", "/api/rooms", { models }, once(request));
  for (const each of files) each.sent ??= (await ask("POST", `/api/rooms/${room.id}/files?name=${encodeURIComponent(each.name)}`, each.file)).id;
  await ask("POST", `/api/rooms/${room.id}/messages`, { text, models, attachments: files.map((each) => each.sent) }, once(`${request}-first`));
  return `/chat/${room.id}`;
}
