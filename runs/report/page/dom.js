"use strict";
// Elements, numbers and texts. Everything that a model or a user wrote goes into the page as a text node, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const severalRuns = runs.length > 1;

/** An element with attributes (`on*`: listeners, `class`, ...) and children: elements, texts, or nothing. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

const MINUS = "\u2212";

/** A number as people read it: four significant digits, a real minus sign. */
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-3) text = value.toExponential(2).replace("e+", "e");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en-US");
  else text = value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 ? 3 : 4);
  if (text.includes(".") && Number.isInteger(value)) text = String(value);
  return text.replace("-", MINUS);
}

function signed(value) {
  return value === null || value === undefined ? "\u2013" : (value > 0 ? "+" : "") + shown(value);
}

const percent = (value) => `${Math.round(1000 * value) / 10} %`;

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** Text with what cannot be seen made visible: control characters, marks of direction, halves of surrogate pairs. */
function visible(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.charCodeAt(0);
    return code < 0x20
      ? String.fromCharCode(0x2400 + code)
      : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

/** A text of a model, in a direction of its own. */
function quoted(text, className = "") {
  return h("bdi", { class: className, dir: "auto" }, visible(text));
}

function say(text) {
  document.getElementById("said").textContent = text;
}

function table(head, rows, attributes = {}) {
  const cell = (tag, content, i) => h(tag, { class: i ? "number" : null, scope: tag === "th" ? "col" : null }, content);
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": attributes.label || "table" },
    h(
      "table",
      { class: attributes.class },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((content, i) => cell("th", content, i)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((content, i) => cell("td", content, i)),
          ),
        ),
      ),
    ),
  );
}

function select(label, options, value, onchange) {
  const list = h(
    "select",
    { onchange: (event) => onchange(event.target.value) },
    options.map(([key, text]) => h("option", { value: key, selected: key === value }, text)),
  );
  return h("label", { class: "field" }, h("span", {}, label), list);
}

// Colours: Okabe and Ito's palette, which survives colour blindness, each with a dash of its own for print.

const PALETTES = {
  light: ["#0072b2", "#d55e00", "#008a65", "#b4558c", "#a87400", "#3a3f47", "#5b4fc4", "#2f93c9"],
  dark: ["#56b4e9", "#ff8a4c", "#2fc79a", "#e39ac6", "#f0c04a", "#c9ced6", "#a99cff", "#8fd3ff"],
};
const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4], [12, 6], [4, 2], [1, 3], [8, 2, 2, 2]];

const wantsDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = "auto";
let isPrinting = false;

function theme() {
  if (isPrinting) return "light";
  return chosenTheme === "auto" ? (wantsDark.matches ? "dark" : "light") : chosenTheme;
}

const onTheme = [];
function applyTheme() {
  document.documentElement.dataset.theme = theme();
  onTheme.forEach((redraw) => redraw());
}
wantsDark.addEventListener("change", applyTheme);
addEventListener("beforeprint", () => {
  isPrinting = true;
  applyTheme();
});
addEventListener("afterprint", () => {
  isPrinting = false;
  applyTheme();
});
document.documentElement.dataset.theme = theme();

const colour = (i) => PALETTES[theme()][i % PALETTES.light.length];
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** An element in a colour of the palette, whatever the theme. */
function painted(element, i) {
  const paint = () => {
    element.style.background = colour(i);
  };
  onTheme.push(paint);
  paint();
  return element;
}
