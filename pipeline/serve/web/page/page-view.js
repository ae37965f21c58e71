// Turns as elements. What happens to them is told as `data-act` on buttons, which the page listens for in one place.

import { element } from "./page-element.js";
import { blocksOf, render } from "./page-markdown.js";
import { duration, figures, openCalls, wholeCalls } from "./page-turns.js";

let numbers = 0;

/** Text with marks that grows: blocks that are final are left alone, so that a long answer costs no more a token. */
export class Growing {
  constructor() {
    this.node = element("div", { class: "text", dir: "auto" });
    this.shown = [];
  }

  /** Show a text; returns the nodes of blocks that became final. */
  show(text) {
    const blocks = blocksOf(text);
    let same = 0;
    while (same < this.shown.length && this.shown[same].source === blocks[same]?.source) same += 1;
    const [old, grown] = [this.shown[same], blocks[same]];
    if (old?.kind === "code" && grown?.kind === "code" && old.language === grown.language) {
      this.node.children[same].querySelector("code").textContent = grown.text; // keeps its place when it is scrolled
      same += 1;
    }
    while (this.node.children.length > same) this.node.lastElementChild.remove();
    this.node.append(...blocks.slice(same).map((block) => render(block)));
    this.shown = blocks;
  }

  /** What to read aloud from the block `from` on; the last one only when it is whole. */
  spoken(from, whole) {
    const nodes = [...this.node.children].slice(from, whole ? undefined : -1);
    return nodes.map((node) => node.querySelector(":scope > pre")?.textContent ?? node.textContent);
  }
}

/** The element of a turn, with `update()` for answers that grow. */
export function turnView(turn) {
  if (turn.role === "user") return questionView(turn);
  if (turn.role === "tool") return resultView(turn);
  return answerView(turn);
}

function article(kind, title, ...children) {
  const id = `turn-${(numbers += 1)}`;
  return element("article", { class: `turn ${kind}`, "aria-labelledby": id }, element("h2", { id }, title), ...children);
}

function action(act, label) {
  return element("button", { type: "button", class: "small", "data-act": act }, label);
}

function questionView(turn) {
  const pictures = turn.images.map((url, index) => element("img", { src: url, alt: `Picture ${index + 1} of the question` }));
  const body = element("div", { class: "body" },
    turn.images.length ? element("div", { class: "pictures" }, ...pictures) : null,
    turn.text ? element("div", { class: "plain", dir: "auto" }, turn.text) : null);
  const actions = element("div", { class: "actions" }, action("edit", "Edit"), action("copy", "Copy"));
  return { node: article("user", "You", body, actions), update() {} };
}

