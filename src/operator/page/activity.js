// Live Activity: shows what the operator's feed sends. Texts come from clients and backends, so they only ever become text nodes.
// Only the rows that can be seen are in the document, so a thousand of them cost what twenty do.
"use strict";

const FEED = "/api/v1/audit/stream?running=1";
const RECENT_ROWS = 500;
const ROW_PX = 45; // as in the style
const SPARE_ROWS = 8; // above and below what is seen, for scrolling
const FRESH_ROWS = 4; // more at once are no news but a flood, and are not highlighted
const ALERTS = 6;
const SAMPLES = 60;
const SPEAK_EVERY_MS = 10000;

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const brief = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const number = (value) => (value < 10000 ? whole : brief).format(value);
const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : number(value));
const known = (value) => value !== null && value !== undefined;

function duration(ms) {
  if (!known(ms)) return "–";
  if (ms < 1000) return `${ms} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60000)} min ${Math.floor((ms % 60000) / 1000)} s`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (known(text)) made.textContent = text;
  return made;
}

// Changes the page only where the text is another: an equal text would be laid out again all the same.
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- what to show

const shown = { words: [], decision: "all" };
let paused = false;

function matches(row) {
  const { decision } = shown;
  if (decision === "failed" ? !row.failed : decision !== "all" && row.decision !== decision) return false;
  return shown.words.every((word) => row.words.includes(word));
}

function words(...texts) {
  return texts.filter(known).join(" ").toLowerCase();
}

// ---- a row

function cell(row, className, text, under) {
  const td = element("td", className, text);
  if (under) td.append(element("span", "under", under));
  if (known(text)) td.title = under ? `${text}\n${under}` : text;
  row.append(td);
  return td;
}

function decisionCell(row, decision, reason) {
  const td = element("td");
  td.append(element("span", `tag ${{ allow: "good", deny: "bad", escalate: "odd" }[decision] ?? ""}`, decision ?? "–"));
  if (reason) {
    td.append(element("span", "under", reason));
    td.title = reason;
  }
  row.append(td);
}

// A table's rows, newest first. A row is { decision, failed, words, make() }; `tr` is made when it is first seen, and `write` brings it up to
// date each time.
class Rows {
  constructor(name) {
    this.body = at(`${name}-rows`);
    this.scroller = this.body.closest(".scroll");
    this.table = this.body.closest("table");
    [this.above, this.below] = this.table.querySelectorAll(".space td");
    this.all = [];
    this.matching = [];
    this.scroller.addEventListener("scroll", soon, { passive: true });
    new ResizeObserver(soon).observe(this.scroller);
  }

  // `added` rows have come on top.
  change(added) {
    // Who has scrolled, or stands on a row, keeps it in place.
    const reading = this.scroller.scrollTop > 0 || this.body.contains(document.activeElement);
    const came = this.all.slice(0, added).filter(matches).length;
    this.matching = this.all.filter(matches);
    this.table.setAttribute("aria-rowcount", this.matching.length + 1);
    if (reading && came) {
      this.draw();
      this.scroller.scrollTop += came * ROW_PX;
    }
  }

  draw() {
    const { matching, body } = this;
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW_PX) - SPARE_ROWS);
    const last = Math.min(matching.length, first + Math.ceil(this.scroller.clientHeight / ROW_PX) + 2 * SPARE_ROWS);
    let next = body.firstChild;
    for (let i = first; i < last; i += 1) {
      const row = matching[i];
      row.tr ??= row.make();
      row.tr.setAttribute("aria-rowindex", i + 2);
      row.write?.();
      if (row.tr === next) next = next.nextSibling;
      else body.insertBefore(row.tr, next);
    }
    while (next) {
      const gone = next;
      next = next.nextSibling;
      gone.remove();
    }
    this.above.style.height = `${first * ROW_PX}px`;
    this.below.style.height = `${Math.max(0, matching.length - last) * ROW_PX}px`;
  }
}

// ---- running requests: changed in place

// What a request is doing, in words; colour and sign only repeat them.
const STATES = {
  queued: ["odd", "queued", "for a free slot"],
  waiting: ["", "waiting", "for the first token"],
  answering: ["good", "answering", ""],
  left: ["odd", "client left", "its model still loads"],
};

const running = new Map();
const runningRows = new Rows("running");

class Running {
  constructor(entry) {
    this.decision = "allow";
    this.failed = false;
    this.entry = entry;
  }

  get words() {
    const { entry } = this;
    return words(entry.agent_id, entry.model, entry.action, entry.target, "allow", entry.policy_reason, entry.request_id,
      (STATES[entry.state] ?? [])[1]);
  }

