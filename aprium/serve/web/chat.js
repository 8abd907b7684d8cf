// One conversation: a session of the server, what was said in it, and the answer that is under way.

import { ApiError, events, json } from "./api.js";
import { el, say } from "./dom.js";
import { Answer, question } from "./message.js";

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * A conversation, new or of the server's session `id`. Fires "change" when its state does, "begun"
 * when the server has given it an id, and "fork" (with the id in `detail`) when it was forked.
 */
export class Conversation extends EventTarget {
  constructor(settings, id = null) {
    super();
    this.settings = settings;
    this.id = id;
    this.element = el("div", { class: "turns" });
    this.messages = []; // those that the session has
    this.asked = []; // those of the turn that is under way or was refused
    this.cut = null; // {asked, said} of a turn that was cut off: they go with the next one
    this.run = null; // {abort, answerId, answer} of the answer under way
    this.last = null; // the last answer shown
    this.tokens = 0; // of the context
    this.stoppedAt = -Infinity;
  }

  get running() {
    return this.run !== null;
  }

  get empty() {
    return this.element.childElementCount === 0;
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  /** Show what the server has of it; throws ApiError where it is gone. */
  async load() {
    const session = await json(`v1/sessions/${encodeURIComponent(this.id)}`);
    this.messages = session.messages;
    this.tokens = session.num_tokens;
    this.element.replaceChildren();
    this.last = null;
    for (const message of this.messages) this.showMessage(message);
    const open = this.last?.calls.length && this.messages.at(-1).role === "assistant";
    if (open && !session.interrupted) this.last.askForResults();
    this.cut = null;
    if (session.interrupted) {
      this.cut = { asked: session.running_messages, said: [] };
      for (const message of this.cut.asked) this.showMessage(message);
      this.addAnswer().end({ reason: "cut", resumable: true });
    } else if (session.busy) {
      this.addAnswer().end({ error: "This session is being answered for another client." });
    }
    this.changed();
  }

  showMessage(message) {
    if (message.role === "assistant") this.addAnswer().restore(message);
    else if (message.role === "tool") {
      this.results = [...(this.results ?? []), message.content ?? ""];
      this.last?.setResults(this.results);
      return;
    } else this.element.append(question(message.role, message.content ?? ""));
    this.results = [];
  }

  addAnswer() {
    const answer = new Answer({
      finishThinking: () => this.finishThinking(),
      resume: () => this.resume(answer),
      repeat: () => this.repeat(answer),
      retry: () => this.retry(),
      sendResults: (messages) => this.ask(messages),
    });
    this.element.append(answer.element);
    this.last = answer;
    return answer;
  }

  /** Say something. */
  async send(text) {
    const system = this.settings.system;
    const first = !this.messages.length && !this.cut && system;
    const asked = [
      ...(first ? [{ role: "system", content: system }] : []),
      { role: "user", content: text },
    ];
    for (const message of asked) this.showMessage(message);
    await this.ask(asked);
  }

  /** Send messages that are shown already, after those of a turn that was stopped. */
  async ask(messages) {
    if (this.running) return;
    const { asked, said } = this.cut ?? { asked: [], said: [] };
    this.asked = [...asked, ...said, ...messages];
    await this.answer(this.addAnswer());
  }

  /** Send what was asked once more, after a failure. */
  async repeat(answer) {
    if (this.running) return;
    if (this.cut?.asked === this.asked) this.cut = null;
    answer.restart();
    await this.answer(answer);
  }

  async answer(answer) {
    await this.follow(answer, async (signal) => {
      if (this.id === null) {
        this.id = (await json("v1/sessions", { body: {}, signal })).id;
        this.dispatchEvent(new Event("begun"));
      }
      const asked = { messages: this.asked, session: this.id, stream: true };
      const usage = { stream_options: { include_usage: true } };
      const body = { ...asked, ...usage, ...this.settings.body() };
      return this.open("v1/chat/completions", body, signal);
    });
  }

  /** Finish an answer that was cut off; the server says it from its beginning. */
  async resume(answer) {
    if (this.running || !this.cut) return;
    answer.restart();
    this.asked = this.cut.asked;
    const path = `v1/sessions/${encodeURIComponent(this.id)}/resume`;
    await this.follow(answer, (signal) => this.open(path, { stream: true }, signal));
  }

  /** Return a stream and its first event. Just after a stop the session may still be busy. */
  async open(path, body, signal) {
    for (;;) {
      const stream = events(path, { body, signal });
      try {
        return { stream, first: (await stream.next()).value };
      } catch (error) {
        const soon = performance.now() - this.stoppedAt < 5000;
        if (!(error instanceof ApiError && error.status === 409 && soon)) throw error;
        await pause(100);
      }
    }
  }

  async follow(answer, start) {
    const run = (this.run = { abort: new AbortController(), answerId: null, answer });
    const before = this.cut;
    this.cut = null;
    let [reason, usage] = [null, null];
    const take = (event) => {
      if (!event) return;
      run.answerId ??= event.id;
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (choice) answer.push(choice.delta);
      reason = choice?.finish_reason ?? reason;
    };
    this.changed();
    say("Answering");
    try {
      const { stream, first } = await start(run.abort.signal);
      take(first);
      for await (const event of stream) take(event);
      this.ended(answer, reason, usage);
    } catch (error) {
      this.broken(run, answer, error, before);
    } finally {
      this.run = null;
      this.changed();
    }
  }

  ended(answer, reason, usage) {
    this.messages.push(...this.asked, answer.message());
    this.tokens = usage?.total_tokens ?? this.tokens;
    answer.end({ reason: reason ?? "abort", usage });
    if (answer.calls.length) answer.askForResults();
    say("The answer has ended");
  }

  broken(run, answer, error, before) {
    const stopped = error.name === "AbortError";
    if (!stopped && !(error instanceof ApiError)) throw error;
    const begun = run.answerId !== null; // the server has written the turn down
    if (!begun && error.status >= 400 && error.status < 500) {
      this.cut = before; // what was refused is no part of the conversation
    } else {
      // What was said goes on with the next turn, so that the model knows what the reader saw.
      const said = answer.content || answer.reasoning ? [answer.message()] : [];
      this.cut = { asked: this.asked, said };
    }
    answer.end({ stopped, error: stopped ? null : error.message, resumable: begun });
    say(stopped ? "Stopped" : error.message);
  }

  /** Stop the answer; what was said stays. */
  stop() {
    this.stoppedAt = performance.now();
    this.run?.abort.abort();
  }

  /** Let the model end its reasoning now and answer. */
  async finishThinking() {
    if (!this.run?.answerId) return;
    const body = { id: this.run.answerId, action: "reasoning_end" };
    try {
      await json("v1/chat/completions/control", { body });
    } catch (error) {
      say(error.message); // the answer itself goes on
    }
  }

  /** Begin a session with the same past, up to its last full turn; return its id. */
  async fork() {
    const path = `v1/sessions/${encodeURIComponent(this.id)}/fork`;
    return (await json(path, { body: {} })).id;
  }

  /** Ask the last question again in a session of its own. */
  async retry() {
    if (this.running) return;
    const all = [...this.messages, ...(this.cut?.asked ?? [])];
    const at = all.findLastIndex((message) => message.role === "user");
    if (at < 0) return;
    const made = await json("v1/sessions", { body: { messages: all.slice(0, at) } });
    const detail = { id: made.id, text: all[at].content };
    this.dispatchEvent(new CustomEvent("fork", { detail }));
  }
}
