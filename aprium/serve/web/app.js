// The page put together: views, the box one writes in, keys, the list, and who has the focus.

import { getKey, json, setKey, setKeyPrompt } from "./api.js";
import { Conversation } from "./chat.js";
import { Follower, count, say } from "./dom.js";
import { Live } from "./live.js";
import { Sessions } from "./sessions.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);

const settings = new Settings($("settings"));
const sessions = new Sessions($("session-list"));
const follower = new Follower($("scroller"), $("jump"));
const live = new Live($("live"));
const running = new Set(); // conversations that answer while another one is shown
let shown = null; // the conversation in view
let context = 0; // tokens that one may have

// Conversations

function show(conversation) {
  if (shown === conversation) return;
  shown = conversation;
  $("log").replaceChildren(conversation.element);
  follower.show(conversation.element);
  sessions.select(conversation.id);
  update();
}

function make(id = null) {
  const conversation = new Conversation(settings, id);
  conversation.addEventListener("begun", () => {
    if (conversation === shown) {
      if (!location.hash.startsWith("#live")) history.replaceState(null, "", `#chat/${conversation.id}`);
      sessions.select(conversation.id);
    }
  });
  conversation.addEventListener("change", () => {
    if (conversation.running) running.add(conversation);
    else running.delete(conversation);
    if (conversation === shown) update();
    sessions.refresh();
  });
  conversation.addEventListener("fork", async ({ detail }) => {
    const forked = await open(detail.id);
    forked?.send(detail.text);
    follower.toEnd();
  });
  return conversation;
}

/** Show a session of the server; return its conversation, or null where it is gone. */
async function open(id) {
  if (shown?.id === id) return shown;
  const kept = [...running].find((conversation) => conversation.id === id);
  const conversation = kept ?? make(id);
  try {
    if (!kept) await conversation.load();
  } catch (error) {
    complain(error.message);
    begin();
    return null;
  }
  history.replaceState(null, "", `#chat/${id}`);
  show(conversation);
  return conversation;
}

/** Begin a conversation; the server hears of it with its first message. */
function begin() {
  history.replaceState(null, "", "#chat");
  show(make());
}

function update() {
  const busy = shown.running;
  $("welcome").hidden = !shown.empty;
  $("send").classList.toggle("stop", busy);
  $("send-label").textContent = busy ? "Stop" : "Send";
  $("send").title = busy ? "Stop (Escape)" : "Send (Enter)";
  $("send").querySelector("use").setAttribute("href", busy ? "#i-stop" : "#i-send");
  $("fork").disabled = shown.id === null || busy;
  const used = shown.tokens && context ? `${count(shown.tokens)} of ${count(context)} tokens of context` : "";
  $("context").textContent = used;
}

// The box one writes in

const box = $("message");

function grow() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, window.innerHeight * 0.4)}px`;
}

function submit() {
  const text = box.value.trim();
  if (shown.running || !text) return;
  if (!settings.valid) {
    settings.open();
    return;
  }
  box.value = "";
  grow();
  const sent = shown.send(text);
  follower.toEnd();
  return sent;
}

box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (shown.running) shown.stop();
  else submit();
});
for (const example of document.querySelectorAll("#welcome button")) {
  example.addEventListener("click", () => {
    box.value = example.textContent;
    grow();
    box.focus();
  });
}

// Around it

const narrow = matchMedia("(max-width: 52rem)");

function drawer(opened) {
  document.body.classList.toggle("drawer", opened);
  $("menu").setAttribute("aria-expanded", String(opened));
  // What lies under the drawer, or the drawer that is away, takes no focus.
  $("sidebar").inert = narrow.matches && !opened;
  $("main").inert = narrow.matches && opened;
  if (narrow.matches && opened) $("new").focus();
}

function closeDrawer() {
  if (!document.body.classList.contains("drawer")) return false;
  drawer(false);
  return narrow.matches;
}

$("menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
$("veil").addEventListener("click", closeDrawer);
narrow.addEventListener("change", () => drawer(false));
$("new").addEventListener("click", () => {
  location.hash = "#chat";
  begin();
  closeDrawer();
  box.focus();
});
$("fork").addEventListener("click", () => sessions.fork(shown.id));
$("open-settings").addEventListener("click", () => settings.open());

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (closeDrawer()) $("menu").focus();
  else if (shown.running) shown.stop();
});

sessions.addEventListener("open", async ({ detail }) => {
  location.hash = `#chat/${detail}`;
  closeDrawer();
});
sessions.addEventListener("gone", ({ detail }) => {
  if (shown.id === detail) begin();
});
sessions.addEventListener("failed", ({ detail }) => complain(detail));

let complaint = 0;
function complain(text) {
  const toast = $("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(complaint);
  complaint = setTimeout(() => (toast.hidden = true), 8000);
}

// Light and dark: as the system has it, or the one or the other

const THEMES = ["auto", "light", "dark"];

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const names = { auto: "as the system", light: "light", dark: "dark" };
  $("theme").setAttribute("aria-label", `Colours: ${names[theme]}`);
  $("theme").title = `Colours: ${names[theme]}`;
  $("theme").querySelector("use").setAttribute("href", `#i-${theme}`);
}

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
  if (next === "auto") {
    delete root.dataset.theme;
    localStorage.removeItem("aprium.theme");
  } else {
    root.dataset.theme = next;
    localStorage.setItem("aprium.theme", next);
  }
  showTheme();
  say($("theme").title);
});

// The key

function askKey(wrong) {
  const dialog = $("key");
  const field = $("key-field");
  $("key-problem").hidden = !wrong;
  field.value = wrong ? "" : getKey();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      const given = dialog.returnValue === "yes";
      if (given) setKey(field.value.trim());
      field.value = "";
      resolve(given ? getKey() : null);
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

setKeyPrompt(askKey);
$("open-key").addEventListener("click", async () => {
  if ((await askKey(false)) !== null) await start();
});
for (const dialog of [$("key"), $("confirm")]) {
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close(event.submitter?.value ?? "yes");
  });
}
for (const button of document.querySelectorAll("dialog .cancel")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

// Where one is

async function route() {
  const [view, id] = location.hash.slice(1).split("/");
  const isLive = view === "live";
  live.show(isLive);
  $("chat").hidden = isLive;
  document.title = isLive ? "Live – Aprium" : "Aprium";
  for (const [link, here] of [["to-live", isLive], ["to-chat", !isLive]]) {
    if (here) $(link).setAttribute("aria-current", "page");
    else $(link).removeAttribute("aria-current");
  }
  if (isLive) return;
  if (id) await open(id);
  else if (shown.id !== null) history.replaceState(null, "", `#chat/${shown.id}`);
  follower.follow();
}

async function start() {
  try {
    const [model] = (await json("v1/models")).data;
    context = model.max_model_len;
    $("model").textContent = model.id;
    settings.describe(model);
  } catch (error) {
    complain(error.message);
    return; // without a key, say: what else would be asked fails as well
  }
  await sessions.refresh();
  await route();
  update();
}

show(make());
showTheme();
drawer(false);
addEventListener("hashchange", route);
addEventListener("beforeunload", (event) => {
  if (running.size) event.preventDefault(); // leaving would cut the answers off
});
if (!narrow.matches) box.focus(); // a phone would put its keyboard over the page
start();