  take(entry) {
    const last = this.entry;
    if (entry.elapsed_ms > last.elapsed_ms && known(last.ttft_ms)) {
      const now = ((entry.chunks - last.chunks) * 1000) / (entry.elapsed_ms - last.elapsed_ms);
      this.rate = known(this.rate) ? this.rate * 0.6 + now * 0.4 : now;
    }
    this.entry = entry;
  }

  make() {
    const { entry } = this;
    const tr = element("tr");
    cell(tr, "", entry.agent_id ?? "unknown");
    cell(tr, "model", entry.model ?? "–");
    cell(tr, "", `${entry.action} ${entry.target}`, "ollama-api · ollama-proxy");
    decisionCell(tr, "allow", entry.policy_reason);
    const state = element("td");
    this.state = { tag: element("span", "tag"), under: element("span", "under") };
    state.append(this.state.tag, this.state.under);
    tr.append(state);
    this.numbers = ["first", "speed", "chunks", "elapsed"].map(() => cell(tr, "num", ""));
    return tr;
  }

  write() {
    const { entry, numbers } = this;
    const [kind, word, of] = STATES[entry.state] ?? ["", entry.state, ""];
    if (this.state.tag.textContent !== word) this.state.tag.className = `tag ${kind}`;
    write(this.state.tag, word);
    write(this.state.under, of);
    write(numbers[0], duration(entry.ttft_ms));
    write(numbers[1], known(this.rate) ? rate(this.rate) : "–");
    write(numbers[2], number(entry.chunks));
    write(numbers[3], duration(Math.floor(entry.elapsed_ms / 100) * 100));
  }
}

function takeSnapshot(data) {
  count(data);
  if (paused) return;
  showQueues(data.queues);
  let added = 0;
  const ids = new Set();
  for (const entry of data.running) {
    ids.add(entry.id);
    const row = running.get(entry.id);
    if (row) {
      row.take(entry);
    } else {
      added += 1;
      running.set(entry.id, new Running(entry));
    }
  }
  for (const id of running.keys()) if (!ids.has(id)) running.delete(id);
  runningRows.all = [...running.values()].reverse();
  const all = data.running.length + data.more;
  at("running").hidden = all === 0;
  runningRows.change(added);
  write(at("running-count"), all ? number(all) : "");
  write(at("running-more"), data.more ? `${number(data.more)} more are not listed` : "");
  if (all) begun();
  soon();
}

// ---- recent requests

let arrived = [];
let missedWhilePaused = 0;
const seen = new Set(); // ids, since a proxy that was started anew tells its recent ones again
const recentRows = new Rows("recent");

function tokensPerSecond(record) {
  const { output_tokens, ttft_ms, stream } = record.extra;
  const generating = record.latency_ms - ttft_ms;
  return stream === true && known(output_tokens) && known(ttft_ms) && generating > 0 ? (output_tokens * 1000) / generating : null;
}

class Recent {
  constructor(record) {
    const { extra } = record;
    this.record = record;
    this.decision = record.policy_result;
    this.failed = !["complete", "refused"].includes(extra.outcome) || record.response_code >= 500;
    this.words = words(record.agent_id, extra.model, extra.model_raw, record.action, record.target, this.decision, record.policy_reason,
      extra.outcome.replaceAll("_", " "), extra.outcome, record.error, extra.request_id, extra.backend, record.response_code);
  }

  make() {
    const { record, decision, failed } = this;
    const { extra } = record;
    const tr = element("tr", this.fresh ? "fresh" : "");
    const time = element("td");
    const button = element("button", "", clock.format(new Date(record.timestamp)));
    button.type = "button";
    button.setAttribute("aria-label", `${button.textContent}: the whole record of request ${extra.request_id}`);
    button.addEventListener("click", () => showRecord(record));
    time.append(button);
    tr.append(time);
    cell(tr, "", record.agent_id ?? "unknown caller");
    cell(tr, "model", extra.model ?? "–");
    cell(tr, "", `${record.action} ${record.target}`, `${record.tool_name} · ${record.mcp_server}`);
    decisionCell(tr, decision, record.policy_reason ?? (decision === "allow" ? null : record.error));
    cell(tr, "num", duration(extra.ttft_ms));
    const speed = tokensPerSecond(record);
    cell(tr, "num", known(speed) ? rate(speed) : "–");
    const tokens = (value) => (known(value) ? number(value) : "–");
    cell(tr, "num", `${tokens(extra.input_tokens)} / ${tokens(extra.output_tokens)}`);
    const outcome = element("td");
    const kind = failed ? "bad" : extra.outcome === "complete" ? "good" : "odd";
    outcome.append(element("span", `tag ${kind}`, extra.outcome.replaceAll("_", " ")));
    const why = [record.response_code, record.error].filter(known).join(" ");
    if (why) {
      outcome.append(element("span", "under", why));
      outcome.title = why;
    }
    tr.append(outcome);
    cell(tr, "num", duration(record.latency_ms));
    return tr;
  }
}

