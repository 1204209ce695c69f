/* The page's behaviour: load, filter, sort, page, move, mark, look closer. Plain JavaScript, no dependencies.
   Only the cards of one page are elements; all else is columns (index.js). The address (#...) holds what is shown. */
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  const form = $("#filters");
  const colours = new Map(data.labels);
  const colourOf = (label) => colours.get(label) ?? "c0 d0";
  const written = (number) => number.toLocaleString("en");
  document.documentElement.classList.add("js");

  // ---- script files beside the page ----------------------------------------------------------

  const arrived = new Map();
  globalThis.md3 = (stamp, name, text) => arrived.set(name, stamp === data.files?.stamp ? text : null);

  // A script element is the one way to read a file beside a page that was opened from a disk.
  function load(kind, number) {
    const name = `${kind}-${String(number + 1).padStart(5, "0")}`;
    const path = `${data.files.folder}/${name}.js`;
    return new Promise((resolve, reject) => {
      const script = make("script", { src: path });
      script.nonce = data.files.stamp;
      script.onload = () => {
        const text = arrived.get(name);
        arrived.delete(name);
        script.remove();
        if (text) resolve(JSON.parse(text));
        else reject(new Error(`${decodeURI(path)} is of another report than this page: make the report again.`));
      };
      script.onerror = () => reject(new Error(`${decodeURI(path)} cannot be read: keep the folder beside this page.`));
      document.head.append(script);
    });
  }

  const loadIndex = () =>
    data.files ? Promise.all([...Array(data.files.index).keys()].map((n) => load("index", n))) : data.index;

  const PIECES_KEPT = 50; // of cards, 20 MB: a page in the run's order needs six, and going back needs none again
  const pieces = new Map();

  function loadCards(number) {
    if (!data.files) return data.cards[number];
    if (!pieces.has(number)) {
      pieces.set(number, load("cards", number));
      if (pieces.size > PIECES_KEPT) pieces.delete(pieces.keys().next().value);
    }
    return pieces.get(number);
  }

  function tell(text) {
    $("#nothing").textContent = text;
    $("#nothing").hidden = text === "";
  }

  // ---- marks ---------------------------------------------------------------------------------

  // Kept in parts, by the first letter of the id: a mark writes 0.3 MB where 120,000 are there, all that a browser holds.
  const STORE = `md3-marks:${data.run}:`;
  const marks = new Map(); // record id to right or wrong; ids of other reports of these pictures stay in it
  let numMarked = 0; // in this report

  function readMarks() {
    marks.clear();
    try {
      const parts = Object.keys(localStorage).filter((key) => key.startsWith(STORE));
      for (const part of parts) {
        for (const [mark, ids] of Object.entries(JSON.parse(localStorage.getItem(part)))) {
          for (const id of ids) marks.set(id, mark);
        }
      }
    } catch { /* no storage here: marks last as long as the page */ }
  }

  function keepMarks(letter) {
    const ids = { right: [], wrong: [] };
    for (const [id, mark] of marks) if (id[0] === letter) ids[mark]?.push(id);
    try {
      localStorage.setItem(STORE + letter, JSON.stringify(ids));
    } catch {
      tell("This browser keeps no more marks. They last as long as this page: save them now.");
    }
  }

  function setMark(r, mark) {
    const id = index.ids[r];
    numMarked += (mark ? 1 : 0) - (marks.has(id) ? 1 : 0);
    if (mark) marks.set(id, mark);
    else marks.delete(id);
    keepMarks(id[0]);
    showMark(r, document);
    countMarks();
  }

  function showMark(r, root) {
    const mark = marks.get(index.ids[r]) ?? "unmarked";
    for (const button of $$(`.entry[data-k="${r}"] .mark`, root)) {
      button.setAttribute("aria-pressed", String(button.classList.contains(mark)));
    }
  }

  function countMarks() {
    $("#download").disabled = numMarked === 0;
    $("#download").textContent = numMarked ? `Save ${written(numMarked)} mark${numMarked === 1 ? "" : "s"}` : "Save marks";
  }

  function* markLines() {
    for (let p = 0; p < numPictures(); p++) {
      for (let r = index.firstRecord[p]; r < index.firstRecord[p + 1]; r++) {
        const [id, mark, image_b64] = [index.ids[r], marks.get(index.ids[r]), index.imagesB64.get(p)];
        const prompt = index.words[index.prompts[r]] ?? null;
        const record = { id, image: index.images[p], ...(image_b64 && { image_b64 }), task: index.words[index.tasks[r]] };
        if (mark) yield `${JSON.stringify({ ...record, prompt, mark })}\n`;
      }
    }
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([...markLines()], { type: "application/x-ndjson" }));
    link.download = `${data.name}.marks.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
  $("#download").addEventListener("click", download);

  async function upload(event) {
    const text = await event.target.files[0]?.text();
    event.target.value = "";
    try {
      for (const line of (text ?? "").split("\n").filter((one) => one.trim() !== "")) {
        const { id, mark } = JSON.parse(line);
        if (typeof id === "string" && id !== "" && ["right", "wrong"].includes(mark)) marks.set(id, mark);
      }
    } catch {
      tell("That file holds no marks: it has lines that are not JSON.");
    }
    for (const letter of new Set([...marks.keys()].map((id) => id[0]))) keepMarks(letter);
    showAllMarks();
  }
  $("#upload").addEventListener("change", upload);

  function showAllMarks() {
    numMarked = marks.size === 0 ? 0 : index.ids.reduce((sum, id) => sum + marks.has(id), 0);
    countMarks();
    for (const r of onPage) showMark(r, document);
  }
  addEventListener("storage", (event) => { // marked in another tab
    if (!event.key?.startsWith(STORE)) return;
    readMarks();
    showAllMarks();
  });

  // ---- what is asked for: the form, and the address ------------------------------------------

  const DEFAULTS = { text: "", sort: "input", "score-from": "0", "score-to": "1" };
  let page = 1;

  function readFilters() {
    const values = new FormData(form);
    const number = (name) => Number(values.get(name) ?? DEFAULTS[name]);
    const facets = ["task", "status", "mark", "verdict", "quality", "prompt", "label"];
    const chosen = Object.fromEntries(facets.map((name) => [name, new Set(values.getAll(name))]));
    const numbers = (names) => new Set([...names].map((name) => index.numbers.get(name)));
    return {
      words: values.get("text").toLowerCase().split(WORDS_BY_SPACE).filter(Boolean),
      chosen,
      tasks: numbers(chosen.task),
      prompts: numbers(chosen.prompt),
      labels: numbers(chosen.label),
      from: number("score-from"),
      to: number("score-to"),
      sort: values.get("sort"),
    };
  }

  function addressOf(number) {
    const entries = [...new FormData(form)].filter(([name, value]) => value !== DEFAULTS[name]);
    if (number > 1) entries.push(["page", String(number)]);
    return `#${new URLSearchParams(entries)}`;
  }

  function readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const label of wanted.getAll("label")) if (!chipOf("label", label)) addChip(label);
    for (const field of form.elements) {
      if (field.type === "checkbox") field.checked = wanted.getAll(field.name).includes(field.value);
      else if (field.name) field.value = wanted.get(field.name) ?? DEFAULTS[field.name];
    }
    page = Math.max(1, Math.trunc(Number(wanted.get("page"))) || 1);
  }

  const chipOf = (name, value) => $$(`input[name="${name}"]`, form).find((input) => input.value === value);

  // A label that is too rare for a chip of its own gets one when an address or a bar asks for it.
  function addChip(label) {
    const chip = make("label", { class: `chip ${colourOf(label)}` },
      make("input", { type: "checkbox", name: "label", value: label }), make("span", {}, label));
    ($('fieldset:has(input[name="label"])') ?? $("#facets")).append(chip);
    return $("input", chip);
  }

  // ---- the pages -----------------------------------------------------------------------------

  let filters = null;
  let shown = { pictures: [], isShown: [], numRecords: 0, numObjects: 0 };
  let onPage = []; // records shown on this page, in their order
  const cards = new Map(); // picture to element, of this page

  const numPages = () => Math.max(1, Math.ceil(shown.pictures.length / data.perPage));

  function apply() {
    filters = readFilters();
    shown = select(filters, (id) => marks.get(id));
    showPage();
    describe();
  }

  function showPage() {
    page = Math.min(page, numPages());
    const pictures = shown.pictures.slice((page - 1) * data.perPage, page * data.perPage);
    onPage = pictures.flatMap(recordsOf).filter((r) => shown.isShown[r]);
    cards.clear();
    watcher.disconnect();
    for (const p of pictures) cards.set(p, emptyCard(p, index.images[p]));
    $("#cards").replaceChildren(...cards.values());
    for (const [p, element] of cards) data.files ? watcher.observe(element) : fillNow(p, element, loadCards(pieceOf(p)));
    for (const place of $$(".pages")) place.replaceChildren(...pageLinks());
  }

  const recordsOf = (p) => {
    const first = index.firstRecord[p];
    return Array.from({ length: index.firstRecord[p + 1] - first }, (_, i) => first + i);
  };
  const pieceOf = (p) => Math.floor(p / data.cardsSize);

  const watcher = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) if (isIntersecting) fill(Number(target.dataset.n));
  }, { rootMargin: "800px" });

  async function fill(p) {
    const element = cards.get(p);
    if (!element?.classList.contains("waiting")) return;
    watcher.unobserve(element);
    try {
      const piece = await loadCards(pieceOf(p));
      if (element.classList.contains("waiting")) fillNow(p, element, piece); // two may have waited for the piece
    } catch (error) {
      pieces.delete(pieceOf(p));
      tell(error.message);
    }
  }

  function fillNow(p, element, piece) {
    fillCard(element, piece[p % data.cardsSize], index.firstRecord[p], colourOf);
    for (const r of recordsOf(p)) {
      for (const part of $$(`[data-k="${r}"]`, element)) {
        part.toggleAttribute("hidden", !shown.isShown[r]);
        showObjects(r, part);
      }
      showMark(r, element);
    }
    if (cursor !== null) $(`#r${cursor}`, element)?.classList.add("cursor");
  }

  function showObjects(r, root) {
    if (!hasObjects(r)) return;
    for (const element of $$("[data-o]", root)) {
      if (element.dataset.o === "") continue; // what the ground truth has and the model missed
      element.classList.toggle("off", !isObjectShown(index.firstObject[r] + Number(element.dataset.o), filters));
    }
  }

  function describe() {
    const all = written(numPictures());
    const several = (count, what) => `${written(count)} ${what}${count === 1 ? "" : "s"}`;
    const count = shown.pictures.length;
    $("#shown").textContent = count === numPictures() ? `${all} shown` : `${written(count)} of ${all}`;
    const objects = shown.numObjects ? `, ${several(shown.numObjects, "object")}` : "";
    $("#counts").textContent = `${several(shown.numRecords, "record")}${objects}`;
    if ($("#range")) $("#range").value = `${filters.from.toFixed(2)} to ${filters.to.toFixed(2)}`;
    tell(count === 0 ? "Nothing matches these filters." : "");
  }

  function pageLinks() {
    const last = numPages();
    if (last === 1) return [];
    const near = [1, page - 2, page - 1, page, page + 1, page + 2, last].filter((n) => n >= 1 && n <= last);
    const links = [...new Set(near)].sort((a, b) => a - b).map(pageLink);
    const step = (n, text, rel) => n >= 1 && n <= last ? make("a", { href: addressOf(n), rel }, text) : make("span", {}, text);
    return [step(page - 1, "‹ Previous", "prev"), ...links, step(page + 1, "Next ›", "next")];
  }

  function pageLink(number) {
    const first = (number - 1) * data.perPage + 1;
    const range = `${written(first)}–${written(Math.min(first + data.perPage - 1, shown.pictures.length))}`;
    return number === page ? make("b", { "aria-current": "page" }, range) :
      make("a", { href: addressOf(number), class: Math.abs(number - page) === 2 ? "far" : null }, range);
  }

  function goToPage(number) {
    if (number < 1 || number > numPages()) return false;
    page = number;
    history.pushState(null, "", addressOf(page));
    showPage();
    showTop();
    return true;
  }
  const showTop = () => $(".above").scrollIntoView({ block: "start" });

  let waiting = 0;
  function change(event) {
    const isTyping = event?.target.matches?.("input:not([type=checkbox])"); // or pulling: more comes at once
    clearTimeout(waiting);
    $("#cards").ariaBusy = "true";
    waiting = setTimeout(() => {
      page = 1;
      history.replaceState(null, "", addressOf(page));
      apply();
      $("#cards").ariaBusy = "false";
    }, isTyping ? 60 : 0);
  }
  addEventListener("hashchange", () => { // a link to a page, Back, or an address that was typed
    const before = addressOf(1);
    readAddress();
    cursor = null;
    if (addressOf(1) === before) showPage();
    else apply();
    showTop();
  });
  form.addEventListener("input", change);
  form.addEventListener("change", change);
  form.addEventListener("reset", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  const fold = (isFolded) => {
    form.classList.toggle("folded", isFolded);
    $("#more").setAttribute("aria-expanded", String(!isFolded));
  };
  $("#more").addEventListener("click", () => fold(!form.classList.contains("folded")));

  // A bar, a column or a number of the overview picks what it counts.
  function pick(kind, values) {
    if (kind === "score") [form.elements["score-from"].value, form.elements["score-to"].value] = values;
    else if (kind === "label" || kind === "status") {
      const chip = chipOf(kind, values.join(":")) ?? (kind === "label" ? addChip(values.join(":")) : null);
      if (chip) chip.checked = !chip.checked;
    } else form.elements.text.value = values.join(":");
    change();
    showTop();
  }
  for (const bar of $$("[data-pick]")) {
    const [kind, ...values] = bar.dataset.pick.split(":");
    bar.addEventListener("click", () => pick(kind, values));
  }

  // ---- the cursor ----------------------------------------------------------------------------

  let cursor = null; // a record

  async function moveTo(r) {
    if (r === undefined) return;
    for (const element of $$(".cards .cursor")) element.classList.remove("cursor");
    cursor = r;
    const p = pictureAt(r);
    cards.get(p).scrollIntoView({ block: "nearest" });
    await fill(p);
    if (cursor !== r) return; // somebody went on while the card was read
    $(`#r${r}`)?.classList.add("cursor");
    $(`#r${r}`)?.focus({ preventScroll: true });
    if (viewer.open) look(r);
    const next = onPage[onPage.indexOf(r) + 1];
    if (next !== undefined) fill(pictureAt(next)); // so that going on need not wait
  }

  // The picture of a record: the last one that begins at it or before.
  function pictureAt(r) {
    let [low, high] = [0, numPictures() - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (index.firstRecord[middle] <= r) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  function step(by) {
    const at = onPage.indexOf(cursor);
    if (at < 0) return moveTo(onPage[0]);
    if (at + by >= 0 && at + by < onPage.length) return moveTo(onPage[at + by]);
    if (goToPage(page + by)) return moveTo(by > 0 ? onPage[0] : onPage.at(-1));
    return moveTo(cursor);
  }

  function markAndGoOn(mark) {
    if (cursor === null) return step(1);
    setMark(cursor, mark);
    return mark ? step(1) : undefined;
  }

  // ---- the viewer ----------------------------------------------------------------------------

  const viewer = $("#viewer");

  function look(r) {
    const card = cards.get(pictureAt(r));
    const picture = $(".picture", card)?.cloneNode(true);
    $(".stage").replaceChildren(...(picture ? [picture] : []));
    const parts = [...card.children].filter((part) => !part.classList.contains("picture")).map((part) => part.cloneNode(true));
    for (const part of parts) {
      part.removeAttribute("id");
      part.classList.toggle("cursor", part.dataset.k === String(r));
      for (const details of $$("details", part)) details.open = true;
    }
    $(".panel").replaceChildren(...parts);
    if (hasObjects(r)) { // of several records on a picture, the one looked at stands out
      for (const drawing of $$(".stage .overlay > g")) drawing.classList.toggle("dim", drawing.dataset.k !== String(r));
    }
    $("#place").value = `${written((page - 1) * data.perPage + [...cards.keys()].indexOf(pictureAt(r)) + 1)} of ${written(shown.pictures.length)}`;
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
  $("#before").addEventListener("click", () => step(-1));
  $("#after").addEventListener("click", () => step(1));
  $(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => $(`#r${cursor}`)?.focus({ preventScroll: true }));
  $("#help").addEventListener("click", () => $("#keys").showModal());

  // ---- pointing ------------------------------------------------------------------------------

  document.addEventListener("click", async (event) => {
    const entry = event.target.closest(".entry");
    const r = entry && Number(entry.dataset.k);
    const button = event.target.closest(".mark");
    if (button && entry) {
      const mark = button.classList.contains("right") ? "right" : "wrong";
      setMark(r, marks.get(index.ids[r]) === mark ? null : mark);
    }
    if (entry && !viewer.open) moveTo(r);
    if (event.target.closest(".stage") || event.target === viewer) viewer.close();
    else if (event.target.closest(".card .picture")) {
      const p = Number(event.target.closest(".card").dataset.n);
      await moveTo(recordsOf(p).find((one) => shown.isShown[one]));
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

  async function openCursor() {
    if (cursor === null) await step(1);
    else await moveTo(cursor);
    if (cursor !== null && !viewer.open) look(cursor);
  }

  function turn(by) {
    if (!goToPage(page + by)) return;
    cursor = null;
    if (viewer.open) step(1);
  }

  const KEYS = {
    j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
    n: () => turn(1), p: () => turn(-1),
    r: () => markAndGoOn("right"), w: () => markAndGoOn("wrong"), u: () => markAndGoOn(null),
    Enter: openCursor,
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

  // ---- the start -----------------------------------------------------------------------------

  async function start() {
    fold(matchMedia("(max-width: 720px)").matches);
    tell(data.files ? "Reading the index…" : "");
    try {
      for (const piece of await loadIndex()) addPiece(piece);
    } catch (error) {
      tell(error.message);
      return;
    }
    readMarks();
    readAddress();
    showAllMarks();
    apply();
    $("#cards").ariaBusy = "false";
    globalThis.requestIdleCallback?.(nameRanks); // before somebody asks for that order: 0.1 s for 100,000 names
  }
  start();
})();
