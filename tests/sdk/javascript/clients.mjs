// One call of an official JavaScript client through the proxy: what it got or how it failed, as one line of JSON.
//
//   clients.mjs CASE    with PROXY_BASE, PROXY_TOKEN, REQUEST_ID and the models' names in the environment
import { Ollama } from "ollama";
import OpenAI from "openai";

const { PROXY_BASE, PROXY_TOKEN, REQUEST_ID, CHAT, EMBED, FORBIDDEN } = process.env;
const headers = { "x-request-id": REQUEST_ID };
const ollama = new Ollama({ host: PROXY_BASE, headers: { ...headers, Authorization: `Bearer ${PROXY_TOKEN}` } });
const openai = new OpenAI({ baseURL: `${PROXY_BASE}/v1`, apiKey: PROXY_TOKEN, maxRetries: 0, defaultHeaders: headers });
const messages = [{ role: "user", content: "Hello!" }];

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

// Of a model, whichever list it is in.
function whatIsKnown({ id, name, capabilities, context_length, loaded, backends, alias_of }) {
  return { name: id ?? name, capabilities, context_length, loaded, backends, alias_of };
}

const cases = {
  async ollama_chat() {
    const reply = await ollama.chat({ model: CHAT, messages });
    return { text: reply.message.content, input: reply.prompt_eval_count, output: reply.eval_count, reason: reply.done_reason };
  },
  async ollama_chat_streamed() {
    const parts = await all(await ollama.chat({ model: CHAT, messages, stream: true }));
    const last = parts.at(-1);
    return { parts: parts.length, input: last.prompt_eval_count, output: last.eval_count, reason: last.done_reason };
  },
  async ollama_generate() {
    const reply = await ollama.generate({ model: CHAT, prompt: "Hello!" });
    return { text: reply.response, input: reply.prompt_eval_count, output: reply.eval_count, reason: reply.done_reason };
  },
  async ollama_embed() {
    const reply = await ollama.embed({ model: EMBED, input: ["one", "two"] });
    return { vectors: reply.embeddings.length, input: reply.prompt_eval_count };
  },
  async ollama_list() {
    return { models: (await ollama.list()).models.map((model) => model.name) };
  },
  async ollama_view() {
    const { models } = await ollama.list();
    const shown = await ollama.show({ model: CHAT });
    const running = (await ollama.ps()).models.map((model) => model.name);
    return { models: models.map(whatIsKnown), running, family: shown.details.family, capabilities: shown.capabilities, version: (await ollama.version()).version };
  },
  async ollama_refused() {
    return { text: (await ollama.chat({ model: FORBIDDEN, messages })).message.content };
  },
  async openai_chat() {
    const reply = await openai.chat.completions.create({ model: CHAT, messages });
    const { usage, choices } = reply;
    return { text: choices[0].message.content, input: usage.prompt_tokens, output: usage.completion_tokens, reason: choices[0].finish_reason };
  },
  async openai_chat_streamed() {
    const runner = openai.chat.completions.stream({ model: CHAT, messages, stream_options: { include_usage: true } });
    const reply = await runner.finalChatCompletion();
    const { usage, choices } = reply;
    return { text: choices[0].message.content, input: usage.prompt_tokens, output: usage.completion_tokens, reason: choices[0].finish_reason };
  },
  async openai_completion() {
    const reply = await openai.completions.create({ model: CHAT, prompt: "Hello!" });
    const { usage, choices } = reply;
    return { text: choices[0].text, input: usage.prompt_tokens, output: usage.completion_tokens, reason: choices[0].finish_reason };
  },
  async openai_response() {
    const reply = await openai.responses.create({ model: CHAT, input: "Hello!" });
    return { text: reply.output_text, input: reply.usage.input_tokens, output: reply.usage.output_tokens };
  },
  async openai_response_streamed() {
    const reply = await openai.responses.stream({ model: CHAT, input: "Hello!" }).finalResponse();
    return { text: reply.output_text, input: reply.usage.input_tokens, output: reply.usage.output_tokens };
  },
  async openai_embeddings() {
    const reply = await openai.embeddings.create({ model: EMBED, input: ["one", "two"] });
    return { vectors: reply.data.length, numbers: reply.data[0].embedding.length, input: reply.usage.prompt_tokens };
  },
  async openai_models() {
    return { models: (await all(openai.models.list())).map((model) => model.id) };
  },
  async openai_view() {
    const models = await all(openai.models.list());
    return { models: models.map(whatIsKnown), one: whatIsKnown(await openai.models.retrieve(EMBED)) };
  },
  async openai_refused() {
    return { text: (await openai.chat.completions.create({ model: FORBIDDEN, messages })).choices[0].message.content };
  },
  async openai_unsupported() {
    return { answered: Boolean(await openai.images.generate({ model: CHAT, prompt: "a cat" })) };
  },
};

let outcome;
try {
  outcome = await cases[process.argv[2]]();
} catch (error) {
  outcome = { error: error.name, kind: error.constructor.name, status: error.status ?? error.status_code, code: error.code, message: error.message };
}
console.log(JSON.stringify(outcome));
