// The chat: what is asked, answered, stopped, asked again; settings, pictures, and the key.

import { apiKey, complete, keepKey, listModels, Refusal } from "./page-client.js";
import { element } from "./page-element.js";
import { add, answer, messagesOf, openCalls, question, result } from "./page-turns.js";
import { editQuestion, turnView } from "./page-view.js";

const EXAMPLE = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a city, now.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg"]); // what servers take; all else becomes PNG
const FAR = 60; // pixels from the end within which new text is followed

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const views = new WeakMap();
let models = [];
let turns = [];
let pictures = [];
let running = null; // of the answer that is being made: {turn, controller, heard}
let following = true; // whether the end is in view, and is to stay there
let afterKey = null; // what to do once there is a key

// Models.

async function loadModels() {
  at.trouble.replaceChildren();
  try {
    models = await listModels();
  } catch (error) {
    at.model.replaceChildren(element("option", {}, "None"));
    showTrouble(error);
    if (error.status === 401) askKey(loadModels);
    return;
  }
  const chosen = at.model.value;
  at.model.replaceChildren(...models.map((model) => {
    const chats = can("chat", model) !== false;
    return element("option", { value: model.id, disabled: !chats }, chats ? model.id : `${model.id} (does not chat)`);
  }));
  const usable = models.filter((model) => can("chat", model) !== false);
  at.model.disabled = !usable.length;
  if (usable.length) at.model.value = (usable.find((model) => model.id === chosen) ?? usable[0]).id;
  else showTrouble(new Refusal(models.length ? "None of the models that are served here chats." : "No model is served here."));
  showModel();
}

function showTrouble(error) {
  const retry = element("button", { type: "button" }, "Try again");
  retry.addEventListener("click", loadModels);
  at.trouble.replaceChildren(
    element("div", { class: "error", role: "alert" }, element("p", { class: "plain" }, String(error.message))), retry);
}

/** Whether a model has a capability; null where the server does not tell. */
function can(what, model = current()) {
  return Array.isArray(model?.capabilities) ? model.capabilities.includes(what) : null;
}

function current() {
  return models.find((model) => model.id === at.model.value);
}

function showModel() {
  at.thinking.hidden = can("thinking") === false;
  at.calling.hidden = can("tools") === false;
  at.attach.hidden = can("vision") === false;
  const context = current()?.context_length ?? current()?.max_model_len;
  const told = [];
  if (can("thinking")) told.push("thinks before it answers");
  if (can("tools")) told.push("calls tools");
  if (can("vision")) told.push("sees pictures");
  if (context) told.push(`remembers ${context.toLocaleString("en")} tokens`);
  at.about.textContent = current() ? [current().id, told.join(", ")].filter(Boolean).join(": ") : "";
  showControls();
}

// Asking.

/** The request’s fields beside its messages; null when one of them is wrong, which is then shown. */
function fields() {
  const given = { model: at.model.value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed", "thinking_budget"]) {
    const field = at[name];
    if (!field.checkValidity() && !field.closest("[hidden]:not(aside)")) {
      showSettings(true);
      field.reportValidity();
      return null;
    }
    if (field.value !== "" && !field.closest("[hidden]:not(aside)")) given[name] = field.valueAsNumber;
  }
  if (at.enable_thinking.value && !at.thinking.hidden) {
    given.chat_template_kwargs = { enable_thinking: at.enable_thinking.value === "true" };
  }
  if (at.calling.hidden || !at.tools.value.trim()) return given;
  const tools = readTools();
  if (!tools) {
    showSettings(true);
    at.tools.focus();
    return null;
  }
  if (tools.length) given.tools = tools;
  if (tools.length && at.tool_choice.value) given.tool_choice = at.tool_choice.value;
  return given;
}

/** The array in the field of tools; null when it is none, which is then told below it. */
function readTools() {
  let [tools, fault] = [null, ""];
  try {
    tools = at.tools.value.trim() ? JSON.parse(at.tools.value) : [];
    if (!Array.isArray(tools)) fault = "Tools are a JSON array: [{…}]";
  } catch (error) {
    fault = `This is not JSON: ${error.message}`;
  }
  at["tools-fault"].textContent = fault;
  at["tools-fault"].hidden = !fault;
  at.tools.setAttribute("aria-invalid", String(Boolean(fault)));
  return fault ? null : tools;
}

/** Let the model answer the conversation as it is; false when the settings are wrong. */
function ask() {
  const given = fields();
  if (!given) return false;
  const body = { ...given, messages: messagesOf(at.system.value, turns) };
  const turn = answer(given.model);
  turns.push(turn);
  running = { turn, controller: new AbortController(), heard: 0 };
  at.spoken.replaceChildren();
  notice();
  show(true);
  run(body, running);
  return true;
}