/** Put a field in the place of a question’s text. */
export function editQuestion(node, turn) {
  const field = element("textarea", { "aria-label": "Question, edited", rows: "3", dir: "auto" });
  field.value = turn.text;
  const save = element("button", { type: "button", class: "primary", "data-act": "resend" }, "Send again");
  const form = element("div", { class: "editing" }, field,
    element("div", { class: "actions" }, save, action("cancel", "Cancel")));
  node.classList.add("edited");
  node.append(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
  return field;
}

function resultView(turn) {
  const shown = element("pre", { dir: "auto", tabindex: "0" }, turn.text || " ");
  return { node: article("result", `Result of ${turn.name}`, shown), update() {} };
}

function answerView(turn) {
  const thoughts = element("div", { class: "plain thoughts", dir: "auto" });
  const summary = element("summary");
  const thinking = element("details", { class: "thinking", hidden: true }, summary, thoughts);
  const text = new Growing();
  const calls = element("div", { class: "calls" });
  const waiting = element("p", { class: "waiting" });
  const fault = element("div");
  const told = element("p", { class: "figures" });
  const actions = element("div", { class: "actions" });
  const node = article("assistant", turn.model, thinking, text.node, calls, waiting, fault, told, actions);

  const update = (turns) => {
    thinking.hidden = !turn.thoughts;
    summary.textContent = thinkingTitle(turn);
    grow(thoughts, turn.thoughts);
    text.show(turn.text);
    showCalls(calls, turn);
    waiting.hidden = !turn.running || turn.first !== null;
    waiting.textContent = "Reading the prompt…";
    node.setAttribute("aria-busy", String(turn.running));
    if (turn.running) return;
    told.replaceChildren(...figures(turn).map((figure) => element("span", {}, figure)));
    fault.replaceChildren(...faults(turn));
    actions.replaceChildren(...(turn.text ? [action("copy", "Copy")] : []), action("again", "Regenerate"));
    const open = openCalls(turns);
    const mine = wholeCalls(turn).filter((call) => open.includes(call));
    if (mine.length && !node.querySelector(".results")) calls.after(resultsForm(mine));
    if (!mine.length) node.querySelector(".results")?.remove();
  };
  return { node, update, text };
}

/** Append what is new of a text; what is there stays selected. */
function grow(node, text) {
  const shown = node.textContent;
  if (text.startsWith(shown)) {
    if (text.length > shown.length) node.append(text.slice(shown.length));
  } else {
    node.textContent = text;
  }
}

function thinkingTitle(turn) {
  if (turn.thought !== null) return `Thought for ${duration(turn.thought - turn.first)}`;
  if (turn.running) return "Thinking…";
  return turn.last === null ? "Thoughts" : `Thought for ${duration(turn.last - turn.first)}`;
}

function showCalls(place, turn) {
  turn.calls.filter(Boolean).forEach((call, index) => {
    const [name, given] = [call.name, whole(turn) ? pretty(call.arguments) : call.arguments];
    const shown = place.children[index] ?? place.appendChild(element("section", { class: "call" },
      element("p", {}, "Calls ", element("code", {})), element("pre", { tabindex: "0" })));
    shown.setAttribute("aria-label", `Call of ${name}`);
    shown.querySelector("code").textContent = name;
    shown.querySelector("pre").textContent = given;
  });
}

function whole(turn) {
  return turn.finish !== null;
}

/** Arguments on lines of their own, unless that changed more than white space: a long number loses digits. */
function pretty(given) {
  const bare = (text) => text.replace(/\s/g, "");
  try {
    const laid = JSON.stringify(JSON.parse(given), null, 2);
    return bare(laid) === bare(given) ? laid : given;
  } catch {
    return given; // as the model wrote it
  }
}

function resultsForm(calls) {
  const fields = calls.map((call, index) => {
    const id = `result-${(numbers += 1)}`;
    const label = calls.length > 1 ? `Result of ${call.name} (call ${index + 1})` : `Result of ${call.name}`;
    return element("div", {}, element("label", { for: id }, label),
      element("textarea", { id, rows: "2", "data-call": call.id, spellcheck: "false", placeholder: '{"answer": 42}' }));
  });
  const send = element("button", { type: "button", class: "primary", "data-act": "results" }, calls.length > 1 ? "Send results" : "Send result");
  return element("div", { class: "results" }, ...fields, element("div", { class: "actions" }, send));
}

function* faults(turn) {
  if (turn.stopped) yield element("p", { class: "note" }, turn.first === null ? "Stopped before the first token." : "Stopped.");
  if (turn.finish === "length") yield element("p", { class: "note" }, "Cut: the answer reached its limit of tokens, or the context is full.");
  if (turn.finish && !turn.text && !turn.calls.length && !turn.error) {
    yield element("p", { class: "note" }, turn.thoughts ? "The model thought, and gave no answer." : "The model’s answer is empty.");
  }
  if (!turn.error) return;
  const { message, status, code, retryAfter } = turn.error;
  const details = [status ? `Status ${status}` : "", code].filter(Boolean).join(", ");
  yield element("div", { class: "error", role: "alert" },
    element("p", { class: "plain" }, message),
    details ? element("p", { class: "quiet" }, details) : null,
    retryAfter ? element("p", {}, `The server asks to try again in ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}.`) : null);
}
