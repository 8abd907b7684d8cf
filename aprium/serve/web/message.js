// What was said, as elements: a question, an answer that grows, its reasoning and its tool calls.

import { copyButton, count, el, icon, iconButton, percent } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/** Return the element of a system or user message. */
export function question(role, text) {
  const name = role === "user" ? "You" : "System prompt";
  const label = el("h2", { class: "hidden-label" }, name);
  if (role === "user") return el("article", { class: "turn user" }, label, el("p", {}, text));
  const shown = el("details", { class: "fold" }, el("summary", {}, name), el("p", {}, text));
  return el("article", { class: "turn system" }, shown);
}

/** One answer. `actions` has what its buttons do: finishThinking, resume, retry, repeat, sendResults. */
export class Answer {
  constructor(actions) {
    this.actions = actions;
    this.content = this.reasoning = "";
    this.calls = [];
    this.begun = performance.now();
    this.first = null; // when the first token came
    this.frame = 0;
    this.build();
  }

  build() {
    this.thinkingText = document.createTextNode("");
    this.thinkingLabel = el("span", {}, "Thinking");
    this.thinkingBody = el("div", { class: "reasoning", tabindex: 0 }, this.thinkingText);
    const summary = el("summary", {}, icon("thought"), this.thinkingLabel);
    this.thinking = el("details", { class: "fold" }, summary, this.thinkingBody);
    this.finish = el("button", {
      type: "button", class: "quiet finish-thinking", onclick: () => this.press(() => this.actions.finishThinking()),
    }, "Finish thinking");
    this.thinkingRow = el("div", { class: "thinking", hidden: true }, this.thinking, this.finish);
    this.waiting = el("p", { class: "waiting" }, el("span", {}, "Waiting for the first token"));
    this.body = el("div", { class: "markdown" });
    this.markdown = new MarkdownView(this.body);
    this.callList = el("div", { class: "calls" });
    this.note = el("div", { class: "note", hidden: true });
    this.footer = el("footer", {});
    this.element = el(
      "article", { class: "turn answer", "aria-busy": "true", tabindex: -1 },
      el("h2", { class: "hidden-label" }, "Answer"),
      this.waiting, this.thinkingRow, this.body, this.callList, this.note, this.footer,
    );
  }

  /** Do what a button is for that goes away then: the focus stays with the answer. */
  press(action) {
    this.element.focus({ preventScroll: true });
    action();
  }

  /** Begin again, as a resumed answer does. */
  restart() {
    this.content = this.reasoning = "";
    this.calls = [];
    this.callList.replaceChildren();
    this.first = null;
    this.begun = performance.now();
    this.note.hidden = true;
    this.footer.replaceChildren();
    this.element.setAttribute("aria-busy", "true");
  }

