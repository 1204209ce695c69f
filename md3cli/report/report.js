/* The page's behaviour: filter, sort, move, mark, look closer. Plain JavaScript, no dependencies.
   Text from records is only ever read from the page or written as text, never as markup. */
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  const form = $("#filters");
  document.documentElement.classList.add("js");
  if (!form) return; // the overview of many pages has no cards

  // What is known of each record: facts from the page's data, and its elements.
  const cards = $$(".card").map((element) => ({ element, records: [] }));
  const records = data.records.map((facts, k) => {
    const element = $(`#r${k}`);
    const card = cards[Number(element.closest(".card").dataset.n)];
    const record = { ...facts, k, element, card, shown: true, drawing: $(`.overlay [data-k="${k}"]`, card.element) };
    card.records.push(record);
    return record;
  });
  const searchText = (record) => (record.words ??= `${record.image ?? ""}\n${record.element.textContent}`.toLowerCase());

  // ---- filters -------------------------------------------------------------------------------

  const FACETS = ["task", "status", "mark", "verdict", "label"];

  function readFilters() {
    const values = new FormData(form);
    const number = (name, otherwise) => (values.has(name) ? Number(values.get(name)) : otherwise);
    return {
      words: (values.get("text") ?? "").toLowerCase().split(/\s+/).filter(Boolean),
      chosen: Object.fromEntries(FACETS.map((name) => [name, new Set(values.getAll(name))])),
      min: number("min", 0),
      max: number("max", 1),
      sort: values.get("sort"),
    };
  }

  const isAny = (chosen, values) => chosen.size === 0 || values.some((value) => chosen.has(String(value)));
  const isObjectShown = (record, o, { min, max, chosen }) => {
    const score = record.scores[o] ?? null;
    return (score === null || (score >= min && score <= max)) && isAny(chosen.label, [record.labels[o]]);
  };

  function isShown(record, filters) {
    const { words, chosen, min, max } = filters;
    if (!isAny(chosen.task, [record.task]) || !isAny(chosen.status, [record.status])) return false;
    if (!isAny(chosen.mark, [marks.get(record.id)?.mark ?? "none"])) return false;
    if (!isAny(chosen.verdict, [record.verdict ?? "none"])) return false;
    const isWhole = min <= 0 && max >= 1;
    if (record.labels.length === 0 && chosen.label.size > 0) return false;
    if (record.labels.length > 0 && !record.labels.some((_, o) => isObjectShown(record, o, filters))) return false;
    if (record.labels.length === 0 && !isWhole && !record.scores.some((s) => s >= min && s <= max)) return false;
    return words.every((word) => searchText(record).includes(word));
  }

  function showObjects(record, filters, root) {
    for (const element of $$("[data-o]", root)) {
      if (element.dataset.o === "") continue; // what the ground truth has and the model missed
      element.classList.toggle("off", !isObjectShown(record, Number(element.dataset.o), filters));
    }
  }

  const least = (card) => Math.min(...card.records.filter((r) => r.shown).flatMap((r) => r.scores));
  const most = (card) => Math.max(...card.records.filter((r) => r.shown).flatMap((r) => r.scores));
  const numObjects = (card) => card.records.filter((r) => r.shown).reduce((sum, r) => sum + r.labels.length, 0);
  const ORDERS = {
    unsure: (card) => least(card), // cards without scores: +Infinity, last
    sure: (card) => -most(card),
    many: (card) => -numObjects(card),
    few: (card) => numObjects(card),
  };

  function sorted(visible, order) {
    if (order === "name") {
      const names = new Intl.Collator(undefined, { numeric: true });
      return visible.sort((a, b) => names.compare(a.records[0].image ?? "", b.records[0].image ?? ""));
    }
    if (!ORDERS[order]) return visible;
    const keys = new Map(visible.map((card) => [card, ORDERS[order](card)]));
    return visible.sort((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b)));
  }

  let visibleRecords = records;

  function apply() {
    const filters = readFilters();
    for (const record of records) {
      record.shown = isShown(record, filters);
      record.element.hidden = !record.shown;
      record.drawing?.toggleAttribute("hidden", !record.shown);
      if (record.shown) {
        showObjects(record, filters, record.element);
        if (record.drawing) showObjects(record, filters, record.drawing);
      }
    }
    const visible = sorted(cards.filter((card) => card.records.some((r) => r.shown)), filters.sort);
    const isVisible = new Set(visible);
    for (const card of cards) card.element.hidden = !isVisible.has(card);
    $("#cards").append(...visible.map((card) => card.element));
    visibleRecords = visible.flatMap((card) => card.records.filter((r) => r.shown));
    describe(visible.length, filters);
  }

  function describe(numVisible, { min, max }) {
    const all = cards.length.toLocaleString("en");
    $("#shown").value = numVisible === cards.length ? `${all} shown` : `${numVisible.toLocaleString("en")} of ${all}`;
    $("#nothing").hidden = numVisible > 0;
    if ($("#range")) $("#range").value = `${min.toFixed(2)} to ${max.toFixed(2)}`;
  }

  function rememberFilters() {
    const entries = [...new FormData(form)].filter(([name, value]) => value !== "" && value !== { min: "0", max: "1" }[name]);
    history.replaceState(null, "", entries.length ? `#${new URLSearchParams(entries)}` : location.pathname);
  }

  function recallFilters() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      for (const field of form.elements) {
        if (field.name !== name) continue;
        if (field.type !== "checkbox") field.value = value;
        else if (field.value === value) field.checked = true;
      }
    }
  }

  let waiting = 0;
  const change = () => {
    clearTimeout(waiting);
    $("#cards").ariaBusy = "true";
    waiting = setTimeout(() => { apply(); rememberFilters(); $("#cards").ariaBusy = "false"; }, 60);
  };
  form.addEventListener("input", change);
  form.addEventListener("change", change);
  form.addEventListener("reset", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  const fold = (isFolded) => {
    form.classList.toggle("folded", isFolded);
    $("#more").setAttribute("aria-expanded", String(!isFolded));
  };
  $("#more").addEventListener("click", () => fold(!form.classList.contains("folded")));

  // A bar of a plot picks what it counts.
  for (const bar of $$("[data-pick]")) {
    bar.addEventListener("click", () => {
      const [kind, ...rest] = bar.dataset.pick.split(":");
      const name = rest.join(":");
      const label = kind === "label" ? data.labels.indexOf(name) : -1;
      const chip = $$("input[name=label]", form).find((input) => input.value === String(label));
      if (chip) chip.checked = !chip.checked;
      else form.elements.text.value = name;
      change();
      $("#cards").scrollIntoView({ block: "start" });
    });
  }

  // ---- marks ---------------------------------------------------------------------------------

  const STORE = `md3-marks:${data.run}`;
  const marks = new Map();
  try {
    for (const mark of JSON.parse(localStorage.getItem(STORE) ?? "[]")) marks.set(mark.id, mark);
  } catch { /* no storage here: marks last as long as the page */ }

  function setMark(record, mark) {
    if (mark) {
      const { id, image, image_b64, task, prompt } = record;
      marks.set(id, { id, image, ...(image_b64 && { image_b64 }), task, prompt, mark });
    } else marks.delete(record.id);
    try {
      localStorage.setItem(STORE, JSON.stringify([...marks.values()]));
    } catch { /* full or forbidden: the download still holds them */ }
    showMarks(record);
  }

  function showMarks(record) {
    const mark = marks.get(record.id)?.mark;
    const places = [record.element, $(`.panel [data-k="${record.k}"]`)].filter(Boolean);
    for (const button of places.flatMap((place) => $$(".mark", place))) {
      button.setAttribute("aria-pressed", String(button.classList.contains(mark ?? "unmarked")));
    }
    countMarks();
  }

  function countMarks() {
    $("#download").disabled = marks.size === 0;
    $("#download").textContent = marks.size ? `Save ${marks.size} mark${marks.size === 1 ? "" : "s"}` : "Save marks";
  }

  function download() {
    const lines = [...marks.values()].map((mark) => JSON.stringify(mark) + "\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
    link.download = `${data.name}.marks.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
  $("#download").addEventListener("click", download);

  // ---- the cursor ----------------------------------------------------------------------------

  let cursor = null;

  function moveTo(record) {
    if (!record) return;
    cursor?.element.classList.remove("cursor");
    cursor = record;
    cursor.element.classList.add("cursor");
    cursor.element.focus({ preventScroll: true });
    cursor.card.element.scrollIntoView({ block: "nearest" });
    if (viewer.open) look(cursor);
  }

  function step(by) {
    const at = visibleRecords.indexOf(cursor);
    if (at < 0) moveTo(visibleRecords[0]);
    else moveTo(visibleRecords[Math.min(Math.max(at + by, 0), visibleRecords.length - 1)]);
  }

  function markAndGoOn(mark) {
    if (!cursor) return step(1);
    setMark(cursor, mark);
    if (mark) step(1);
  }

  // ---- the viewer ----------------------------------------------------------------------------

  const viewer = $("#viewer");

  function look(record) {
    const card = record.card.element;
    const picture = $(".picture", card)?.cloneNode(true);
    $(".stage").replaceChildren(...(picture ? [picture] : []));
    const parts = [...card.children].filter((part) => !part.classList.contains("picture")).map((part) => part.cloneNode(true));
    for (const part of parts) {
      part.removeAttribute("id");
      part.classList.toggle("cursor", part.dataset.k === String(record.k));
      for (const details of $$("details", part)) details.open = true;
    }
    $(".panel").replaceChildren(...parts);
    if (record.labels.length > 0) { // of several records on a picture, the one looked at stands out
      for (const drawing of $$(".stage .overlay > g")) drawing.classList.toggle("dim", drawing.dataset.k !== String(record.k));
    }
    if (!viewer.open) viewer.showModal();
    fitNames();
    $(".panel .cursor")?.scrollIntoView({ block: "nearest" });
  }

  // Names keep their size on the screen however large the picture is drawn.
  function fitNames() {
    const overlay = $(".stage .overlay");
    if (!overlay) return;
    const { width, height } = overlay.getBoundingClientRect();
    const frame = overlay.viewBox.baseVal;
    const scale = Math.min(width / frame.width, height / frame.height);
    if (scale > 0) overlay.style.setProperty("--u", String(1.25 / scale));
  }
  addEventListener("resize", fitNames);
  $(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => cursor?.element.focus({ preventScroll: true }));
  $("#help").addEventListener("click", () => $("#keys").showModal());

  // ---- pointing ------------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const entry = event.target.closest(".entry");
    const record = entry && records[Number(entry.dataset.k)];
    const button = event.target.closest(".mark");
    if (button && record) {
      const mark = button.classList.contains("right") ? "right" : "wrong";
      setMark(record, marks.get(record.id)?.mark === mark ? null : mark);
    }
    if (record && !viewer.open) moveTo(record);
    if (event.target.closest(".stage") || event.target === viewer) viewer.close();
    else if (event.target.closest(".card .picture")) {
      const card = cards[Number(event.target.closest(".card").dataset.n)];
      moveTo(card.records.find((r) => r.shown));
      look(cursor);
    }
  });

  // Pointing at a passage shows what it is grounded on; at an object, its twin in the list or the picture.
  function point(event, isOn) {
    const target = event.target.closest?.('mark[data-g], [data-o]:not([data-o=""])');
    const home = target?.closest("#viewer, .card");
    if (!home) return;
    const k = target.closest("[data-k]").dataset.k;
    const { g, o } = target.dataset;
    const twins = g === undefined ? `[data-k="${k}"] [data-o="${o}"]` : `.overlay [data-k="${k}"] [data-g="${g}"]`;
    for (const twin of $$(twins, home)) twin.classList.toggle(g === undefined ? "lit" : "on", isOn);
  }
  for (const [name, isOn] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]]) {
    document.addEventListener(name, (event) => point(event, isOn));
  }

  // ---- keys ----------------------------------------------------------------------------------

  const KEYS = {
    j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
    r: () => markAndGoOn("right"), w: () => markAndGoOn("wrong"), u: () => markAndGoOn(null),
    Enter: () => (cursor && !viewer.open ? look(cursor) : step(0)),
    b: () => document.body.classList.toggle("boxless"),
    "/": () => { viewer.close(); form.elements.text.focus(); },
    "?": () => $("#keys").showModal(),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("#keys").open) return;
    const isTyping = event.target.matches("input[type=search], input[type=range], select");
    if (isTyping) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "Enter" && event.target.closest("button, summary, a, mark")) return;
    const act = KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  // What is scrolled to stays clear of the filters, which stick to the top.
  new ResizeObserver(() => {
    document.documentElement.style.scrollPaddingTop = `${form.offsetHeight + 10}px`;
  }).observe(form);

  fold(matchMedia("(max-width: 720px)").matches);
  recallFilters();
  records.filter((record) => marks.has(record.id)).forEach(showMarks);
  countMarks();
  apply();
})();
