// The chat page. Text from people and models reaches the document only as textContent.

const DEFAULTS = {
  temperature: 0, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1, frequency_penalty: 0,
  presence_penalty: 0, seed: "", max_tokens: 160, history: false, theme: "auto", system: "",
  served: "", key: "",
};
const RESERVED = 48; // tokens kept free for an answer when turns are chosen to fit

const $ = (id) => document.getElementById(id);
const turns = restore("gristmill.turns", []); // {question, answer, problem, meta, left}
const settings = { ...DEFAULTS, ...restore("gristmill.settings", {}) };
let cards = []; // the models, as /v1/models tells them
let card = null; // the one that is asked
let locked = ""; // why the endpoint tells us of no model: the key that it wants
let running = null; // AbortController of the answer under way

function restore(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep() {
  try {
    localStorage.setItem("gristmill.turns", JSON.stringify(turns.slice(-200)));
    localStorage.setItem("gristmill.settings", JSON.stringify(settings));
  } catch {
    // Private windows may refuse storage; the conversation then lives as long as the page.
  }
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, title, onClick) {
  const made = element("button", "quiet", text);
  made.type = "button";
  made.title = title;
  made.addEventListener("click", onClick);
  return made;
}

// ---- The model ----

async function loadCard() {
  try {
    const response = await fetch("/v1/models", { headers: authorization() });
    locked = {
      401: "an API key is needed: Settings",
      403: "this API key lacks the scope read: Settings",
    }[response.status] ?? "";
    cards = response.ok ? (await response.json()).data : [];
  } catch {
    cards = [];
  }
  chooseCard();
  if (!card && !locked) setTimeout(loadCard, 3000);
}

// The model asked for in the settings, while it is served; else the first.
function chooseCard() {
  card = cards.find((one) => one.id === settings.served) ?? cards[0] ?? null;
  $("served").replaceChildren(...cards.map((one) => {
    const option = element("option", "", cards.length > 1 ? `${one.id} · v${one.version}` : one.id);
    option.value = one.id;
    option.selected = one === card;
    return option;
  }));
  showCard();
}

function authorization() {
  return settings.key ? { Authorization: `Bearer ${settings.key}` } : {};
}

function showCard() {
  const pill = $("model");
  pill.classList.toggle("bad", !card);
  const without = locked || "no model is served yet";
  pill.textContent = card ? `${card.id} · version ${card.version}` : without;
  $("send").disabled = !card && !running;
  if (!card) return;
  document.title = `${card.id} · Gristmill`;
  $("headline").textContent = card.title || "Ask a question";
  $("about").textContent = about();
  showExamples();
}

function about() {
  const size = card.parameters ? `${(card.parameters / 1e6).toFixed(1)}-million-parameter ` : "";
  const corpus = card.corpus ? ` on ${card.corpus}` : "";
  return `${card.id}, version ${card.version}, is a small ${size}language model trained from scratch`
    + `${corpus}. It repeats what it learned there, often word for word; about anything else it `
    + `makes things up. It reads ${card.max_model_len} tokens at once and knows nothing of the web.`;
}

function showExamples() {
  const chosen = shuffled(card.examples ?? []).slice(0, window.innerWidth < 700 ? 4 : 6);
  $("examples").replaceChildren(...chosen.map((question) => {
    const made = element("button");
    made.type = "button";
    fill(made, question);
    made.addEventListener("click", () => ask(question));
    return made;
  }));
  $("more").hidden = (card.examples ?? []).length <= chosen.length;
}

function shuffled(list) {
  const copy = [...list];
  for (let last = copy.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [copy[last], copy[other]] = [copy[other], copy[last]];
  }
  return copy;
}

function showDetails() {
  if (!card) return;
  $("details-about").textContent = about();
  const facts = [
    ["Model", card.id], ["Version", card.version], ["Weights", card.system_fingerprint],
    ["Context", `${card.max_model_len} tokens`],
    ["Served since", new Date(card.created * 1000).toLocaleString()],
    ...Object.entries(card.scores ?? {}).map(([name, value]) => [name, Number(value.toFixed(4))]),
    ...Object.entries(card.lineage ?? {}),
  ];
  $("details-list").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", String(value))]),
  );
  $("details").showModal();
}

// ---- The conversation on the page ----

function render() {
  $("welcome").hidden = turns.length > 0;
  const nodes = [];
  turns.forEach((turn, index) => {
    if (turn.left && !turns[index - 1]?.left) {
      nodes.push(element("p", "note", turn.left));
    }
    nodes.push(...turnNodes(turn, index));
    if (turn.left && turns[index + 1] && !turns[index + 1].left) {
      nodes.push(element("p", "note", "the model sees what follows"));
    }
  });
  $("log").replaceChildren(...nodes);
}

