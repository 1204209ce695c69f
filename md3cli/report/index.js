/* What is known of every picture, as columns: read piece by piece, filtered, ordered. Touches no element.
   Pictures, records and objects are numbers from 0; the records of a picture and the objects of a record stand together,
   from firstRecord[p] and firstObject[r] on. 100,000 pictures are looked through in a few dozen milliseconds. */
"use strict";

const STATUSES = ["ok", "empty", "failed"];
const VERDICTS = ["none", "right", "wrong"];
const QUALITIES = ["loop", "refusal", "cut"];
const WORDS_BY_SPACE = /\s+/;

const index = {
  images: [], lowImages: [], imagesB64: new Map(), firstRecord: [0],
  ids: [], tasks: [], prompts: [], statuses: [], verdicts: [], qualities: [], texts: [], firstObject: [0],
  parts: new Map(), // of records about a part of the picture: its label
  labels: [], scores: [], // label -1: the score of a choice among answers; score NaN: none
  words: [], lowWords: [], numbers: new Map(), // what tasks, prompts and labels count in
  labelsOfPrompt: new Map(), // what was found under a prompt is its name
};
const numPictures = () => index.images.length;
const numRecords = () => index.ids.length;

function numberOf(word) {
  let number = index.numbers.get(word);
  if (number === undefined) {
    index.numbers.set(word, (number = index.words.length));
    index.words.push(word);
    index.lowWords.push(word.toLowerCase());
  }
  return number;
}

/* Takes over one piece, as IndexPiece of index.py says it. */
function addPiece(piece) {
  const numbers = piece.words.map(numberOf);
  const number = (local) => (local < 0 ? -1 : numbers[local]);
  const add = (column, values) => { for (const value of values) column.push(value); };
  for (const [place, name] of Object.entries(piece.images_b64)) index.imagesB64.set(numPictures() + Number(place), name);
  add(index.images, piece.images);
  add(index.lowImages, piece.images.map((name) => (name ?? "").toLowerCase()));
  for (const count of piece.records) index.firstRecord.push(index.firstRecord.at(-1) + count);
  const from = numRecords();
  for (const [place, local] of Object.entries(piece.parts ?? {})) index.parts.set(from + Number(place), number(local));
  for (const name of ["ids", "statuses", "verdicts", "qualities"]) add(index[name], piece[name]);
  add(index.tasks, piece.tasks.map(number));
  add(index.prompts, piece.prompts.map(number));
  add(index.texts, piece.texts.map((text) => text.toLowerCase()));
  for (const count of piece.objects) index.firstObject.push(index.firstObject.at(-1) + count);
  add(index.labels, piece.labels.map(number));
  add(index.scores, piece.scores.map((score) => score ?? NaN));
  for (let r = from; r < numRecords(); r++) noteNames(r);
}

function noteNames(r) {
  const prompt = index.prompts[r];
  if (prompt < 0 || !hasObjects(r)) return;
  if (!index.labelsOfPrompt.has(prompt)) index.labelsOfPrompt.set(prompt, new Set());
  index.labelsOfPrompt.get(prompt).add(index.labels[index.firstObject[r]]);
}

const hasObjects = (r) => index.firstObject[r] < index.firstObject[r + 1] && index.labels[index.firstObject[r]] >= 0;

/* ---- filters: sets of values, empty for all; scores from and to; words that must all be there ---- */

const OBJECT_TASKS = ["detect", "point", "segment"];

function isObjectShown(o, filters) {
  const score = index.scores[o];
  if (score < filters.from || score > filters.to) return false; // no score (NaN) is never out of range
  return filters.labels.size === 0 || filters.labels.has(index.labels[o]);
}

function isChosen(r, filters, markOf) {
  const { status, verdict, quality, mark } = filters.chosen;
  if (filters.tasks.size > 0 && !filters.tasks.has(index.tasks[r])) return false;
  if (filters.prompts.size > 0 && !filters.prompts.has(index.prompts[r])) return false;
  if (status.size > 0 && !status.has(STATUSES[index.statuses[r]])) return false;
  if (verdict.size > 0 && !verdict.has(VERDICTS[index.verdicts[r]])) return false;
  if (quality.size > 0 && !QUALITIES.some((name, bit) => (index.qualities[r] >> bit) & 1 && quality.has(name))) return false;
  return mark.size === 0 || mark.has(markOf(index.ids[r]) ?? "none");
}

