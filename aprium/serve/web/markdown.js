// Markdown to elements, block by block, while it is being written.
//
// The text is a model's and is not trusted: elements are made one by one, no markup is ever parsed,
// and links lead to http, https and mail only. Blocks that have not changed keep their elements, so
// that a selection or an open menu survives the next token. Raw HTML shows as the text it is.

import { copyButton, el } from "./dom.js";

const DEEPEST = 8; // quotes and lists in one another; deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t](.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*(?:\|[ \t]*)?$/;

/** Shows a text that grows. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.blocks = [];
  }

  /** Show `text`, keeping what is the same. */
  update(text) {
    const blocks = split(text);
    let same = 0;
    while (same < blocks.length && blocks[same].raw === this.blocks[same]?.raw) same++;
    const [old, last] = [this.blocks[same], blocks[same]];
    if (old?.type === "fence" && last?.type === "fence" && old.language === last.language) {
      old.text.data = last.code; // code that grows stays the same element
      Object.assign(last, { node: old.node, text: old.text });
      same++;
    }
    for (let i = 0; i < Math.min(same, blocks.length); i++) blocks[i] = keep(blocks[i], this.blocks[i]);
    for (const gone of this.blocks.slice(same)) gone.node.remove();
    for (const block of blocks.slice(same)) this.root.append(render(block, 0));
    this.blocks = blocks;
  }
}

function keep(block, old) {
  return Object.assign(block, { node: old.node, text: old.text });
}

/** Cut a text into blocks, each with its `raw` lines. */
function split(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const begin = at;
    const block = fence(lines, at) ?? oneLine(lines, at) ?? table(lines, at) ?? quote(lines, at) ??
      list(lines, at) ?? paragraph(lines, at);
    at = block.end;
    block.raw = lines.slice(begin, at).join("\n");
    blocks.push(block);
  }
  return blocks;
}

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const close = new RegExp(`^ {0,3}${open[1][0]}{${open[1].length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const code = lines.slice(at + 1, end).join("\n");
  return { type: "fence", language: open[2].trim().split(/\s/)[0], code, end: end + 1 };
}

function oneLine(lines, at) {
  const heading = HEADING.exec(lines[at]);
  if (heading) {
    const title = heading[2].trim().replace(/[ \t]#+$/, "");
    return { type: "heading", level: heading[1].length, inline: title, end: at + 1 };
  }
  return RULE.test(lines[at]) ? { type: "rule", end: at + 1 } : null;
}

function table(lines, at) {
  const below = lines[at + 1];
  if (!lines[at].includes("|") || below === undefined || !DELIMITERS.test(below)) return null;
  const head = cells(lines[at]);
  const align = cells(below).map(
    (cell) => ({ "11": "center", "01": "right" })[`${+cell.startsWith(":")}${+cell.endsWith(":")}`],
  );
  if (head.length !== align.length) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
  return { type: "table", head, align, rows: lines.slice(at + 2, end).map(cells), end };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function quote(lines, at) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return { type: "quote", inner, end };
}

function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const kind = (marker) => marker.at(-1); // another sign begins another list
  const items = [];
  let [end, loose, indent] = [at, false, 0];
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    if (item && kind(item[2]) === kind(first[2]) && !(items.length && item[1].length >= indent)) {
      indent = item[1].length + item[2].length + Math.min(Math.max(item[3].length, 1), 4);
      items.push([line.slice(Math.min(indent, line.length))]);
    } else if (!line.trim()) {
      const next = lines.slice(end).find((later) => later.trim());
      const goes = next !== undefined && (deep(next, indent) || sameList(next, first, kind));
      if (!goes) break;
      loose = true;
      items.at(-1).push("");
    } else if (deep(line, indent)) {
      items.at(-1).push(line.slice(indent));
    } else if (starts(line) || !items.at(-1).at(-1)) {
      break;
    } else {
      items.at(-1).push(line.trimStart()); // a line that goes on without its indent
    }
    end++;
  }
  const ordered = /\d/.test(first[2]);
  const start = ordered ? Number.parseInt(first[2], 10) : null;
  return { type: "list", ordered, start, loose, items: items.map((i) => i.join("\n")), end };
}

function deep(line, indent) {
  return line.length - line.trimStart().length >= indent;
}

function sameList(line, first, kind) {
  const item = ITEM.exec(line);
  return item !== null && kind(item[2]) === kind(first[2]);
}

function starts(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) {
    if (table(lines, end)) break;
    end++;
  }
  return { type: "paragraph", inline: lines.slice(at, end).join("\n"), end };
}

function render(block, depth) {
  block.node = RENDER[block.type](block, depth);
  return block.node;
}

const RENDER = {
  paragraph: (block) => el("p", {}, ...inline(block.inline)),
  heading: (block) => el(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.inline)),
  rule: () => el("hr"),
  quote: (block, depth) => el("blockquote", {}, ...inside(block.inner, depth)),
  fence(block) {
    block.text = document.createTextNode(block.code);
    const copy = copyButton(() => block.text.data);
    const code = el("pre", { tabindex: 0 }, el("code", {}, block.text));
    const caption = el("figcaption", {}, el("span", {}, block.language || "text"), copy);
    return el("figure", { class: "code" }, caption, code);
  },
  list(block, depth) {
    const items = block.items.map((item) => {
      const inner = inside(item, depth);
      const only = inner[0]?.tagName === "P" && !block.loose;
      return el("li", {}, ...(only ? [...inner[0].childNodes, ...inner.slice(1)] : inner));
    });
    const start = block.ordered && block.start !== 1 ? block.start : null;
    return el(block.ordered ? "ol" : "ul", { start }, ...items);
  },
  table(block) {
    const row = (tag, texts) =>
      el("tr", {}, ...block.align.map((align, i) =>
        el(tag, { class: align ? `align-${align}` : null }, ...inline(texts[i] ?? ""))));
    const body = block.rows.map((texts) => row("td", texts));
    const made = el("table", {}, el("thead", {}, row("th", block.head)), el("tbody", {}, ...body));
    return el("div", { class: "table", tabindex: 0 }, made);
  },
};

function inside(text, depth) {
  if (depth >= DEEPEST) return [el("p", {}, text)];
  return split(text).map((block) => render(block, depth + 1));
}

// What may begin something within a line.
const SPECIAL = /[\\`*_~![<\n]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

/** Return the nodes of a text within a block. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    plain += text.slice(at, found.index);
    const [length, node] = special(text, found.index, depth);
    at = found.index + length;
    if (typeof node === "string") plain += node;
    else {
      flush();
      nodes.push(node);
    }
  }
  plain += text.slice(at);
  flush();
  return nodes;
}

/** Return how much of `text` the thing at `at` takes, and what it is: a node, or plain text. */
function special(text, at, depth) {
  const char = text[at];
  const next = text[at + 1] ?? "";
  if (char === "\n") return [1, el("br")];
  if (char === "\\") {
    if (next === "\n") return [2, el("br")];
    return PUNCTUATION.test(next) ? [2, next] : [1, char];
  }
  if (char === "`") return codeSpan(text, at);
  if (char === "h") return bareLink(text, at);
  if (char === "<") {
    const found = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/.exec(text.slice(at, at + 2048));
    return found ? [found[0].length, link(found[1], [found[1].replace("mailto:", "")])] : [1, char];
  }
  if (depth >= DEEPEST) return [1, char];
  if (char === "[" || (char === "!" && next === "[")) return bracket(text, at, depth);
  if (char === "!") return [1, char];
  return emphasis(text, at, depth);
}

function codeSpan(text, at) {
  const ticks = /^`+/.exec(text.slice(at))[0];
  let end = at + ticks.length;
  for (;;) {
    end = text.indexOf(ticks, end);
    if (end < 0) return [ticks.length, ticks];
    let after = end + ticks.length;
    if (text[after] !== "`") break;
    while (text[after] === "`") after++;
    end = after;
  }
  const code = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const trimmed = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
  return [end + ticks.length - at, el("code", {}, trimmed)];
}

