// Runs page.js against the server at argv[2] with a document made of plain objects, and prints what a user would see.
"use strict";
const fs = require("node:fs");
const vm = require("node:vm");
const [, , pageFile, server] = process.argv;

const elements = new Map();
class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], hidden: false, textContent: "", value: "", attributes: {}, classList: new Set() });
    Object.assign(this, { scrollHeight: 0, scrollTop: 0, clientHeight: 0 });
  }
  append(...more) { for (const each of more) { each.parent = this; this.children.push(each); } }
  replaceChildren(...more) { this.children = []; this.append(...more); }
  remove() { this.parent.children.splice(this.parent.children.indexOf(this), 1); }
  setAttribute(name, value) { this.attributes[name] = value; }
  get lastChild() { return this.children[this.children.length - 1]; }
  scrollIntoView() {}
  focus() {}
  click() { this.onclick(); }
  requestSubmit() { this.onsubmit({ preventDefault() {} }); }
}
const $ = (id) => elements.get(id) || elements.set(id, new Element(id)).get(id);
$("stored").hidden = true;
const context = vm.createContext({
  document: { getElementById: $, createElement: (tag) => new Element(tag) },
  window: { innerWidth: 1200 },
  sessionStorage: { getItem: () => null },
  fetch: (path, options) => fetch(`${server}/${path}`, options),
  confirm: () => true,
  performance, AbortController, TextDecoderStream, console,
});
vm.runInContext(fs.readFileSync(pageFile, "utf8"), context);

async function until(what) {
  for (let tries = 0; tries < 600; tries += 1) {
    if (what()) return;
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error(`never: ${what}; ${$("problem").textContent}`);
}
const idle = () => !$("send").disabled;
const stored = () => $("list").children;

(async () => {
  const seen = {};
  await until(() => $("disk").textContent);
  seen.model = $("model").textContent;
  $("files").files = [new File(["The keeper counts sheep. ".repeat(60)], "story.md")];
  $("files").onchange();
  await until(() => $("documents").children.length);
  seen.document = $("documents").children[0].textContent;
  $("question").value = "Who counts?";
  $("form").requestSubmit();
  await until(() => $("send").disabled);
  await until(() => idle() && stored().length === 1);
  seen.answer = $("talk").children[1].lastChild.textContent;
  seen.reading = $("reading-words").textContent;
  seen.numbers = $("numbers").textContent;
  $("new").click();
  seen.cleared = $("talk").children.length;
  stored()[0].children[0].onclick();
  await until(() => $("talk").children.length === 2);
  seen.opened = $("talk").children[1].lastChild.textContent;
  $("question").value = "And?";
  $("question").onkeydown({ key: "Enter", preventDefault() {} });
  await until(() => $("talk").children.length === 4);
  await until(() => idle() && $("numbers").textContent);
  seen.second = $("numbers").textContent;
  stored()[0].children[2].onclick();
  await until(() => stored().length === 2);
  stored()[1].children[3].onclick();
  await until(() => stored().length === 1);
  $("question").value = "Stop me";
  $("form").requestSubmit();
  await until(() => $("talk").children.length === 6 && $("talk").children[5].lastChild.textContent);
  $("stop").click();
  await until(idle);
  seen.problem = $("problem").textContent;
  process.stdout.write(JSON.stringify(seen));
})().catch((error) => {
  process.stderr.write(String(error.stack));
  process.exitCode = 1;
});