async function run(body, own) {
  const { turn, controller } = own;
  const begun = performance.now();
  let painting = false;
  try {
    for await (const chunk of complete(body, controller.signal)) {
      add(turn, chunk, (performance.now() - begun) / 1000);
      if (painting) continue;
      painting = true;
      requestAnimationFrame(() => {
        painting = false;
        if (turn.running) paint(own);
      });
    }
  } catch (error) {
    if (controller.signal.aborted) turn.stopped = true;
    else if (error instanceof Refusal) turn.error = error;
    else {
      console.error(error);
      turn.error = new Refusal(`The page failed: ${error.message}`);
    }
  }
  turn.running = false;
  if (running === own) running = null;
  showControls();
  if (!turns.includes(turn)) return; // cleared meanwhile
  paint(own);
  if (turn.error?.status === 401) askKey(() => again(turn));
  else if (openCalls(turns).length) at.turns.querySelector(".results textarea")?.focus();
}

function paint(own) {
  const { turn } = own;
  views.get(turn).update(turns);
  if (following) toEnd();
  const blocks = views.get(turn).text.spoken(own.heard, !turn.running);
  own.heard += blocks.length;
  if (!turn.running) blocks.push(...turn.calls.filter(Boolean).map((call) => `Calls ${call.name}`));
  // Blocks are read aloud when they are whole: pieces of words, or a paragraph again with every word, would not do.
  at.spoken.append(...blocks.map((block) => element("p", {}, block)));
}

function stop() {
  running?.controller.abort();
}

/** Ask for an answer anew; what came after it is dropped. */
function again(turn) {
  const index = turns.indexOf(turn);
  if (running || index < 0) return;
  const dropped = turns.splice(index);
  if (!ask()) {
    turns.push(...dropped);
    show();
  }
  at.question.focus();
}

function send() {
  const text = at.question.value;
  if (running || (!text.trim() && !pictures.length)) return;
  if (!current()) return notice("There is no model to ask.");
  if (openCalls(turns).length) {
    notice("The model waits for the result of its call. Answer it above, or regenerate.");
    at.turns.querySelector(".results textarea")?.focus();
    return;
  }
  if (pictures.length && can("vision") === false) return notice("This model does not see. Remove the pictures, or choose another.");
  turns.push(question(text.trim(), pictures));
  if (!ask()) {
    turns.pop();
    return;
  }
  at.question.value = "";
  pictures = [];
  showPictures();
}

function resend(turn, text) {
  if (running || (!text.trim() && !turn.images.length)) return;
  const index = turns.indexOf(turn);
  const dropped = turns.splice(index, turns.length, question(text.trim(), turn.images));
  if (!ask()) {
    turns.splice(index, 1, ...dropped);
    return;
  }
  at.question.focus();
}

function sendResults(form) {
  if (running) return;
  const calls = new Map(openCalls(turns).map((call) => [call.id, call]));
  const results = [...form.querySelectorAll("textarea")].map((field) => result(calls.get(field.dataset.call), field.value));
  turns.push(...results);
  if (ask()) at.question.focus();
  else turns.splice(-results.length);
}

function clear() {
  stop();
  const [before, typed] = [turns, at.question.value];
  turns = [];
  at.spoken.replaceChildren();
  show();
  at.question.focus();
  notice("The conversation was cleared.", "Undo", () => {
    if (running || turns.length) return;
    turns = before;
    at.question.value ||= typed;
    show(true);
    notice();
    at.question.focus();
  });
}

// What is seen.

/** Bring the elements of the turns in line with the conversation. */
function show(end = false) {
  const nodes = turns.map((turn) => {
    if (!views.has(turn)) views.set(turn, turnView(turn));
    return views.get(turn).node;
  });
  for (const node of [...at.turns.children]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, index) => {
    if (at.turns.children[index] !== node) at.turns.insertBefore(node, at.turns.children[index] ?? null);
  });
  for (const turn of turns) views.get(turn).update(turns);
  at.welcome.hidden = turns.length > 0;
  showControls();
  if (end) toEnd();
}

function showControls() {
  at.send.hidden = Boolean(running);
  at.stop.hidden = !running;
  at.clear.disabled = !turns.length;
  at.model.disabled = Boolean(running) || !models.some((model) => can("chat", model) !== false);
  for (const button of at.turns.querySelectorAll('[data-act]:not([data-act="copy"])')) button.disabled = Boolean(running);
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = at.conversation;
  return scrollHeight - scrollTop - clientHeight < FAR;
}

function toEnd() {
  following = true;
  at.conversation.scrollTop = at.conversation.scrollHeight;
}

function notice(text = "", label = "", act = null) {
  at.notice.replaceChildren(...(text ? [text] : []));
  if (!act) return;
  const button = element("button", { type: "button", class: "small" }, label);
  button.addEventListener("click", act);
  at.notice.append(" ", button);
}

