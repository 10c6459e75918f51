// The playground: one conversation with this server, streamed. No library, nothing from elsewhere.
"use strict";

const $ = (id) => document.getElementById(id);
const POLL_MS = 2000;

let turns = [];          // what the model is told: {role, content}
let model = "";
let running = null;      // AbortController of the answer that streams
let counted = null;      // {tokens, at}: the server's total when it was last asked

// --- the server's state -----------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function askKey() {
  if (!$("access").hidden) return;  // who has put it away does not see it again at every poll
  $("access").hidden = false;
  showSettings(true);
}

async function askModel() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (answer.status === 401) {
    askKey();
    return;
  }
  if (answer.ok) {
    model = (await answer.json()).data[0].id;
    $("model").textContent = model;
    document.title = `${model} - dsv4c`;
  }
}

function numbers(text) {  // Prometheus text -> the first sample of every name without labels
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^(dsv4c_\w+) (\S+)$/.exec(line);
    if (match) found[match[1]] = Number(match[2]);
  }
  return found;
}

async function refresh() {
  try {
    if (!model) await askModel();
    const [ready, metrics] = await Promise.all([fetch("/ready"), fetch("/metrics")]);
    const reason = ready.ok ? "ready" : (await ready.json()).error.code.replaceAll("_", " ");
    say("state", reason, ready.ok ? "ready" : "bad");
    const now = numbers(await metrics.text());
    say("running", now.dsv4c_requests_running);
    say("waiting", now.dsv4c_requests_waiting);
    say("kv", `${(100 * now.dsv4c_kv_usage).toFixed(0)} %`);
    const at = performance.now(), tokens = now.dsv4c_engine_generated_tokens_total;
    if (counted && at > counted.at) {
      say("rate", `${((1000 * (tokens - counted.tokens)) / (at - counted.at)).toFixed(1)} tokens/s`);
    }
    counted = { tokens, at };
  } catch {
    say("state", "no answer", "bad");  // the server has gone; the next poll may find it again
    counted = null;
  }
}

async function poll() {
  await refresh();
  setTimeout(poll, POLL_MS);
}

function say(id, text, name) {
  $(id).textContent = text;
  if (name !== undefined) $(id).className = name;
}

// --- a turn on the page -----------------------------------------------------------------------------------------

function element(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function addTurn(who, text) {
  $("empty").hidden = true;
  const turn = element($("turns"), "article", `turn ${who}`);
  const line = element(turn, "div", "who");
  element(line, "b", "", who === "user" ? "You" : model || "Model");
  const facts = element(line, "span", "facts");
  return { turn, facts, said: element(turn, "div", "said", text), thought: null, calls: new Map() };
}

function addThought(shown, text) {
  if (!shown.thought) {
    const details = document.createElement("details");
    details.className = "thought";
    details.open = true;
    element(details, "summary", "", "Reasoning");
    shown.turn.insertBefore(details, shown.said);
    shown.thought = element(details, "div", "");
  }
  shown.thought.append(text);
}

function addCall(shown, call) {
  let block = shown.calls.get(call.index);
  if (!block) {
    const box = element(shown.turn, "div", "call");
    block = { name: element(box, "b", "", ""), text: element(box, "pre", "", "") };
    shown.calls.set(call.index, block);
  }
  block.name.append(call.function?.name ?? "");
  block.text.append(call.function?.arguments ?? "");
}

function follow(change) {  // keeps the end in view for those who look at it
  const box = $("turns");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

// --- one answer -------------------------------------------------------------------------------------------------

function number(id) {
  const value = $(id).value;
  return value === "" ? undefined : Number(value);
}

function body(text) {
  const given = {
    model, stream: true, stream_options: { include_usage: true }, max_tokens: number("max_tokens"),
    temperature: number("temperature"), top_p: number("top_p"), seed: number("seed"),
  };
  if ($("endpoint").value === "text") return { ...given, prompt: text };
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
  const thinking = $("thinking").checked;
  const effort = thinking && $("effort").value ? { reasoning_effort: $("effort").value } : {};
  return { ...given, messages, chat_template_kwargs: { thinking }, ...effort };
}

async function* events(answer) {  // the data of server-sent events, until [DONE]
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function errorText(found) {
  return found?.error?.message ?? "the server refused the request";
}

async function send(text) {
  const chat = $("endpoint").value === "chat";
  if (chat) turns.push({ role: "user", content: text });
  addTurn("user", text);
  const shown = addTurn("model", "");
  shown.turn.classList.add("running");
  $("turns").scrollTop = $("turns").scrollHeight;
  running = new AbortController();
  busy(true);
  const began = performance.now();
  let first = 0, pieces = 0, finish = "", usage = null, content = "";
  const facts = () => {
    const seconds = (performance.now() - first) / 1000, tokens = usage?.completion_tokens ?? pieces;
    const rate = first && tokens > 1 && seconds > 0.05 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = first ? `first after ${((first - began) / 1000).toFixed(2)} s` : "waiting";
    const end = finish && finish !== "stop" ? `ended: ${finish}` : "";
    shown.facts.textContent = [wait, tokens ? `${tokens} tokens` : "", rate, end].filter(Boolean).join(" \u00b7 ");
  };
  facts();
  try {
    if (!model) await askModel();
    const answer = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body(text)),
      signal: running.signal,
    });
    if (answer.status === 401) askKey();
    if (!answer.ok) throw new Error(errorText(await answer.json()));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(errorText(event));
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const delta = chat ? choice.delta : { content: choice.text };
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        first ||= performance.now();
        pieces += 1;
      }
      content += delta.content ?? "";
      follow(() => {
        if (delta.reasoning_content) addThought(shown, delta.reasoning_content);
        if (delta.content) shown.said.append(delta.content);
        for (const call of delta.tool_calls ?? []) addCall(shown, call);
      });
      finish = choice.finish_reason ?? finish;
      if (!usage) facts();
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else follow(() => element(shown.turn, "div", "error", error.message).setAttribute("role", "alert"));
  }
  facts();
  if (chat && content) turns.push({ role: "assistant", content });
  else if (chat) turns.pop();  // a question without an answer is not told again
  shown.turn.classList.remove("running");
  running = null;
  busy(false);
  refresh();
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").disabled = is;
  $("clear").disabled = is;
}

// --- what the reader does -----------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (running || !text.trim()) return;
  $("text").value = "";
  send(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  turns = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("text").focus();
});
function settle() {  // shows the settings that mean something
  const raw = $("endpoint").value === "text";
  for (const label of document.querySelectorAll(".chat")) label.hidden = raw;
  $("efforts").hidden = raw || !$("thinking").checked;
}
$("endpoint").addEventListener("change", settle);
$("thinking").addEventListener("change", settle);
$("key").addEventListener("change", askModel);
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  askModel();
});
function showSettings(is) {  // the settings, where the screen has no room beside the talk
  $("aside").classList.toggle("open", is);
  $("settings").setAttribute("aria-expanded", is);
}
$("settings").addEventListener("click", () => showSettings(!$("aside").classList.contains("open")));
settle();
$("text").focus();
poll();
