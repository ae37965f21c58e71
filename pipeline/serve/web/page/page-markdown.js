// The marks that models write, as elements: code, lists, tables, headings, bold and italic text. Everything else is text.
// Elements are made one by one and filled with text nodes: no text is ever read as markup, and no link is made.

import { element } from "./page-element.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8; // lists in lists and marks in marks, so that no text exhausts the stack

/** Split a text into blocks `{kind, source, ...}`; a text that grows changes no block but the last. */
export function blocksOf(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (ITEM.test(line)) return listAt(lines, at);
  if (QUOTE.test(line)) {
    const end = runEnd(lines, at, (other) => QUOTE.test(other));
    return [{ kind: "quote", text: lines.slice(at, end).map((quoted) => quoted.replace(QUOTE, "")).join("\n") }, end];
  }
  if (tableBegins(lines, at)) {
    const end = runEnd(lines, at + 2, (other) => other.includes("|"));
    return [{ kind: "table", head: cells(line), rows: lines.slice(at + 2, end).map(cells) }, end];
  }
  const end = runEnd(lines, at + 1, (other, index) => other.trim() && !interrupts(lines, index));
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

function codeAt(lines, at, [, indent, mark, language]) {
  const closes = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(at + 1, end).map((line) => line.replace(strip, "")).join("\n");
  return [{ kind: "code", language: language.trim(), text }, Math.min(end + 1, lines.length)];
}

function listAt(lines, at) {
  let end = at + 1;
  let fenced = "";
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const fence = /^\s+(`{3,}|~{3,})/.exec(line);
    if (fenced) fenced = fence?.[1].startsWith(fenced) ? "" : fenced; // code of an item, blank lines and all
    else if (fence) fenced = fence[1];
    else if (!ITEM.test(line) && !/^\s{2,}\S/.test(line)) {
      if (line.trim()) break;
      const next = lines[runEnd(lines, end, (other) => !other.trim())] ?? "";
      if (!ITEM.test(next) && !/^\s{2,}\S/.test(next)) break;
    }
  }
  return [{ kind: "list", lines: lines.slice(at, end) }, end];
}

function runEnd(lines, at, belongs) {
  let end = at;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return end;
}

function interrupts(lines, at) {
  const begins = [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(lines[at]));
  return begins || tableBegins(lines, at);
}

function tableBegins(lines, at) {
  return lines[at].includes("|") && lines[at + 1]?.includes("-") && DIVIDER.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** The element of a block. */
export function render(block, depth = 0) {
  switch (block.kind) {
    case "code": return code(block);
    case "rule": return element("hr");
    case "heading": return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text)); // below the page’s own
    case "list": return list(block.lines, depth);
    case "quote": return element("blockquote", {}, ...nested(block.text, depth));
    case "table": return table(block);
    default: return element("p", {}, ...inline(block.text));
  }
}

function nested(text, depth) {
  if (depth >= DEEPEST) return [text];
  return blocksOf(text).map((block) => render(block, depth + 1));
}

function code({ language, text }) {
  const shown = element("pre", { tabindex: "0" }, element("code", {}, text));
  const copy = element("button", { type: "button", class: "small", "data-copy": "code" }, "Copy");
  return element("div", { class: "code" }, element("div", { class: "code-head" }, language || "text", copy), shown);
}

function list(lines, depth) {
  const [, outer, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const items = [];
  let fenced = false;
  for (const line of lines) {
    const item = fenced ? null : ITEM.exec(line);
    if (/^\s+(`{3,}|~{3,})/.test(line)) fenced = !fenced;
    if (item && item[1].length <= outer.length + 1) {
      items.push({ lines: [item[3]], width: item[1].length + item[2].length + 1, number: parseInt(item[2], 10) });
    } else {
      const { lines: own, width } = items.at(-1);
      own.push(line.slice(Math.min(width, line.length - line.trimStart().length)));
    }
  }
  const start = ordered && items[0].number !== 1 ? { start: String(items[0].number) } : {};
  return element(ordered ? "ol" : "ul", start, ...items.map((item) => element("li", {}, ...itemContent(item.lines, depth))));
}

function itemContent(lines, depth) {
  const parts = nested(lines.join("\n"), depth);
  const [first] = parts;
  // A tight item is a line, not a paragraph.
  return first?.tagName === "P" ? [...first.childNodes, ...parts.slice(1)] : parts;
}

function table({ head, rows }) {
  const row = (tag, texts) => element("tr", {}, ...head.map((_, index) => element(tag, {}, ...inline(texts[index] ?? ""))));
  const body = element("tbody", {}, ...rows.map((texts) => row("td", texts)));
  const whole = element("table", {}, element("thead", {}, row("th", head)), body);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, whole);
}

const MARKS = [["**", "strong"], ["~~", "s"], ["*", "em"]];

/** Text with marks as nodes. Each kind of mark that is never closed is looked for once, so that time is linear. */
export function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set();
  let plain = "";
  let at = 0;
  const push = (tag, children, end) => {
    if (plain) nodes.push(plain);
    nodes.push(element(tag, {}, ...children));
    plain = "";
    at = end;
  };
  while (at < text.length) {
    const next = /[`*~\\]/.exec(text.slice(at, at + 512));
    const skip = next ? next.index : Math.min(512, text.length - at);
    plain += text.slice(at, at + skip);
    at += skip;
    if (!next) continue;
    if (text[at] === "\\" && /[\\`*_{}[\]()#+\-.!|<>~$]/.test(text[at + 1] ?? "")) {
      const escaped = text[at + 1];
      plain += "([)]".includes(escaped) ? text.slice(at, at + 2) : escaped; // \( and \[ begin formulas
      at += 2;
      continue;
    }
    if (text[at] === "`") {
      const run = /^`+/.exec(text.slice(at))[0];
      const end = unclosed.has(run) ? -1 : runAt(text, at + run.length, run);
      if (end >= 0) {
        const inner = text.slice(at + run.length, end);
        push("code", [/^ .*[^ ].* $/s.test(inner) ? inner.slice(1, -1) : inner], end + run.length);
      } else {
        unclosed.add(run);
        plain += run;
        at += run.length;
      }
      continue;
    }
    const mark = MARKS.find(([sign]) => text.startsWith(sign, at));
    const end = mark && depth < DEEPEST && !unclosed.has(mark[0]) ? closing(text, at, mark[0]) : -1;
    if (end >= 0) {
      push(mark[1], inline(text.slice(at + mark[0].length, end), depth + 1), end + mark[0].length);
    } else {
      if (mark && end === -2) unclosed.add(mark[0]);
      plain += mark ? mark[0] : text[at];
      at += mark ? mark[0].length : 1;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** Where a run of exactly these backticks is next; -1 when nowhere. */
function runAt(text, from, run) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let found = runs.exec(text); found; found = runs.exec(text)) {
    if (found[0] === run) return found.index;
  }
  return -1;
}

/** Where what opens at `at` closes: -1 when it opens nothing, -2 when nothing closes it. */
function closing(text, at, sign) {
  const begin = at + sign.length;
  if (!/\S/.test(text[begin] ?? " ")) return -1;
  for (let end = text.indexOf(sign, begin + 1); end >= 0; end = text.indexOf(sign, end + 1)) {
    if (/\s/.test(text[end - 1])) continue;
    if (sign !== "*") return end + (text[end + 2] === "*" && sign === "**" ? 1 : 0);
    if (text[end + 1] !== "*" && text[end - 1] !== "*") return end;
  }
  return -2;
}