function showArrived() {
  if (paused || arrived.length === 0) return;
  const rows = arrived.reverse().map((record) => new Recent(record));
  arrived = [];
  if (rows.length <= FRESH_ROWS) for (const row of rows) row.fresh = true;
  recentRows.all = [...rows, ...recentRows.all].slice(0, RECENT_ROWS);
  recentRows.change(rows.length);
  write(at("recent-count"), number(recentRows.all.length));
  sayWhetherNothingMatches();
}

function takeRecord(record) {
  if (record.extra.phase !== "final" || seen.has(record.id)) return; // the others are among the running ones
  seen.add(record.id);
  if (seen.size > 5 * RECENT_ROWS) seen.delete(seen.values().next().value);
  spoken.ended += 1;
  if (record.policy_result !== "allow") spoken.refused += 1;
  arrived.push(record);
  // Only as many as the table holds would ever be seen.
  if (arrived.length > RECENT_ROWS) arrived.shift();
  if (paused) {
    missedWhilePaused += 1;
    write(at("waiting"), `${number(missedWhilePaused)} more since`);
  } else {
    soon();
  }
  begun();
}

function sayWhetherNothingMatches() {
  at("nothing").hidden = recentRows.all.length === 0 || recentRows.matching.length > 0;
}

function applyFilter() {
  for (const rows of [runningRows, recentRows]) {
    rows.change(0);
    rows.draw();
  }
  sayWhetherNothingMatches();
}

// ---- at most once for each frame, whatever arrives

function soon() {
  if (soon.scheduled) return;
  soon.scheduled = true;
  requestAnimationFrame(() => {
    soon.scheduled = false;
    showArrived();
    runningRows.draw();
    recentRows.draw();
  });
}

// ---- counters and sparklines

const tiles = Object.fromEntries(["requests", "running", "tokens", "refused"].map((name) => {
  const tile = at(`tile-${name}`);
  const [area, line] = tile.querySelectorAll("path");
  return [name, { value: tile.querySelector("b"), small: tile.querySelector("small"), area, line, samples: [] }];
}));
let before = null;

function sample(name, value, note, words = rate) {
  const tile = tiles[name];
  tile.samples.push(value);
  if (tile.samples.length > SAMPLES) tile.samples.shift();
  write(tile.value, words(value));
  write(tile.small, note);
  const most = Math.max(1, ...tile.samples);
  const first = SAMPLES - tile.samples.length;
  const points = tile.samples.map((v, i) => `${(((first + i) * 120) / (SAMPLES - 1)).toFixed(1)} ${(30 - (v * 27) / most).toFixed(1)}`);
  tile.line.setAttribute("d", `M${points.join("L")}`);
  tile.area.setAttribute("d", `M${((first * 120) / (SAMPLES - 1)).toFixed(1)} 32L${points.join("L")}L120 32Z`);
}

function count(data) {
  const now = performance.now();
  const { totals } = data;
  const all = data.running.length + data.more;
  write(at("version"), data.version);
  state(paused ? "paused" : data.draining ? "draining" : "live");
  for (const [name, value] of Object.entries(data.in_flight)) {
    const node = inFlight.get(name);
    if (node) write(node, value ? `${number(value)} in flight` : "idle");
  }
  const lost = before && totals.requests < before.totals.requests; // it was started anew
  const seconds = before && !lost ? (now - before.now) / 1000 : 0;
  const last = before;
  // The totals are of requests that have ended; with what runs, a long stream is seen while it flows and is no spike at its end. A
  // chunk is mostly one token. Chunks of a reply that broke off are counted nowhere, so a sum may shrink.
  const sums = {
    requests: totals.requests + all,
    tokens: totals.output_tokens + data.running.reduce((sum, entry) => sum + entry.chunks, 0),
    refused: totals.refused,
  };
  const grown = (name) => (seconds > 0 ? Math.max(0, sums[name] - last.sums[name]) / seconds : 0);
  before = { now, totals, sums };
  if (paused) return;
  sample("requests", grown("requests"), `${number(sums.requests)} in all`);
  const agents = new Set(data.running.map((entry) => entry.agent_id)).size;
  const waiting = data.running.filter((entry) => entry.state === "waiting").length;
  const queued = data.queues.reduce((sum, queue) => sum + queue.waiting, 0);
  const by = `by ${number(agents)} ${agents === 1 ? "agent" : "agents"}, ${number(waiting)} waiting for a first token`
    + (queued ? `, ${number(queued)} queued` : "");
  sample("running", all, all ? by : "nothing runs", number);
  sample("tokens", grown("tokens"), `${number(totals.input_tokens)} in, ${number(totals.output_tokens)} out in all`);
  sample("refused", grown("refused"), `${number(totals.refused)} in all, ${number(totals.denied)} by policy, ${number(totals.escalated)} escalated`);
  if (totals.requests === 0 && all === 0 && recentRows.all.length === 0 && arrived.length === 0) showFirstRequest(data.public);
}

