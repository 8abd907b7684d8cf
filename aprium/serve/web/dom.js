// Elements made from plain values. Text is always set as text, never read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element; `on*` properties are listeners, null and false attributes are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for an element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Return one of the symbols that index.html defines. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/** Return a button with a symbol, and its name for those who do not see it. */
export function iconButton(name, label, onclick, attributes = {}) {
  const all = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return el("button", { ...all, onclick, ...attributes }, icon(name));
}

/** Return a button that copies what `text()` gives, or null where the browser does not allow it. */
export function copyButton(text) {
  if (!navigator.clipboard) return null;
  const button = iconButton("copy", "Copy", async () => {
    await navigator.clipboard.writeText(text());
    say("Copied");
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Say something to a screen reader. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Write a number with as many digits as one can use. */
export function count(value) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 100 || Number.isInteger(value)) return plain.format(value);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

/** Write a share of one as a percentage; "–" where there is nothing to share. */
export function percent(part, whole) {
  return whole > 0 ? `${((100 * part) / whole).toFixed(part === whole ? 0 : 1)} %` : "–";
}

/** Write a size in bytes. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${count(Math.round(value * 10) / 10)} ${units[unit]}`;
}

/** Keep a scrolling element at its end, unless its reader has scrolled up. */
export class Follower {
  constructor(scroller, jump) {
    this.scroller = scroller;
    this.jump = jump;
    this.pinned = true;
    this.top = this.height = 0;
    scroller.addEventListener("scroll", () => this.note(), { passive: true });
    this.sizes = new ResizeObserver(() => this.follow());
    this.sizes.observe(scroller);
    jump.addEventListener("click", () => this.toEnd());
  }

  /** Follow the growth of `content`, which the element shows from now on. */
  show(content) {
    if (this.content) this.sizes.unobserve(this.content);
    this.content = content;
    this.sizes.observe(content);
    this.toEnd();
  }

  toEnd() {
    this.pinned = true;
    this.follow();
  }

  note() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    // Only a reader moves up in a text that does not shrink.
    if (scrollTop < this.top - 1 && scrollHeight >= this.height) this.pinned = false;
    else if (scrollHeight - scrollTop - clientHeight < 8) this.pinned = true;
    this.top = scrollTop;
    this.height = scrollHeight;
    this.jump.hidden = this.pinned;
  }

  follow() {
    if (this.pinned) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.note();
  }
}
