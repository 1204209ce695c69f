/* The elements of one picture, from its card's data (card_of in index.py). Whatever comes from a record is set as text or
   as a number; nothing is ever read as markup. */
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const NAME_LETTERS = 28; // of a label on a picture
const CROWD = 12; // more shapes than this show their names on demand

function fitted(element, attributes, parts) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...parts.flat().filter((part) => part !== null && part !== undefined));
  return element;
}
const make = (tag, attributes = {}, ...parts) => fitted(document.createElement(tag), attributes, parts);
const draw = (tag, attributes = {}, ...parts) => fitted(document.createElementNS(SVG, tag), attributes, parts);

const withScore = (label, score, digits) => (score === undefined ? label : `${label} ${score.toFixed(digits)}`);
const shortened = (text) => (text.length > NAME_LETTERS ? `${text.slice(0, NAME_LETTERS - 1)}…` : text);

function shapeOf(shape, number, colourOf) {
  const verdict = shape.verdict ? ` (${shape.verdict})` : "";
  const [x, y, width, height] = shape.rect ?? [];
  const [cx, cy] = shape.point ?? [];
  const outline = shape.path ? draw("path", { d: shape.path }) : shape.rect ? draw("rect", { x, y, width, height }) : null;
  const [at, line] = shape.at;
  return draw("g", { class: `shape ${colourOf(shape.label)} ${shape.verdict ?? ""}`.trimEnd(), "data-o": number },
    draw("title", {}, withScore(shape.label, shape.score, 3) + verdict),
    outline,
    shape.point ? draw("circle", { cx, cy, r: 4.5 }) : null,
    draw("text", { class: shape.end ? "end" : null, x: at, y: line }, withScore(shortened(shape.label), shape.score, 2)));
}

const frameOf = ([x, y, width, height]) => draw("rect", { x, y, width, height });

function drawingOf(record, k, colourOf) {
  const grounds = (record.reasoning ?? []).filter((passage) => passage.points.length > 0);
  return draw("g", { "data-k": k },
    (record.shapes ?? []).map((shape, o) => shapeOf(shape, o, colourOf)),
    (record.missed ?? []).map((shape) => shapeOf(shape, "", colourOf)),
    record.part ? draw("g", { class: "ground", "data-g": "part" }, frameOf(record.part.rect)) : null,
    grounds.map((passage, g) => draw("g", { class: "ground", "data-g": g },
      passage.points.map(([cx, cy]) => draw("circle", { cx, cy, r: 6 })))));
}

function overlayOf(card, first, colourOf) {
  const numShapes = card.records.reduce((sum, one) => sum + (one.shapes?.length ?? 0) + (one.missed?.length ?? 0), 0);
  const kind = numShapes > CROWD ? "overlay crowded" : "overlay";
  return draw("svg", { class: kind, viewBox: `0 0 ${card.frame[0]} ${card.frame[1]}`, "aria-hidden": "true" },
    card.records.map((record, i) => drawingOf(record, first + i, colourOf)));
}

function reasoningOf(passages) {
  let ground = 0;
  return make("details", { class: "reasoning" }, make("summary", {}, "Reasoning"), make("p", { dir: "auto" },
    passages.map(({ text, points }) =>
      points.length > 0 ? make("mark", { tabindex: 0, "data-g": ground++ }, text || "●") : text)));
}

function markButton(mark, name, sign) {
  return make("button", { type: "button", class: `mark ${mark}`, "aria-pressed": "false", "aria-label": name,
    title: `${name} (${mark[0]})` }, sign);
}

function askedOf(record) {
  const isCounted = record.text === undefined && record.status !== "failed";
  return make("div", { class: "ask" },
    record.part ? make("mark", { class: "part", tabindex: 0, "data-g": "part", dir: "auto" }, record.part.name) : null,
    make("span", { class: "task" }, record.task), " ",
    make("span", { class: "prompt", dir: "auto" }, record.prompt),
    record.verdict ? make("span", { class: `verdict ${record.verdict}` }, record.verdict) : null,
    (record.qualities ?? []).map((quality) => make("span", { class: "verdict wrong" }, quality)),
    isCounted ? make("span", { class: "count" }, String(record.shapes?.length ?? 0)) : null,
    make("span", { class: "marks" }, markButton("right", "Right", "✓"), markButton("wrong", "Wrong", "✗")));
}

function objectOf(shape, o, prompt, colourOf) {
  const name = shape.label === prompt ? "" : `${shape.label} `;
  const number = shape.score === undefined ? String(o + 1) : shape.score.toFixed(2);
  return make("li", { class: colourOf(shape.label), "data-o": o }, name + number);
}

function entryOf(record, k, colourOf) {
  const { text, choices, reasoning, shapes, note } = record;
  const chosen = choices?.map(([name, score]) => `${name} ${score.toFixed(3)}`).join(" · ");
  const [kind, about] = record.part ? ["entry of-part", `${record.part.name}: `] : ["entry", ""];
  return make("section", { class: `${kind} ${record.status}`, id: `r${k}`, "data-k": k, tabindex: -1,
    "aria-label": `${about}${record.task} ${record.prompt}` },
    askedOf(record),
    text === undefined ? null : make("p", { class: text ? "text" : "text empty", dir: "auto" }, text || "(empty)"),
    chosen ? make("p", { class: "note" }, chosen) : null,
    reasoning ? reasoningOf(reasoning) : null,
    shapes ? make("ul", { class: "objects" }, shapes.map((shape, o) => objectOf(shape, o, record.prompt, colourOf))) : null,
    note ? make("p", { class: "note", dir: "auto" }, note) : null);
}

const headOf = (name, size) =>
  make("h2", { title: name }, make("bdi", {}, name || "no picture"), size ? make("small", {}, size) : null);

/* The card of picture `n` before its data is there: its name, and room for the picture. What could turn or hide text is
   left out of the name until the card brings it in legible form. */
function emptyCard(n, name) {
  const room = name === null ? null : make("div", { class: "picture" });
  const plain = (name ?? "").replace(/\p{C}|\p{Zl}|\p{Zp}/gu, "�");
  return make("article", { class: "card waiting", "data-n": n }, room, headOf(plain, null));
}

/* Fills an empty card; `first` is the number of the picture's first record, `colourOf(label)` a class. */
function fillCard(element, card, first, colourOf) {
  const room = element.querySelector(".picture");
  const picture = card.thumbnail
    ? make("img", { src: card.thumbnail, alt: "", decoding: "async" })
    : make("p", { class: "missing" }, card.missing ?? "no picture");
  room?.append(picture, overlayOf(card, first, colourOf));
  element.querySelector("h2").replaceWith(headOf(card.name, card.size ?? null));
  element.append(...card.records.map((record, i) => entryOf(record, first + i, colourOf)));
  element.classList.remove("waiting");
}