/* Whether a record that found nothing is shown. Who picks a label wants to see it, and what was said about it; with
   "nothing found" or "failed", where it was looked for in vain. */
function isEmptyShown(r, filters) {
  if (filters.from > 0 || filters.to < 1) return false;
  if (filters.labels.size === 0) return true;
  if (index.parts.has(r) && filters.labels.has(index.parts.get(r)) && !OBJECT_TASKS.includes(index.words[index.tasks[r]])) return true;
  const prompt = index.prompts[r];
  if (filters.chosen.status.size === 0 || !OBJECT_TASKS.includes(index.words[index.tasks[r]])) return false;
  return filters.labels.has(prompt) || [...(index.labelsOfPrompt.get(prompt) ?? [])].some((label) => filters.labels.has(label));
}

/* A search for words: each word must be in the name, or in the record's task, prompt, labels or text. */
function searcher(words) {
  const hits = words.map((word) => index.lowWords.map((known) => known.includes(word)));
  const isIn = (p, r, n) => {
    const hit = hits[n];
    if (index.lowImages[p].includes(words[n]) || hit[index.tasks[r]] || hit[index.prompts[r]]) return true;
    if (index.texts[r].includes(words[n]) || hit[index.parts.get(r)]) return true;
    for (let o = index.firstObject[r]; o < index.firstObject[r + 1]; o++) if (hit[index.labels[o]]) return true;
    return false;
  };
  return (p, r) => words.every((_, n) => isIn(p, r, n));
}

/* Returns what is shown: `pictures` in their order, of each record whether it is, and counts; `markOf(id)` is a mark.
   One pass over the columns: it counts objects and finds the lowest score, by which pictures are ordered. */
function select(filters, markOf) {
  const { firstRecord, firstObject, labels, scores } = index;
  const isFound = filters.words.length > 0 ? searcher(filters.words) : () => true;
  const isShown = new Uint8Array(numRecords());
  const least = new Float64Array(numPictures()).fill(Infinity); // how sure a picture's answers are
  const objects = new Int32Array(numPictures());
  const pictures = [];
  let [numShown, numObjects] = [0, 0];
  for (let p = 0; p < numPictures(); p++) {
    const before = numShown;
    for (let r = firstRecord[p]; r < firstRecord[p + 1]; r++) {
      if (!isChosen(r, filters, markOf) || !isFound(p, r)) continue;
      let fitting = 0;
      for (let o = firstObject[r]; o < firstObject[r + 1]; o++) {
        if (!isObjectShown(o, filters)) continue;
        fitting++;
        if (labels[o] >= 0) objects[p]++;
        if (scores[o] < least[p]) least[p] = scores[o];
      }
      if (fitting === 0 && (firstObject[r] < firstObject[r + 1] || !isEmptyShown(r, filters))) continue;
      isShown[r] = 1;
      numShown++;
    }
    if (numShown > before) pictures.push(p);
    numObjects += objects[p];
  }
  return { pictures: ordered(pictures, ORDERS[filters.sort]?.(least, objects)), isShown, numRecords: numShown, numObjects };
}

/* ---- orders: by what is shown of a picture, the smallest first; equal ones stay in the order of the run ---- */

const ORDERS = {
  "least-sure": (least) => least,
  "most-sure": (least) => least.map((score) => (score === Infinity ? score : -score)), // without scores: last here, too
  "most-objects": (_, objects) => objects.map((count) => -count),
  "fewest-objects": (_, objects) => objects,
  name: () => nameRanks(),
};

const ordered = (pictures, keys) =>
  keys ? pictures.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] - keys[b])) : pictures;

let ranks = null;

/* Natural order (a2 before a10). Numbers are made equally long and texts compared as they are: an Intl.Collator takes
   a second for 100,000 names. */
function nameRanks() {
  if (ranks !== null) return ranks;
  const keys = index.lowImages.map((name) => name.replace(/\d+/g, (digits) => digits.padStart(16, "0")));
  const byName = keys.map((_, p) => p).sort((a, b) => (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : a - b));
  ranks = new Int32Array(keys.length);
  byName.forEach((p, rank) => { ranks[p] = rank; });
  return ranks;
}
