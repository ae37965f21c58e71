// Ask a package for processors a question, in Node, without onnxruntime-genai: node chat.mjs DIR "What is ONNX?" [TOKENS]
//
//   npm install onnxruntime-node @huggingface/tokenizers @huggingface/jinja
//
// The graph keeps no state: what it computed for earlier tokens (keys and values, `present.*`) is given back to it with
// the next token (`past_key_values.*`). Answers are greedy: the most likely token, each time.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

const [dir, question, limit = "200"] = process.argv.slice(2);
if (question === undefined) {
  console.error("usage: node chat.mjs DIR QUESTION [TOKENS]");
  process.exit(2);
}
const json = (name) => JSON.parse(readFileSync(join(dir, name), "utf8"));
const { model } = json("genai_config.json");
const { inputs, outputs } = model.decoder;
const ends = new Set([model.eos_token_id].flat());

const tokenizer = new Tokenizer(json("tokenizer.json"), json("tokenizer_config.json"));
const template = new Template(readFileSync(join(dir, "chat_template.jinja"), "utf8"));
const text = template.render({ messages: [{ role: "user", content: question }], add_generation_prompt: true });
let fresh = tokenizer.encode(text, { add_special_tokens: false }).ids;

const session = await ort.InferenceSession.create(join(dir, model.decoder.filename));
const past = session.inputNames.filter((name) => name !== inputs.input_ids && name !== inputs.attention_mask);
const names = (pattern) => Array.from({ length: model.decoder.num_hidden_layers }, (_, i) => pattern.replace("%d", i));
const pairs = [
  ...names(inputs.past_key_names).map((name, i) => [name, names(outputs.present_key_names)[i]]),
  ...names(inputs.past_value_names).map((name, i) => [name, names(outputs.present_value_names)[i]]),
];
if (past.some((name) => name !== inputs.position_ids && !pairs.some(([known]) => known === name))) {
  throw new Error(`this sample does not know some inputs of the graph: ${past.join(", ")}`);
}
if (session.inputMetadata.find((input) => input.name === pairs[0][0]).type !== "float32") {
  throw new Error("this sample is for graphs with float32 activations, such as those for processors");
}
const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const empty = [1, model.decoder.num_key_value_heads, 0, model.decoder.head_size];
const feeds = Object.fromEntries(pairs.map(([name]) => [name, new ort.Tensor("float32", new Float32Array(0), empty)]));

const answer = [];
let seen = 0;
let shown = "";
while (answer.length < Number(limit)) {
  const places = fresh.map((_, i) => seen + i);
  seen += fresh.length;
  feeds[inputs.input_ids] = integers(fresh);
  feeds[inputs.attention_mask] = integers(Array(seen).fill(1));
  if (session.inputNames.includes(inputs.position_ids)) feeds[inputs.position_ids] = integers(places);
  const results = await session.run(feeds);
  const { data } = results[outputs.logits];
  const last = data.subarray(data.length - model.vocab_size); // of the last position, whether or not others came along
  const token = last.reduce((best, value, i) => (value > last[best] ? i : best), 0);
  if (ends.has(token)) break;
  for (const [name, present] of pairs) feeds[name] = results[present];
  answer.push(token);
  fresh = [token];
  const whole = tokenizer.decode(answer, { skip_special_tokens: true });
  if (!whole.endsWith("\ufffd")) {
    process.stdout.write(whole.slice(shown.length)); // a character may be several tokens
    shown = whole;
  }
}
process.stdout.write("\n");