// ---- the queue

const QUEUES_SHOWN = 12;

function showQueues(queues) {
  const all = queues.reduce((sum, queue) => sum + queue.waiting, 0);
  at("queue").hidden = all === 0;
  write(at("queue-count"), all ? number(all) : "");
  spoken.queued = all;
  const longest = [...queues].sort((a, b) => b.waiting - a.waiting).slice(0, QUEUES_SHOWN);
  const list = at("queues");
  while (list.children.length > longest.length) list.lastElementChild.remove();
  longest.forEach(({ model, waiting, longest_ms }, i) => {
    const li = list.children[i] ?? list.appendChild(element("li"));
    if (!li.firstChild) li.append(element("strong"), element("span"), element("span", "note"));
    const [name, depth, oldest] = li.children;
    write(name, model || "no model");
    write(depth, `${number(waiting)} ${waiting === 1 ? "waits" : "wait"}`);
    write(oldest, `the first for ${duration(Math.floor(longest_ms / 100) * 100)}`);
  });
}

// ---- backends

const inFlight = new Map();
const MODELS_SHOWN = 12;

// Open: it gets no requests for a while. Half open: one at a time, to see.
function breakerTag(state, model) {
  const [kind, words] = state === "open" ? ["bad", "breaker open"] : ["odd", "breaker half open"];
  return element("span", `tag ${kind}`, model ? `${words} for ${model}` : words);
}

function showBackends(backends) {
  inFlight.clear();
  at("backends").replaceChildren(...backends.map((backend) => {
    const li = element("li");
    li.append(element("strong", "", backend.name), element("span", "where", backend.url));
    li.append(element("span", `tag ${backend.up ? "good" : "bad"}`, backend.up ? "up" : "unreachable"));
    if (backend.drained) li.append(element("span", "tag odd", "drained"));
    if (backend.breaker !== "closed") li.append(breakerTag(backend.breaker));
    const flying = element("span", "note", "idle");
    inFlight.set(backend.name, flying);
    li.append(flying);
    const loaded = new Set(backend.loaded);
    const models = [...(backend.models ?? [])].sort((a, b) => loaded.has(b) - loaded.has(a));
    for (const model of models.slice(0, MODELS_SHOWN)) {
      const chip = element("span", "chip", loaded.has(model) ? `${model} · loaded` : model);
      chip.title = chip.textContent;
      li.append(chip);
    }
    const broken = Object.entries(backend.breakers);
    for (const [model, breaker] of broken.slice(0, MODELS_SHOWN)) li.append(breakerTag(breaker, model));
    if (broken.length > MODELS_SHOWN) li.append(element("span", "note", `and ${number(broken.length - MODELS_SHOWN)} more breakers`));
    const rest = backend.models_in_all - Math.min(MODELS_SHOWN, (backend.models ?? []).length);
    if (backend.models === null) li.append(element("span", "note", "models not read yet"));
    else if (rest > 0) li.append(element("span", "note", `and ${number(rest)} more models`));
    return li;
  }));
}

// ---- alerts

function showAlert(alert) {
  const li = element("li");
  const time = element("time", "", clock.format(new Date(alert.timestamp)));
  time.dateTime = alert.timestamp;
  const over = alert.state === "over";
  li.append(time, element("span", `tag ${over ? "good" : "odd"}`, alert.alert.replaceAll("_", " ")), element("span", "", alert.message));
  const list = at("alert-list");
  list.prepend(li);
  while (list.children.length > ALERTS) list.lastElementChild.remove();
  at("alerts").hidden = false;
  spoken.alerts.push(alert.message);
}

// ---- the first request

let hasBegun = false;

function begun() {
  if (hasBegun) return;
  hasBegun = true;
  at("empty").hidden = true;
  at("recent").hidden = false;
}