  /** Take one delta of the stream. */
  push(delta) {
    const reasoning = delta.reasoning ?? "";
    if (!reasoning && !delta.content && !delta.tool_calls) return;
    this.first ??= performance.now();
    this.reasoning += reasoning;
    this.content += delta.content ?? "";
    for (const part of delta.tool_calls ?? []) {
      this.calls[part.index] ??= { id: null, name: "", arguments: "", view: null };
      const call = this.calls[part.index];
      call.id ??= part.id ?? null;
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  /** Show a message that was said earlier. */
  restore(message) {
    this.content = message.content ?? "";
    this.reasoning = message.reasoning ?? "";
    this.calls = (message.tool_calls ?? []).map((call) => ({
      id: call.id, name: call.function.name, arguments: call.function.arguments, view: null,
    }));
    this.end({});
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const busy = this.element.getAttribute("aria-busy") === "true";
    const begun = Boolean(this.reasoning || this.content || this.calls.length);
    this.waiting.hidden = begun || !busy;
    this.thinkingRow.hidden = !this.reasoning;
    this.showThinking(busy && !this.content && !this.calls.length);
    this.markdown.update(this.content);
    for (const call of this.calls) {
      if (!call.view) this.callList.append((call.view = new CallView(call)).element);
      call.view.show();
    }
  }

  showThinking(going) {
    const body = this.thinkingBody;
    const atEnd = body.scrollHeight - body.scrollTop - body.clientHeight < 8;
    if (this.reasoning.startsWith(this.thinkingText.data)) {
      this.thinkingText.appendData(this.reasoning.slice(this.thinkingText.length));
    } else {
      this.thinkingText.data = this.reasoning;
    }
    if (going && atEnd) body.scrollTop = body.scrollHeight;
    this.finish.hidden = !going;
    this.thinking.classList.toggle("going", going);
    if (this.first !== null && (going || this.thoughtFor === undefined)) {
      this.thoughtFor = (performance.now() - this.first) / 1000;
    }
    if (going) this.thinkingLabel.textContent = `Thinking for ${this.thoughtFor.toFixed(0)} s`;
    else if (this.thoughtFor >= 1) {
      this.thinkingLabel.textContent = `Thought for ${this.thoughtFor.toFixed(0)} s`;
    } else this.thinkingLabel.textContent = "Thought for a moment";
    if (this.first === null) this.thinkingLabel.textContent = "Thoughts";
  }

  /** Show that the answer has ended: by itself, or `stopped`, or with an `error`. */
  end({ reason = "stop", usage = null, stopped = false, error = null, resumable = false }) {
    const known = Boolean(this.content || this.reasoning || this.calls.length);
    this.element.setAttribute("aria-busy", "false");
    this.show();
    const stop = known ? "Stopped." : "Stopped before the first word.";
    const why = error ?? (stopped ? stop : ENDINGS[reason]);
    if (why) this.explain(why, { failed: error !== null, again: stopped || error, resumable });
    if (error === null) this.showFooter(usage);
  }

  explain(why, { failed, again, resumable }) {
    const button = (label, action) =>
      el("button", { type: "button", class: "quiet", onclick: () => this.press(action) }, label);
    this.note.replaceChildren(
      el("span", {}, why),
      ...(resumable ? [button("Continue", () => this.actions.resume())] : []),
      ...(again && !resumable ? [button("Try again", () => this.actions.repeat())] : []),
    );
    this.note.classList.toggle("failed", failed);
    if (failed) this.note.setAttribute("role", "alert");
    this.note.hidden = false;
  }

  showFooter(usage) {
    const copy = this.content ? copyButton(() => this.content) : null;
    const label = "Answer again in a fork; this conversation stays as it is";
    const retry = iconButton("retry", label, () => this.actions.retry(), { class: "icon-button retry" });
    this.footer.replaceChildren(...[copy, retry].filter(Boolean));
    if (usage) this.footer.append(el("span", { class: "figures" }, this.figures(usage)));
  }

  figures(usage) {
    const tokens = usage.completion_tokens;
    const parts = [`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
    const seconds = (performance.now() - (this.first ?? this.begun)) / 1000;
    if (tokens > 1 && seconds > 0.05) parts.push(`${count((tokens - 1) / seconds)} tokens/s`);
    if (this.first !== null) {
      parts.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    }
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (cached) parts.push(`${percent(cached, usage.prompt_tokens)} cached`);
    return parts.join(" · ");
  }

  /** Return the message as it is sent back; calls that were cut off are left out. */
  message() {
    const calls = this.calls.filter((call) => isObject(call.arguments));
    return {
      role: "assistant",
      content: this.content,
      ...(this.reasoning ? { reasoning: this.reasoning } : {}),
      ...(calls.length
        ? {
            tool_calls: calls.map((call) => ({
              id: call.id, type: "function",
              function: { name: call.name, arguments: call.arguments },
            })),
          }
        : {}),
    };
  }

  /** Put fields under the calls for what the tools have given, and a button that sends it. */
  askForResults() {
    const send = () => {
      const results = this.calls.map((call) => call.view.result.value);
      for (const [i, call] of this.calls.entries()) call.view.answer(results[i]);
      form.remove();
      this.actions.sendResults(
        this.calls.map((call, i) => ({ role: "tool", tool_call_id: call.id, content: results[i] })),
      );
    };
    for (const call of this.calls) call.view.ask();
    const several = this.calls.length > 1;
    const form = el("div", { class: "send-results" },
      el("button", { type: "button", class: "primary", onclick: () => this.press(send) },
        several ? "Send results" : "Send result"));
    this.callList.append(form);
  }

  /** Show what the tools gave, in the order of the calls. */
  setResults(texts) {
    for (const [i, call] of this.calls.entries()) {
      if (texts[i] !== undefined) call.view.answer(texts[i]);
    }
  }
}

const ENDINGS = {
  length: "Cut off at the limit of tokens.",
  abort: "The server ended this answer early.",
  cut: "This answer was cut off.",
};

/** One tool call: its name, its arguments, and what the tool gave. */
class CallView {
  constructor(call) {
    this.call = call;
    this.name = el("strong", {});
    this.arguments = el("pre", { tabindex: 0 });
    this.outcome = el("div", { class: "outcome", hidden: true });
    const head = el("h3", {}, icon("tool"), el("span", {}, "Calls ", this.name));
    this.element = el("section", { class: "call" }, head, this.arguments, this.outcome);
  }

  show() {
    this.name.textContent = this.call.name;
    const text = pretty(this.call.arguments);
    if (this.arguments.textContent !== text) this.arguments.textContent = text;
    this.element.setAttribute("aria-label", `Tool call: ${this.call.name}`);
  }

  ask() {
    this.result = el("textarea", { rows: 2, spellcheck: "false", placeholder: "What the tool gives" });
    const label = el("label", {}, el("span", {}, `Result of ${this.call.name}`), this.result);
    this.outcome.replaceChildren(label);
    this.outcome.hidden = false;
  }

  answer(text) {
    this.outcome.replaceChildren(el("span", {}, "Result"), el("pre", { tabindex: 0 }, pretty(text)));
    this.outcome.hidden = false;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet, or no JSON
  }
}

function isObject(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" && !Array.isArray(value);
  } catch {
    return false;
  }
}