function turnNodes(turn, index) {
  const mine = element("article", `turn mine${turn.left ? " unsent" : ""}`);
  mine.append(element("div", "text", turn.question));
  const theirs = element("article", `turn theirs${turn.left ? " unsent" : ""}`);
  const text = element("div", "text");
  fill(text, turn.answer ?? "");
  theirs.append(text);
  if (turn.answer === "" && !turn.problem && turn.meta) {
    theirs.append(element("div", "nothing", "The model ended its answer without a word."));
  }
  if (turn.problem) theirs.append(element("div", "problem", turn.problem));
  const foot = element("div", "foot");
  if (turn.meta) foot.append(element("span", "", turn.meta));
  if (turn.answer) foot.append(button("Copy", "Copy the answer", (e) => copy(turn.answer, e.target)));
  if (index === turns.length - 1) {
    const again = settings.temperature === 0
      ? "Ask again; at temperature 0 the answer stays the same"
      : "Ask the same question again";
    foot.append(button("Regenerate", again, regenerate));
  }
  theirs.append(foot);
  return [mine, theirs];
}

// Fenced blocks become <pre>, `spans` become <code>; the rest is plain text.
function fill(target, text) {
  target.replaceChildren();
  text.split("```").forEach((part, index) => {
    if (index % 2 === 1) {
      const body = part.replace(/^[\w+-]*\n/, "");
      const block = element("div", "block");
      const pre = element("pre");
      pre.append(element("code", "", body));
      block.append(pre, button("Copy", "Copy the code", (e) => copy(body, e.target)));
      target.append(block);
      return;
    }
    part.split(/`([^`\n]+)`/).forEach((piece, at) => {
      if (piece) target.append(at % 2 ? element("code", "", piece) : piece);
    });
  });
}

async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
    source.textContent = "Copied";
  } catch {
    source.textContent = "Copying is not allowed here";
  }
  setTimeout(() => { source.textContent = "Copy"; }, 1500);
}

function toBottom(always) {
  const scroll = $("scroll");
  const near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
  if (always || near) scroll.scrollTop = scroll.scrollHeight;
}

// ---- Asking ----

async function ask(question) {
  question = question.trim();
  if (!question || running || !card) return;
  turns.push({ question });
  $("question").value = "";
  grow();
  await answer(turns[turns.length - 1]);
}

async function regenerate() {
  if (running || !turns.length) return;
  const { question } = turns.pop();
  turns.push({ question });
  await answer(turns[turns.length - 1]);
}

async function answer(turn) {
  running = new AbortController();
  busy(true);
  const started = performance.now();
  let first = 0;
  let usage = null;
  let fingerprint = "";
  let reason = "";
  let pieces = 0;
  turn.answer = "";
  try {
    const messages = await fitting(turn);
    render();
    toBottom(true);
    const text = $("log").lastElementChild.querySelector(".text");
    $("log").lastElementChild.classList.add("busy");
    for await (const chunk of events(request(messages))) {
      if (chunk.error) throw new Error(chunk.error.message);
      fingerprint = chunk.system_fingerprint ?? fingerprint;
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      reason = choice?.finish_reason ?? reason;
      if (choice?.delta.content) {
        first ||= performance.now() - started;
        pieces += 1;
        turn.answer += choice.delta.content;
        fill(text, turn.answer);
        toBottom(false);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") turn.problem = error.message;
    else turn.meta = stopped(pieces, first, performance.now() - started);
  }
  const total = performance.now() - started;
  if (usage) turn.meta = readOut(usage, first, total, reason);
  if (card && fingerprint && fingerprint !== card.system_fingerprint) await loadCard();
  if (turn.meta && card && fingerprint) turn.meta += ` · version ${versionOf(fingerprint)}`;
  running = null;
  busy(false);
  render();
  toBottom(false);
  keep();
}

// Which version answered: of a name that several share it may be any of them.
function versionOf(fingerprint) {
  return (cards.find((one) => one.system_fingerprint === fingerprint) ?? card).version;
}

function readOut(usage, first, total, reason) {
  const tokens = usage.completion_tokens;
  const rate = total > first ? ` · ${Math.round((tokens / (total - first)) * 1000)} tokens/s` : "";
  const cut = reason === "length" ? " · cut at the limit" : "";
  return `${tokens} tokens · first after ${Math.round(first || total)} ms${rate}${cut}`;
}

// Of an answer that was stopped nobody sends the count; every piece is a token or a few.
function stopped(pieces, first, total) {
  if (!pieces) return `stopped after ${Math.round(total)} ms, before the first token`;
  const rate = total > first ? ` · ${Math.round((pieces / (total - first)) * 1000)} tokens/s` : "";
  return `stopped · at least ${pieces} tokens · first after ${Math.round(first)} ms${rate}`;
}

function request(messages) {
  const body = {
    model: card.id, messages, stream: true, stream_options: { include_usage: true },
    temperature: settings.temperature, max_tokens: settings.max_tokens,
  };
  for (const name of ["repetition_penalty", "frequency_penalty", "presence_penalty"]) {
    if (settings[name] !== DEFAULTS[name]) body[name] = settings[name];
  }
  if (settings.temperature > 0) {
    body.top_p = settings.top_p;
    body.top_k = settings.top_k;
    body.min_p = settings.min_p;
    if (settings.seed !== "") body.seed = Number(settings.seed);
  }
  return body;
}

// The messages to send: the question, and before it as many earlier turns as fit, if wanted.
async function fitting(turn) {
  const earlier = turns.slice(0, -1);
  for (const old of turns) delete old.left;
  if (!settings.history) {
    return conversation([turn]);
  }
  const without = (skip) =>
    conversation([...earlier.slice(skip).filter((old) => old.answer), turn]);
  if (!earlier.length || await fits(without(0))) return without(0);
  // The more turns are left out, the shorter: the first number that fits is found by halving.
  let least = 1;
  let most = earlier.length; // the question alone is sent whatever its length; the answer tells
  while (least < most) {
    const middle = (least + most) >> 1;
    if (await fits(without(middle))) most = middle;
    else least = middle + 1;
  }
  for (const old of earlier.slice(0, most)) old.left = "left out: the context is full";
  return without(most);
}

function conversation(chosen) {
  const system = settings.system.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return opening.concat(chosen.flatMap((turn, index) => {
    const asked = { role: "user", content: turn.question };
    return index === chosen.length - 1
      ? [asked]
      : [asked, { role: "assistant", content: turn.answer }];
  }));
}

async function fits(messages) {
  try {
    const response = await post("/tokenize", { model: card.id, messages });
    const { count, max_model_len: limit } = await response.json();
    return count + Math.min(RESERVED, settings.max_tokens) <= limit;
  } catch (error) {
    // What is longer than any text of so many tokens is not even counted, or not even read.
    if (error.code === "context_length_exceeded" || error.status === 413) return false;
    throw error;
  }
}

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization() },
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  const error = new Error(problem?.error?.message ?? `the endpoint answered ${response.status}`);
  throw Object.assign(error, { code: problem?.error?.code, status: response.status });
}

// The JSON of each server-sent event, up to [DONE].
async function* events(body) {
  const response = await post("/v1/chat/completions", body);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function busy(is) {
  const send = $("send");
  send.textContent = is ? "Stop" : "Send";
  send.classList.toggle("stop", is);
  send.disabled = !is && !card;
  $("status").textContent = is ? "answering… Esc stops" : resting();
  $("log").setAttribute("aria-busy", String(is));
}

// What the line under the question says while nothing happens.
function resting() {
  return settings.history
    ? "Earlier turns are sent along, as many as fit."
    : "Every question stands alone: earlier turns are not sent.";
}

function startOver() {
  running?.abort();
  turns.length = 0;
  keep();
  render();
  if (card) showExamples();
  // On a phone the focus would raise the keyboard over the examples.
  if (!matchMedia("(pointer: coarse)").matches) $("question").focus();
}

// ---- Settings ----

function showSettings() {
  for (const [name, value] of Object.entries(settings)) {
    const input = $(name);
    if (!input) continue;
    if (input.type === "checkbox") input.checked = value;
    else if (name !== "served") input.value = value; // chooseCard fills that one
    const output = $(`${name}-value`);
    if (output) output.textContent = Number(value).toFixed(2).replace(/0$/, "");
  }
  for (const field of document.querySelectorAll(".sampled")) {
    field.classList.toggle("off", settings.temperature === 0);
    field.querySelector("input").disabled = settings.temperature === 0;
  }
  if (!running) $("status").textContent = resting();
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
}

function changeSetting(event) {
  const input = event.target;
  if (!(input.id in DEFAULTS) || !input.checkValidity()) return;
  if (input.type === "checkbox") settings[input.id] = input.checked;
  else if (["theme", "seed", "system", "served", "key"].includes(input.id)) {
    settings[input.id] = input.value.slice(0, 4000);
    if (input.id === "served") chooseCard();
    if (input.id === "key") loadCard();
  }
  else if (input.value !== "") settings[input.id] = Number(input.value);
  keep();
  showSettings();
}

function togglePanel() {
  const panel = $("panel");
  panel.hidden = !panel.hidden;
  $("tune").setAttribute("aria-expanded", String(!panel.hidden));
  if (!panel.hidden) $("temperature").focus();
}

// ---- Keys and events ----

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask($("question").value);
});
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(event.target.value);
  } else if (event.key === "ArrowUp" && !event.target.value && turns.length) {
    event.preventDefault();
    event.target.value = turns[turns.length - 1].question;
    grow();
  }
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog");
  if (event.key === "Escape" && running) running.abort();
  else if (event.key === "Escape" && !$("panel").hidden) togglePanel();
  else if (event.key === "/" && !typing) {
    event.preventDefault();
    $("question").focus();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    startOver();
  }
});
$("model").addEventListener("click", showDetails);
$("new").addEventListener("click", startOver);
$("tune").addEventListener("click", togglePanel);
$("more").addEventListener("click", showExamples);
$("panel").addEventListener("input", changeSetting);
$("reset").addEventListener("click", () => {
  Object.assign(settings, DEFAULTS, { key: settings.key }); // a key is no setting: it is shown once
  keep();
  showSettings();
  chooseCard();
});

showSettings();
render();
toBottom(true);
loadCard();
