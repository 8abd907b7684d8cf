// What the server is doing now: rates, queue, cache and drafts, from its counters once a second.

import { ApiError, json } from "./api.js";
import { bytes, count, el, percent } from "./dom.js";
import { LineChart, bar } from "./charts.js";

const SAMPLES = 120;
const EVERY_MS = 1000;

/** The live page; asks the server only while it is shown. */
export class Live {
  constructor(root) {
    this.root = root;
    this.before = null;
    this.timer = 0;
    const rate = (value) => `${count(value)}/s`;
    this.speed = new LineChart(
      "Tokens", [["generated", "a"], ["prompts", "b"]], rate, SAMPLES);
    this.queue = new LineChart("Requests", [["running", "a"], ["waiting", "b"]], count, SAMPLES);
    this.notice = el("p", { class: "live-notice", role: "status", hidden: true });
    this.tiles = el("dl", { class: "tiles" });
    this.cache = el("ul", { class: "bars" });
    this.sizes = el("dl", { class: "totals" });
    this.reasons = el("ul", { class: "bars long" });
    this.drafts = el("ul", { class: "bars" });
    this.totals = el("dl", { class: "totals" });
    const card = (title, ...inner) => el("section", { class: "card" }, el("h3", {}, title), ...inner);
    root.append(
      el("h2", {}, "Live"),
      this.notice,
      this.tiles,
      el("div", { class: "cards" },
        el("section", { class: "card wide" }, this.speed.element),
        el("section", { class: "card wide" }, this.queue.element),
        card("Memory", this.cache, this.sizes),
        card("Drafts accepted, by position", this.drafts),
        card("Why no more of a prompt was reused", this.reasons),
        card("Since the start", this.totals)),
    );
    document.addEventListener("visibilitychange", () => this.resume());
  }

  /** Show the page, or not. */
  show(shown) {
    this.root.hidden = !shown;
    this.resume();
  }

  resume() {
    clearTimeout(this.timer);
    this.before = null; // a rate over the time away would be none of now
    if (!this.root.hidden && !document.hidden) this.poll();
  }

  async poll() {
    const due = performance.now() + EVERY_MS;
    clearTimeout(this.timer);
    try {
      const { engine, ...server } = await json("load");
      this.take({ ...engine, ...server });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.fail(error);
      if (error.status === 401) return; // asking again each second would be a nuisance
    }
    clearTimeout(this.timer);
    if (this.root.hidden || document.hidden) return;
    this.timer = setTimeout(() => this.poll(), Math.max(0, due - performance.now()));
  }

  fail(error) {
    this.before = null;
    this.speed.push(null);
    this.queue.push(null);
    const again = el("button", { type: "button", class: "quiet", onclick: () => this.resume() }, "Enter a key");
    this.notice.replaceChildren(error.message, " ", ...(error.status === 401 ? [again] : []));
    this.notice.hidden = false;
  }

  take(stats) {
    this.notice.hidden = stats.failed === null;
    this.notice.textContent = stats.failed ?? "";
    const rates = this.before && rate(this.before, stats);
    this.before = stats;
    this.speed.push(rates && [rates.generated, rates.prompt]);
    this.queue.push([stats.num_running, stats.num_waiting]);
    this.showTiles(stats, rates);
    this.showCache(stats);
    this.showDrafts(stats);
    this.showTotals(stats);
  }

  showTiles(stats, rates) {
    const used = stats.pages_total - stats.pages_free;
    const [compared, accepted] = [sum(stats.drafts_compared), sum(stats.drafts_accepted)];
    tell(this.tiles, [
      ["Generated", rates ? count(rates.generated) : "–", "tokens/s"],
      ["Running", count(stats.num_running), `${count(stats.num_waiting)} waiting`],
      ["Cache in use", percent(used, stats.pages_total), "of all pages"],
      ["Prompts reused", percent(stats.prefix_tokens_reused, stats.prompt_tokens), "of their tokens"],
      ["Drafts accepted", percent(accepted, compared), compared ? "of those compared" : "drafting is off"],
      ["Step", rates?.step_ms ? count(rates.step_ms) : "–", "ms, mean of a second"],
    ]);
  }

  showCache(stats) {
    const pool = (name, total, free) =>
      bar(name, (total - free) / Math.max(total, 1), `${count(total - free)} of ${count(total)}`);
    this.cache.replaceChildren(
      pool("Pages", stats.pages_total, stats.pages_free),
      pool("States", stats.slots_total, stats.slots_free),
    );
    tell(this.sizes, [
      ["States that are snapshots", count(stats.num_snapshots)],
      ["Copies of snapshots in memory", bytes(stats.store_bytes)],
      ["Copies of snapshots on disk", bytes(stats.disk_bytes)],
      ["Memory for keys and values", bytes(stats.kv_bytes)],
      ["Memory for states", bytes(stats.state_bytes)],
      ["Memory for drafts under verification", bytes(stats.ring_bytes)],
    ]);
    const reasons = Object.entries(stats.prefix_misses).sort((a, b) => b[1] - a[1]);
    const most = Math.max(1, ...reasons.map(([, times]) => times));
    const rows = reasons.map(([why, times]) => bar(why, times / most, count(times)));
    this.reasons.replaceChildren(...(rows.length ? rows : [none("No prompt so far")]));
  }

  showDrafts(stats) {
    const rows = stats.drafts_compared.map((compared, i) => {
      const accepted = stats.drafts_accepted[i];
      const text = `${percent(accepted, compared)} of ${count(compared)}`;
      return bar(`Draft ${i + 1}`, compared ? accepted / compared : 0, compared ? text : "–");
    });
    const off = none("Drafting is off. --speculative-config turns it on.");
    this.drafts.replaceChildren(...(rows.length ? rows : [off]));
  }

  showTotals(stats) {
    tell(this.totals, [
      ["Requests finished", count(stats.num_finished)],
      ["Aborted", count(stats.num_aborted)],
      ["Past their deadline", count(stats.num_expired)],
      ["Preemptions", count(stats.num_preemptions)],
      ["Tokens generated", count(stats.generated_tokens)],
      ["Prompt tokens", count(stats.prompt_tokens)],
      ["Of these reused", count(stats.prefix_tokens_reused)],
      ["Steps", count(stats.num_steps)],
      ["Snapshots stored, restored, damaged",
        [stats.num_stored, stats.num_restored, stats.num_damaged].map(count).join(", ")],
      ["Version of the weights", count(stats.weight_version)],
      ["Context", `${count(stats.max_model_len)} tokens`],
    ]);
  }
}

/** Return what happened between two samples, a second. */
function rate(before, now) {
  const seconds = now.time_s - before.time_s;
  if (!(seconds > 0) || now.num_steps < before.num_steps) return null; // another server process
  const steps = now.num_steps - before.num_steps;
  return {
    generated: (now.generated_tokens - before.generated_tokens) / seconds,
    prompt: (now.prompt_tokens - before.prompt_tokens) / seconds,
    step_ms: steps ? (1000 * (now.step_s - before.step_s)) / steps : 0,
  };
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function none(text) {
  return el("li", { class: "none" }, text);
}

/** Fill a list of names and values, of which only the values change. */
function tell(list, rows) {
  if (list.childElementCount !== rows.length) {
    list.replaceChildren(...rows.map(([name, , more]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}), more === undefined ? null : el("small", {})))));
  }
  rows.forEach(([, value, more], i) => {
    const [figure, small] = list.children[i].querySelector("dd").children;
    figure.textContent = value;
    if (small) small.textContent = more;
  });
}
