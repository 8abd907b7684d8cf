// The list of conversations that the server remembers.

import { json } from "./api.js";
import { el, iconButton, say } from "./dom.js";

const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60]];

/** Fires "open" (with the id in `detail`), "gone" (the same) and "failed" (a message). */
export class Sessions extends EventTarget {
  constructor(list) {
    super();
    this.list = list;
    this.current = null;
    this.sessions = [];
    this.timer = 0;
  }

  /** Ask the server again. */
  async refresh() {
    try {
      this.sessions = (await json("v1/sessions")).data.reverse(); // the newest first
    } catch (error) {
      this.tell("failed", error.message);
    }
    this.show();
    // An answer ends soon after it was stopped, or when it does for another client.
    clearTimeout(this.timer);
    if (this.sessions.some((session) => session.busy)) {
      this.timer = setTimeout(() => this.refresh(), 1500);
    }
  }

  /** Mark the conversation that is shown. */
  select(id) {
    this.current = id;
    this.show();
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  show() {
    // A list that is made anew keeps the focus where it was.
    const focused = document.activeElement?.dataset?.focus;
    const items = this.sessions.map((session) => this.item(session));
    if (!items.length) items.push(el("li", { class: "none" }, "Nothing yet"));
    this.list.replaceChildren(...items);
    if (focused) {
      const again = [...this.list.querySelectorAll("[data-focus]")];
      again.find((node) => node.dataset.focus === focused)?.focus();
    }
  }

  item(session) {
    const { id } = session;
    const title = session.title || "New conversation";
    const number = session.num_messages;
    const said = number ? `${number} ${number === 1 ? "message" : "messages"}` : "";
    const facts = [said, ago(session.created), session.parent ? "fork" : "", state(session)];
    const open = el(
      "button",
      {
        type: "button", class: "open", "data-focus": `open-${id}`,
        "aria-current": id === this.current ? "true" : null,
        onclick: () => this.tell("open", id),
      },
      el("span", { class: "title" }, title),
      el("span", { class: "facts" }, facts.filter(Boolean).join(" · ")),
    );
    const fork = iconButton("fork", `Fork “${title}”`, () => this.fork(id), { "data-focus": `fork-${id}` });
    const remove = iconButton("delete", `Delete “${title}”`, () => this.remove(id, title), {
      "data-focus": `delete-${id}`,
    });
    return el("li", {}, open, el("span", { class: "item-actions" }, fork, remove));
  }

  /** Begin a session with the past of `id`, and open it. */
  async fork(id) {
    try {
      const made = await json(`v1/sessions/${encodeURIComponent(id)}/fork`, { body: {} });
      say("Forked");
      this.tell("open", made.id);
      await this.refresh();
    } catch (error) {
      this.tell("failed", error.message);
    }
  }

  async remove(id, title) {
    if (!(await confirmed(`Delete “${title}”? The server forgets it for good.`))) return;
    try {
      await json(`v1/sessions/${encodeURIComponent(id)}`, { method: "DELETE" });
      say("Deleted");
      this.tell("gone", id);
    } catch (error) {
      this.tell("failed", error.message);
    }
    await this.refresh();
  }
}

function state(session) {
  if (session.busy) return "answering";
  return session.interrupted ? "cut off" : "";
}

function ago(created) {
  const seconds = Date.now() / 1000 - created;
  for (const [unit, size] of UNITS) {
    if (seconds >= size) return AGO.format(-Math.floor(seconds / size), unit);
  }
  return "just now";
}

function confirmed(text) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("p").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
