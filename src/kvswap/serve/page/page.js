"use strict";
// One conversation at a time: `talk` is what the server gets with each question. The server finds the stored
// conversation by these messages, so nothing here names it. Texts go into the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const talk = [];
let documents = []; // for the next question: {name, text}
let running = null; // the AbortController of the answer on its way

// ---- the server

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForKey();
    return call(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message || `The server answered with status ${response.status}.`);
  }
  return response;
}

function askForKey() {
  return new Promise((done) => {
    const dialog = $("key-dialog");
    dialog.onclose = () => {
      sessionStorage.setItem("key", $("key").value);
      $("key").value = "";
      done();
    };
    dialog.showModal();
  });
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

// ---- asking

async function ask(question) {
  const text = documents.map((each) => `${each.name}:\n\n${each.text}`).concat(question).join("\n\n");
  const shown = addMessage("user", question, documents);
  const answer = addMessage("assistant", "");
  const message = { role: "user", content: text };
  talk.push(message);
  running = new AbortController();
  showRunning(true);
  const begun = performance.now();
  const seen = { text: "", first: 0, usage: null };
  try {
    const body = { messages: talk, stream: true, stream_options: { include_usage: true } };
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    for await (const event of serverEvents(response)) take(event, seen, answer, begun);
    documents = [];
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    if (!seen.text) { // nothing was answered: the question goes back into its field
      talk.splice(talk.indexOf(message), 1);
      shown.remove();
      answer.remove();
      $("question").value = question;
    } else {
      documents = [];
    }
  } finally {
    running = null;
    showRunning(false);
    showDocuments();
  }
  if (seen.text) talk.push({ role: "assistant", content: seen.text });
  showNumbers(seen, begun);
  listStored().catch((error) => say(error.message));
}

function take(event, seen, answer, begun) {
  if (event.error) throw new Error(event.error.message);
  if (event.usage) seen.usage = event.usage;
  if (event.prompt_progress) showReading(event.prompt_progress, begun);
  const piece = event.choices?.[0]?.delta?.content;
  if (!piece) return;
  seen.first = seen.first || performance.now();
  $("reading").hidden = true;
  const atEnd = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
  seen.text += piece;
  answer.lastChild.textContent = seen.text;
  if (atEnd) answer.scrollIntoView({ block: "end" });
}

// ---- what is shown

function addMessage(role, text, given = []) {
  const item = document.createElement("li");
  item.className = role;
  const name = document.createElement("b");
  name.textContent = role === "user" ? "You" : role === "assistant" ? "Model" : role;
  item.append(name);
  for (const each of given) {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const body = document.createElement("div");
    summary.textContent = each.name;
    body.textContent = each.text;
    details.append(summary, body);
    item.append(details);
  }
  const words = document.createElement("span");
  words.textContent = text;
  item.append(words);
  $("talk").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function showReading({ processed, total }, begun) {
  const share = total ? processed / total : 0;
  const spent = (performance.now() - begun) / 1000;
  const left = share > 0.02 ? `, about ${seconds((spent * (1 - share)) / share)} left` : "";
  $("bar").value = share;
  $("reading-words").textContent =
    `Reading the prompt: ${processed.toLocaleString()} of ${total.toLocaleString()} tokens${left}`;
  $("reading").hidden = false;
}

function showRunning(now) {
  $("send").disabled = now;
  $("stop").hidden = !now;
  $("reading").hidden = true;
  if (now) {
    say("");
    $("numbers").textContent = "";
  } else {
    $("question").focus();
  }
}

function showNumbers(seen, begun) {
  if (!seen.usage) return;
  const used = seen.usage;
  const cached = used.prompt_tokens_details.cached_tokens;
  const rate = (used.completion_tokens - 1) / ((performance.now() - seen.first) / 1000);
  const parts = [
    `${used.prompt_tokens.toLocaleString()} tokens in, ${cached.toLocaleString()} of them from disk`,
    `${used.completion_tokens.toLocaleString()} out`,
    `first token after ${seconds((seen.first - begun) / 1000)}`,
  ];
  if (used.completion_tokens > 1 && Number.isFinite(rate)) parts.push(`${rate.toFixed(1)} tokens/s`);
  $("numbers").textContent = parts.join("; ");
}

function showDocuments() {
  $("documents").replaceChildren(...documents.map((each) => {
    const item = document.createElement("li");
    item.textContent = `${each.name} (${each.text.length.toLocaleString()} characters)`;
    item.append(button("×", `Leave out ${each.name}`, () => {
      documents = documents.filter((other) => other !== each);
      showDocuments();
    }));
    return item;
  }));
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.onclick = () => Promise.resolve(action()).catch((error) => say(error.message));
  return made;
}

function say(problem) {
  $("problem").textContent = problem;
}

function seconds(value) {
  if (value >= 90) return `${Math.round(value / 60)} min`;
  return value >= 10 ? `${Math.round(value)} s` : `${value.toFixed(1)} s`;
}

function megabytes(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

// ---- documents

async function addFiles(files) {
  for (const file of files) {
    try {
      const name = encodeURIComponent(file.name);
      const response = await call(`documents?name=${name}`, { method: "POST", body: file });
      documents.push(await response.json());
    } catch (error) {
      say(`${file.name}: ${error.message}`);
    }
  }
  showDocuments();
}

// ---- stored conversations

async function listStored() {
  const found = (await (await call("conversations")).json()).conversations;
  const total = found.reduce((sum, each) => sum + each.disk_bytes, 0);
  $("disk").textContent = found.length ? `${found.length} stored, ${megabytes(total)} of their own` : "Nothing is stored.";
  $("list").replaceChildren(...found.map((each) => {
    const item = document.createElement("li");
    const open = button(each.title || each.name, `Open: ${each.title || each.name}`, () => openStored(each.name));
    open.className = "open";
    open.title = each.title;
    const about = document.createElement("small");
    const when = new Date(each.used * 1000).toLocaleString();
    about.textContent = `${each.tokens.toLocaleString()} tokens, ${megabytes(each.disk_bytes)}, ${when}`;
    item.append(open, about);
    const fork = button("Fork", `Fork: ${each.title || each.name}`, () => forkStored(each.name));
    fork.className = "small";
    item.append(fork);
    if (each.own) {
      const remove = button("Delete", `Delete: ${each.title || each.name}`, () => removeStored(each));
      remove.className = "small";
      item.append(remove);
    }
    return item;
  }));
}

async function openStored(name) {
  const { messages } = await (await call(`conversations/${name}`)).json();
  startNew();
  for (const each of messages) {
    talk.push(each);
    addMessage(each.role, each.content);
  }
}

async function forkStored(name) {
  await call(`conversations/${name}/fork`, { method: "POST" });
  await listStored();
}

async function removeStored(each) {
  if (!confirm(`Delete "${each.title || each.name}" from the disk?`)) return;
  await call(`conversations/${each.name}`, { method: "DELETE" });
  await listStored();
}

function startNew() {
  running?.abort();
  talk.length = 0;
  documents = [];
  $("talk").replaceChildren();
  $("numbers").textContent = "";
  say("");
  showDocuments();
  $("question").focus();
}

// ---- what the user does

$("form").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  ask(question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = startNew;
$("files").onchange = () => {
  addFiles([...$("files").files]).finally(() => { $("files").value = ""; });
};
$("show-stored").onclick = () => {
  const shown = $("stored").hidden;
  $("stored").hidden = !shown;
  $("show-stored").setAttribute("aria-expanded", String(shown));
};
document.ondragover = (event) => {
  event.preventDefault();
  $("form").classList.add("over");
};
document.ondragleave = () => $("form").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("form").classList.remove("over");
  addFiles([...event.dataTransfer.files]);
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running?.abort();
};

(async () => {
  const { data } = await (await call("v1/models")).json();
  const limit = data[0].context_length;
  $("model").textContent = data[0].id + (limit ? `, up to ${limit.toLocaleString()} tokens` : "");
  if (window.innerWidth > 1000) $("show-stored").click();
  await listStored();
  $("question").focus();
})().catch((error) => say(error.message));