function showSettings(open) {
  at.settings.hidden = !open;
  at.toggle.setAttribute("aria-expanded", String(open));
}

// Copying: browsers have a clipboard for pages on this machine or behind TLS only; elsewhere the old way is left.

async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { class: "hidden" });
    field.value = text;
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// Pictures.

async function attach(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  if (!images.length) return;
  if (can("vision") === false) return notice("This model does not see pictures.");
  notice();
  for (const file of images) {
    try {
      pictures.push(await encoded(file));
    } catch {
      notice(`${file.name} is no picture that this browser can read.`);
    }
  }
  showPictures();
}

/** A picture as a data URL, PNG or JPEG. */
async function encoded(file) {
  const bitmap = await createImageBitmap(file); // throws where it is no picture
  if (!SENT_AS_THEY_ARE.has(file.type)) {
    const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    return canvas.toDataURL("image/png");
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function showPictures() {
  at.attached.hidden = !pictures.length;
  at.attached.replaceChildren(...pictures.map((url, index) => {
    const remove = element("button", { type: "button", "aria-label": `Remove picture ${index + 1}` }, "×");
    remove.addEventListener("click", () => {
      pictures = pictures.filter((_, other) => other !== index);
      showPictures();
      at.question.focus();
    });
    return element("li", {}, element("img", { src: url, alt: `Picture ${index + 1}` }), remove);
  }));
}

// The key.

function askKey(then) {
  afterKey = then;
  at["key-fault"].hidden = !apiKey();
  at["key-fault"].textContent = apiKey() ? "The server does not take the key that was given." : "";
  at.key.value = "";
  if (!at["ask-key"].open) at["ask-key"].showModal();
  at.key.focus();
}

function useKey() {
  const key = at.key.value.trim();
  const odd = /[^\x21-\x7e]/.test(key); // no header carries it
  at["key-fault"].hidden = !odd;
  at["key-fault"].textContent = odd ? "A key has letters, digits and signs of ASCII only." : "";
  if (odd) return;
  keepKey(key);
  at["ask-key"].close();
  const then = afterKey;
  afterKey = null;
  if (!models.length) loadModels();
  else then?.();
}

// What people do.

at.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at.question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method’s Enter is its own
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || at["ask-key"].open) return;
  const editing = event.target.closest?.(".editing");
  if (running) {
    stop();
    at.question.focus();
  } else if (editing) {
    editing.querySelector('[data-act="cancel"]').click();
  }
});
at.conversation.addEventListener("scroll", () => { following = isAtEnd(); });
const resized = new ResizeObserver(() => { if (following && turns.length) toEnd(); }); // pictures load, the question grows
resized.observe(at.conversation);
resized.observe(at.turns);

at.stop.addEventListener("click", () => {
  stop();
  at.question.focus();
});
at.clear.addEventListener("click", clear);
at.toggle.addEventListener("click", () => showSettings(at.settings.hidden));
at.model.addEventListener("change", showModel);
at.tools.addEventListener("change", readTools);
at.example.addEventListener("click", () => {
  at.tools.value = JSON.stringify(EXAMPLE, null, 2);
  readTools();
});
at.parameters.addEventListener("submit", (event) => event.preventDefault());
at["change-key"].addEventListener("click", () => askKey(null));
at["key-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
at["key-cancel"].addEventListener("click", () => at["ask-key"].close());

at.turns.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const node = event.target.closest(".turn");
  const turn = turns.find((candidate) => views.get(candidate).node === node);
  if (!button || !turn) return;
  if (button.dataset.copy) return copy(button.closest(".code").querySelector("code").textContent, button);
  switch (button.dataset.act) {
    case "copy": return copy(turn.text, button);
    case "again": return again(turn);
    case "results": return sendResults(node.querySelector(".results"));
    case "edit": return edit(node, turn);
    case "resend": return resend(turn, node.querySelector(".editing textarea").value);
    case "cancel": return endEdit(node);
  }
});

function edit(node, turn) {
  const field = editQuestion(node, turn);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    resend(turn, field.value);
  });
}

function endEdit(node) {
  node.querySelector(".editing").remove();
  node.classList.remove("edited");
  node.querySelector('[data-act="edit"]').focus();
}

at.attach.addEventListener("click", () => at.files.click());
at.files.addEventListener("change", async () => {
  await attach(at.files.files);
  at.files.value = ""; // so that the same file can be chosen again
});
at.question.addEventListener("paste", (event) => {
  if (![...event.clipboardData.files].some((file) => file.type.startsWith("image/"))) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault(); // a dropped file would replace the page
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.remove("dropping");
  attach(event.dataTransfer.files);
});

showSettings(matchMedia("(min-width: 70rem)").matches);
showControls();
loadModels();
at.question.focus();