function bareLink(text, at) {
  const found = /^https?:\/\/[^\s<>"'`]*/.exec(text.slice(at, at + 2048))[0];
  let address = found.replace(/[.,;:!?*_~]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return /\/\/./.test(address) ? [address.length, link(address, [address])] : [1, text[at]];
}

function bracket(text, at, depth) {
  const image = text[at] === "!";
  const rest = text.slice(at + image, at + 4096);
  const found = /^\[((?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(rest);
  if (!found || /^(?!https?:|mailto:)[a-z][\w+.-]*:/i.test(found[2])) return [1, text[at]];
  // Pictures would come from elsewhere, which the page does not allow: they show as links.
  const inner = image ? [found[1] || found[2]] : inline(found[1], depth + 1);
  return [found[0].length + image, link(found[2], inner)];
}

function link(address, inner) {
  const url = URL.canParse(address) ? new URL(address) : null;
  const allowed = url !== null && ["http:", "https:", "mailto:"].includes(url.protocol);
  if (!allowed) return el("span", {}, ...inner); // a place within some other page
  const { href } = url;
  const rel = "noopener noreferrer nofollow";
  return el("a", { href, rel, target: "_blank", title: href }, ...inner);
}

const MARKS = [["***", ["em", "strong"]], ["**", ["strong"]], ["__", ["strong"]], ["~~", ["del"]],
  ["*", ["em"]], ["_", ["em"]]];

function emphasis(text, at, depth) {
  for (const [mark, tags] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const begin = at + mark.length;
    if (!/\S/.test(text[begin] ?? " ")) break;
    const word = mark[0] === "_"; // snake_case is a name
    if (word && /\w/.test(text[at - 1] ?? " ")) break;
    const end = closing(text, begin, mark, word);
    if (end < 0) continue;
    let nodes = inline(text.slice(begin, end), depth + 1);
    for (const tag of [...tags].reverse()) nodes = [el(tag, {}, ...nodes)];
    return [end + mark.length - at, nodes[0]];
  }
  const run = /^(.)\1*/.exec(text.slice(at, at + 64))[0];
  return [run.length, run];
}

function closing(text, begin, mark, word) {
  for (let end = text.indexOf(mark, begin + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const after = text[end + mark.length] ?? " ";
    if (!/\S/.test(text[end - 1]) || text[end - 1] === "\\") continue;
    if (word && /\w/.test(after)) continue;
    if (mark.length === 1 && (after === mark || text[end - 1] === mark)) {
      if (after === mark) end++; // two of them are another mark
      continue;
    }
    return end;
  }
  return -1;
}
