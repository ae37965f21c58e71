// The server's API: which models there are, and an answer as it streams.
// Paths are relative, so that a proxy may serve the page below a prefix.

const STORED = "qwen-onnx-api-key";
let held = ""; // where a browser refuses to store

/** What the server, or the way to it, refused. `message` is the server's own. */
export class Refusal extends Error {
  constructor(message, { status = 0, code = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** The API key of this tab; empty when there is none. */
export function apiKey() {
  try {
    return sessionStorage.getItem(STORED) ?? held;
  } catch {
    return held;
  }
}

/** Keep a key until the tab is closed; an empty one is forgotten. */
export function keepKey(key) {
  held = key;
  try {
    if (key) sessionStorage.setItem(STORED, key);
    else sessionStorage.removeItem(STORED);
  } catch {
    // It is held in memory then.
  }
}

/** The models that are served, as `/v1/models` lists them. */
export async function listModels() {
  const response = await request("v1/models");
  const answer = await response.json().catch(() => null);
  if (!Array.isArray(answer?.data)) throw new Refusal("The server’s list of models is not one.", { status: response.status });
  return answer.data;
}

/** The chunks of a streamed chat completion. Throws a Refusal; or an AbortError, once `signal` is aborted. */
export async function* complete(body, signal) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const data of reachable(messages(response.body), signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw refusal(chunk.error, 0);
    yield chunk;
  }
  throw new Refusal("The connection ended before the answer did.");
}

/** The data of server-sent events, wherever the bytes are cut. */
export async function* messages(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a return at the very end may be half of a line’s end
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening closes the connection
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refusal("The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw refusal(answer?.error, response.status, response.headers.get("Retry-After"));
}

async function* reachable(stream, signal) {
  try {
    yield* stream;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The connection to the server was lost.");
  }
}

function refusal(error, status, after = null) {
  const message = typeof error === "string" ? error : error?.message;
  return new Refusal(message || (status ? `The server answered with status ${status}.` : "The server failed."), {
    status,
    code: error?.code || error?.type || "",
    retryAfter: after === null ? null : seconds(after),
  });
}

/** Seconds of a Retry-After header, which may be a date. */
function seconds(value) {
  const number = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(number) ? Math.max(1, Math.ceil(number)) : null;
}