function showFirstRequest(address) {
  if (hasBegun) return;
  // A listener on every address is reached by the name that this page was.
  const origin = `http://${address.replace(/^(0\.0\.0\.0|\[::\])/, location.hostname)}`;
  write(at("first-request"), [
    `curl ${origin}/api/v1/ollama/api/chat \\`,
    '  -H "Authorization: Bearer $BEHAVRY_JWT" \\',
    '  -H "Content-Type: application/json" \\',
    `  -d '{"model": "llama3.2", "messages": [{"role": "user", "content": "Hello!"}]}'`,
  ].join("\n"));
  at("empty").hidden = false;
  at("recent").hidden = true;
}

at("copy").addEventListener("click", async () => {
  const text = at("first-request");
  try {
    await navigator.clipboard.writeText(text.textContent);
    write(at("copy"), "Copied");
    setTimeout(() => write(at("copy"), "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren(text); // no clipboard without https: the rest is Ctrl-C
  }
});

// ---- one record whole

function showRecord(record) {
  const members = at("members");
  members.replaceChildren();
  const { extra, ...columns } = record;
  for (const [prefix, object] of [["", columns], ["extra.", extra]]) {
    for (const [name, value] of Object.entries(object)) {
      const text = value === null ? "null" : typeof value === "string" ? value : JSON.stringify(value);
      members.append(element("dt", "", prefix + name), element("dd", value === null ? "null" : "", text));
    }
  }
  at("details").showModal();
}

at("close").addEventListener("click", () => at("details").close());
at("dismiss").addEventListener("click", () => {
  at("alerts").hidden = true;
  at("alert-list").replaceChildren();
});

// ---- filter, pause, keys

const filter = at("filter");
filter.addEventListener("input", () => {
  shown.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  applyFilter();
});
for (const radio of document.querySelectorAll('input[name="show"]')) {
  radio.addEventListener("change", () => {
    shown.decision = radio.value;
    applyFilter();
  });
}

function setPaused(now) {
  paused = now;
  at("pause").setAttribute("aria-pressed", String(paused));
  write(at("pause-text"), paused ? "Go on" : "Pause");
  state(paused ? "paused" : "live");
  if (!paused) {
    missedWhilePaused = 0;
    write(at("waiting"), "");
    soon();
  }
}

at("pause").addEventListener("click", () => setPaused(!paused));
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("details").open) return;
  const inControl = event.target.closest("input, button, a, select, textarea, summary");
  if (event.key === "Escape" && (filter.value || event.target === filter)) {
    filter.value = "";
    filter.dispatchEvent(new Event("input"));
    filter.blur();
  } else if (event.key === "/" && event.target !== filter) {
    event.preventDefault();
    filter.focus();
    filter.select();
  } else if (event.key === " " && !inControl) {
    event.preventDefault();
    setPaused(!paused);
  }
});

// ---- what a screen reader is told: a sentence now and then, never each request

const ALERTS_SPOKEN = 3;
const spoken = { ended: 0, refused: 0, alerts: [], queued: 0, wasQueued: 0 };
setInterval(() => {
  if (paused) return;
  const { ended, refused, alerts, queued, wasQueued } = spoken;
  const parts = alerts.slice(-ALERTS_SPOKEN).map((alert) => `Alert: ${alert}.`);
  if (alerts.length > ALERTS_SPOKEN) parts.push(`${alerts.length - ALERTS_SPOKEN} more alerts.`);
  if (queued > 0 !== wasQueued > 0) parts.push(queued ? `${queued} ${queued === 1 ? "request waits" : "requests wait"} in the queue.` : "The queue is empty.");
  if (ended) parts.push(`${ended} ${ended === 1 ? "request" : "requests"} ended${refused ? `, ${refused} of them refused` : ""}.`);
  if (parts.length === 0) return;
  write(at("spoken"), parts.join(" "));
  Object.assign(spoken, { ended: 0, refused: 0, alerts: [], wasQueued: queued });
}, SPEAK_EVERY_MS);

// ---- the feed

function state(now) {
  const pill = at("connection");
  if (pill.dataset.state === now) return;
  pill.dataset.state = now;
  write(at("connection-text"), { live: "Live", paused: "Paused", draining: "Draining", lost: "Connection lost, trying again" }[now]);
}

function listen() {
  const source = new EventSource(FEED);
  const on = (name, take) => source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  for (const name of ["tool_call", "policy_deny", "policy_escalate"]) on(name, takeRecord);
  on("alert", showAlert);
  on("running", takeSnapshot);
  on("backends", showBackends);
  source.addEventListener("error", () => {
    state("lost");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000); // refused: it does not try again by itself
  });
}

listen();
