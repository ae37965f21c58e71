// A conversation as data: turns, what a chunk adds to one, and the messages that the server is sent. No document here.

export function question(text, images = []) {
  return { role: "user", text, images };
}

/** The answer to a tool call. */
export function result(call, text) {
  return { role: "tool", id: call.id, name: call.name, text };
}

/** An answer that has not begun. Times are in seconds since it was asked for. */
export function answer(model) {
  return {
    role: "assistant", model, text: "", thoughts: "", calls: [],
    finish: null, usage: null, first: null, thought: null, last: null, error: null, stopped: false, running: true,
  };
}

/** Add a chunk of a stream to an answer. */
export function add(turn, chunk, now) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: thoughts, tool_calls: calls } = choice.delta ?? {};
  if (content || thoughts || calls?.length) {
    turn.first ??= now;
    turn.last = now;
  }
  if (thoughts) turn.thoughts += thoughts;
  if ((content || calls?.length) && turn.thoughts) turn.thought ??= now;
  if (content) turn.text += content;
  for (const part of calls ?? []) {
    const call = (turn.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name += part.function.name;
    if (part.function?.arguments) call.arguments += part.function.arguments;
  }
  if (choice.finish_reason) turn.finish = choice.finish_reason;
}

/** The calls of an answer that came whole: half a call is neither answered nor sent back. */
export function wholeCalls(turn) {
  return turn.role === "assistant" && turn.finish && turn.finish !== "length" ? turn.calls.filter(Boolean) : [];
}

/** The calls at the end of a conversation that wait for results. */
export function openCalls(turns) {
  const last = turns.findLastIndex((turn) => turn.role === "assistant");
  if (last < 0 || turns[last].running || turns.slice(last).some((turn) => turn.role === "user")) return [];
  const answered = new Set(turns.slice(last + 1).map((turn) => turn.id));
  return wholeCalls(turns[last]).filter((call) => !answered.has(call.id));
}

/** A conversation as the chat completions API takes it. */
export function messagesOf(system, turns) {
  const begin = system.trim() ? [{ role: "system", content: system }] : [];
  return [...begin, ...turns.map(message).filter(Boolean)];
}

function message(turn) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.id, content: turn.text };
  if (turn.role === "user") {
    if (!turn.images.length) return { role: "user", content: turn.text };
    const pictures = turn.images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role: "user", content: turn.text ? [...pictures, { type: "text", text: turn.text }] : pictures };
  }
  const calls = wholeCalls(turn).map(({ id, name, arguments: given }) => ({
    id, type: "function", function: { name, arguments: given },
  }));
  if (!turn.text && !calls.length) return null; // nothing was said: an error, or stopped at once
  return {
    role: "assistant",
    content: turn.text || null,
    ...(turn.thoughts && { reasoning_content: turn.thoughts }), // templates keep those that belong to open calls
    ...(calls.length && { tool_calls: calls }),
  };
}

const SHORTEST = 0.1; // seconds; text that came at once tells no speed

/** What is told below an answer: tokens and speed. */
export function figures({ usage, first, last, thought, thoughts }) {
  const told = [];
  const count = usage?.completion_tokens;
  const reasoned = usage?.completion_tokens_details?.reasoning_tokens;
  if (count !== undefined) told.push(`${number(count)} ${count === 1 ? "token" : "tokens"}`);
  if (count !== undefined && reasoned) told.push(`${number(reasoned)} of them thoughts`);
  if (count > 1 && last - first > SHORTEST) told.push(`${number((count - 1) / (last - first), 1)} tokens/s`);
  if (first !== null) told.push(`first token after ${duration(first)}`);
  if (usage?.prompt_tokens !== undefined) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    told.push(`prompt ${number(usage.prompt_tokens)} tokens${cached ? `, ${number(cached)} cached` : ""}`);
  }
  return told;
}

export function duration(seconds) {
  return seconds < 9.95 ? `${number(seconds, seconds < 0.995 ? 2 : 1)} s` : `${number(seconds)} s`;
}

function number(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
