// What every page shares: finding things, notices, announcements, errors in one shape, confirmations.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
export const LETTERS = "ABCDEFGH";
export const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

/** A notice in the corner. It replaces the last one, and an error that it has made old. */
export function toast(message, { more = "", error = false, kind = "" } = {}) {
  const box = make("div", { className: `toast ${error ? "error" : kind}` });
  box.append(...[message, more].filter(Boolean).map((text) => make("p", { textContent: text })));
  for (const old of $$(".toast")) old.remove();
  $(".toasts").append(box);
  setTimeout(() => box.remove(), error ? 9000 : 3000);
}

/** Say something to a screen reader alone. Streams of tokens never come here. */
export function announce(text) {
  const place = $("[data-announce]");
  if (place.textContent !== text) place.textContent = text;
}

export { size as bytes } from "./numbers.js";

/** Ask the JSON API. Throws an Error whose `told` is the error in the one shape. */
export async function ask(method, url, body, options = {}) {
  let answer;
  try {
    const headers = body instanceof Blob ? {} : { "content-type": "application/json" };
    answer = await fetch(url, { method, headers, body: body instanceof Blob || body === undefined ? body : JSON.stringify(body), ...options });
  } catch (cause) {
    throw Object.assign(new Error("Can’t reach the server."), { cause, offline: cause.name !== "AbortError", aborted: cause.name === "AbortError", told: { message: "Can’t reach the server.", next_step: "Retrying…" } });
  }
  const said = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok) throw Object.assign(new Error(said?.error?.message), { status: answer.status, told: said?.error ?? { message: "Something went wrong.", next_step: "Try again." }, said });
  return said;
}

/** When a part of the page is fetched again, keep forms marked with data-keep that hold unsent text, and details that are open. */
function keepWritten() {
  const written = (form) => $$("input, textarea", form).some((each) => each.value !== each.defaultValue);
  let kept = [], open = [];
  document.addEventListener("htmx:beforeSwap", (event) => {
    kept = $$("form[data-keep]", event.detail.target).filter(written);
    open = $$("details[id][open]", event.detail.target).map((details) => details.id);
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    for (const form of kept) {
      const fresh = $(`form[data-keep="${CSS.escape(form.dataset.keep)}"]`, event.detail.target);
      if (!fresh) continue;
      fresh.replaceWith(form);
      htmx.process(form); // its listeners went with the part that it stood in
    }
    kept = [];
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    if (!event.detail.successful || !event.target.matches?.("form[data-keep]")) return;
    $$("input, textarea", event.target).forEach((each) => { each.defaultValue = each.value; });
  });
}

/** A form marked with data-done says so when it was sent, on the page that comes next where it leads to another. */
function tellWhatWasDone() {
  const done = sessionStorage.getItem("done");
  sessionStorage.removeItem("done");
  if (done && !$("[data-refused]")) toast(done);
  document.addEventListener("htmx:afterRequest", (event) => {
    const form = event.detail.requestConfig?.elt; // which a swap may have taken from the page
    if (event.detail.successful && form?.dataset.done) toast(form.dataset.done);
  });
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.dataset.done && !form.hasAttribute("hx-post") && !event.defaultPrevented) sessionStorage.setItem("done", form.dataset.done);
  });
}

/** Copy text, and say so on the button that was pressed. */
export async function copyText(text, button) {
  try { await navigator.clipboard.writeText(text); } catch {
    const box = make("textarea", { value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  if (button.ariaLabel) { toast("Copied"); return; } // an icon has no words to change
  const said = button.textContent;
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = said === "Copied" ? "Copy" : said; }, 1200);
}

export function bindPage() {
  document.addEventListener("click", (event) => {
    if (event.target.matches?.("[data-copy-key]")) copyText($("[data-made-key]").textContent, event.target);
  });
  // htmx knows only the last button that was pressed inside a form; what was pressed may stand outside of it.
  document.addEventListener("htmx:configRequest", (event) => {
    const pressed = event.detail.triggeringEvent?.submitter;
    if (pressed?.name) event.detail.formData.set(pressed.name, pressed.value);
  });
  // Each action has a name of its own, so that a press that is sent twice is done once.
  const name = () => $$("[name=request]").forEach((input) => { input.value = crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0"); });
  name();
  document.addEventListener("htmx:afterRequest", name);

  document.addEventListener("htmx:responseError", (event) => {
    if (event.detail.xhr.status === 404 && event.target.closest("[data-session]")) {
      // The session is gone, or this was never one: the first page knows what there is.
      setTimeout(() => { location.href = "/"; }, 2500);
    }
    let error = { message: "Something went wrong.", next_step: "Try again." };
    try { error = JSON.parse(event.detail.xhr.responseText).error ?? error; } catch { /* not ours: the plain words stand */ }
    toast(error.message, { more: error.next_step, error: true });
  });
  document.addEventListener("htmx:sendError", () =>
    toast("Can’t reach the server.", { more: "Try again in a moment. Nothing is lost.", error: true }));

  document.addEventListener("submit", (event) => {
    const question = event.target.dataset?.confirm;
    if (question && !confirm(question)) event.preventDefault();
    else if ("once" in (event.target.dataset ?? {})) {
      // A second press of a button that starts something must not start two.
      if (event.target.dataset.sent) event.preventDefault();
      event.target.dataset.sent = "1";
      event.submitter?.setAttribute("aria-busy", "true");
    }
  });
  addEventListener("pageshow", () => $$("[data-once]").forEach((form) => {
    delete form.dataset.sent;
    $$("[aria-busy]", form).forEach((button) => button.removeAttribute("aria-busy"));
  }));

  // A notice of what was done is shown once.
  if (new URLSearchParams(location.search).has("done")) history.replaceState(null, "", location.pathname + location.hash);

  keepWritten();
  tellWhatWasDone();

  // A part of the page that is fetched again keeps the focus where it was.
  let focused = null;
  document.addEventListener("htmx:beforeSwap", (event) => {
    const at = document.activeElement;
    focused = event.detail.target?.contains(at)
      ? { target: event.detail.target, value: at.value, name: at.name, id: at.id, mark: at.dataset?.focus } : null;
  });
  document.addEventListener("htmx:afterSwap", () => { // not when it has settled: another part may be swapped meanwhile
    if (!focused) return;
    const { target, value, name, id, mark } = focused;
    focused = null;
    const same = (id && document.getElementById(id)) || (mark && $(`[data-focus="${CSS.escape(mark)}"]`, target))
      || (name && $$("button, input, select", target).find((each) => each.name === name && each.value === value));
    (same || $("button, a, input", target))?.focus({ preventScroll: true });
  });
}
