// The page: reads the rows that lie in it, finds, sorts, and shows a few of them at a time.

const PAGE_ROWS = 20;
const SEARCH_DELAY = 150; // ms after the last key
const MOST_MARKS = 5000; // places of a search marked on one page

const rows = [];
const about = readData();
const histograms = [];
let found = []; // indices of the rows to show, in their order
let page = 0;
let query = null; // RegExp of the search, or null

const byId = (id) => document.getElementById(id);

/** What the page was made from; fills `rows`. The text of the rows is let go, they are kept once. */
function readData() {
  const parts = [...document.querySelectorAll('script[type="application/json"]')];
  const last = parts.pop();
  for (const part of parts) {
    for (const row of JSON.parse(part.textContent)) rows.push(row);
    part.remove();
  }
  return JSON.parse(last.textContent);
}

/** A row of the file that is none has a reason and its raw text instead. */
function isPair(row) {
  return row.refined !== undefined;
}

// ------------------------------------------------------------------------------------------------------------ finding

function textsOf(row) {
  const texts = [row.id, row.rejected, row.refined, row.diagnosis, row.teacher_response, row.original_chosen, row.reason, row.raw];
  return [...texts, ...(row.prompt ?? []).map((message) => message.content)].filter((text) => text != null);
}

function matches(row) {
  return textsOf(row).some((text) => query.test(text));
}

/** Find and sort anew, and show the first page. */
function update() {
  const text = byId("search").value;
  query = text ? new RegExp(text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu") : null;
  const [field, direction] = byId("sort").value.split("-");
  found = [...rows.keys()].filter((i) => histograms.every((h) => h.passes(i)) && (!query || matches(rows[i])));
  if (direction) sortBy(field === "margin" ? "margin" : "edit_similarity", direction === "up" ? 1 : -1);
  for (const histogram of histograms) histogram.draw(found);
  byId("clear").hidden = !query && !histograms.some((h) => h.pressed.size);
  show(0);
}

/** Rows without the number come last either way; equal ones stay as in the file. */
function sortBy(field, sign) {
  found.sort((a, b) => {
    const [x, y] = [rows[a][field] ?? null, rows[b][field] ?? null];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    return sign * (x - y) || a - b;
  });
}

// ------------------------------------------------------------------------------------------------------------ showing

/** Show a page, counted from 0, from its top. */
function show(number) {
  const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  page = Math.min(Math.max(number, 0), pages - 1);
  const start = page * PAGE_ROWS;
  const shown = found.slice(start, start + PAGE_ROWS);
  byId("list").replaceChildren(...shown.map((index) => (isPair(rows[index]) ? card : badCard)(rows[index])));
  byId("status").textContent = found.length
    ? `${whole(start + 1)}–${whole(start + shown.length)} of ${counted(found.length, "row")}` + (found.length < rows.length ? " found" : "")
    : rows.length ? "Nothing found" : "No rows";
  for (const pager of document.querySelectorAll(".pager")) {
    const [previous, field, of, next] = pager.children;
    previous.ariaDisabled = String(page === 0);
    next.ariaDisabled = String(page === pages - 1);
    field.querySelector("input").value = page + 1;
    field.querySelector("input").max = pages;
    of.textContent = `of ${whole(pages)}`;
  }
  markFound();
  for (const node of document.querySelectorAll(".card")) addOpener(node);
  if (byId("list").getBoundingClientRect().top < 0) byId("list").scrollIntoView();
}

function turnTo(number, pager) {
  show(number);
  if (pager.closest("footer")) byId("list").focus({ preventScroll: true }); // the button is far below now
}

function buildPager(pager) {
  const button = (text, step) => {
    const made = element("button", "", text);
    made.type = "button";
    made.addEventListener("click", () => turnTo(page + step, pager));
    return made;
  };
  const input = element("input");
  Object.assign(input, { type: "number", min: 1, value: 1 });
  input.addEventListener("change", () => turnTo((Math.round(input.valueAsNumber) || 1) - 1, pager));
  const field = element("label", "", "Page ", input);
  pager.append(button("Previous", -1), field, element("span"), button("Next", 1));
}

function card(row) {
  const turns = row.prompt.flatMap((message) => [
    row.prompt.length > 1 || message.role !== "user" ? textBlock(message.role, "role", "span") : null,
    textBlock(message.content),
  ]);
  const [rejected, refined] = diff(row.rejected, row.refined);
  return element(
    "article",
    "card",
    cardHead(row),
    element("div", "columns", section("Prompt", element("div", "short fold", ...turns)), section("Diagnosis", said(row.diagnosis))),
    element("div", "columns", pane("Rejected", rejected, "del", row.words[0]), pane("Refined", refined, "ins", row.words[1])),
    element("div", "columns", aside("Teacher’s own answer", row.teacher_response), aside("Original chosen", row.original_chosen)),
    row.reason == null ? null : section("Left out because", textBlock(row.reason, "text fold")),
  );
}

function said(text) {
  return text == null ? element("div", "muted", "none in this row") : element("div", "short fold", textBlock(text));
}

function section(name, ...contents) {
  return element("section", "", element("h3", "", name), ...contents);
}

function aside(name, text) {
  if (text == null) return element("div");
  return element("details", "", element("summary", "", name), textBlock(text));
}

function cardHead(row) {
  const head = element("header", "", element("h2", "", element("span", "muted", `${whole(row.n)} `), textBlock(row.id, "id", "bdi")));
  const facts = element("dl");
  const fact = (name, ...values) => facts.append(element("div", "", element("dt", "", name), element("dd", "", ...values)));
  const scores = [row.rejected_score, row.refined_score, row.original_score];
  const picture = scorePicture(...scores);
  if (picture) facts.append(picture);
  const names = ["rejected", "refined", "original chosen"];
  scores.forEach((score, k) => score != null && fact(names[k], short(score)));
  if (row.margin != null) fact("margin", (row.margin > 0 ? "+" : "") + short(row.margin));
  if (row.edit_similarity != null) fact("edit similarity", row.edit_similarity.toFixed(3));
  head.append(facts);
  return head;
}

/** The scores on the teacher's scale from 1 to 10: a ring for rejected, a disc for refined, a tick for the original. */
function scorePicture(rejected, refined, original) {
  const onScale = (score) => score == null || (score >= 1 && score <= 10);
  if (rejected == null || refined == null || ![rejected, refined, original].every(onScale)) return null;
  const x = (score) => 6 + (score - 1) * 12;
  const draw = (tag, className, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    node.setAttribute("class", className);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const picture = draw("svg", "scores", { viewBox: "0 0 120 16", width: 120, height: 16, "aria-hidden": "true" });
  const legend = draw("title", "", {});
  legend.append("ring: rejected; disc: refined; tick: original chosen");
  picture.append(legend, draw("line", "scale", { x1: x(1), x2: x(10), y1: 8, y2: 8 }));
  for (let score = 1; score <= 10; score++) picture.append(draw("line", "scale", { x1: x(score), x2: x(score), y1: 6, y2: 10 }));
  picture.append(draw("line", "step", { x1: x(rejected), x2: x(refined), y1: 8, y2: 8 }));
  if (original != null) picture.append(draw("line", "original", { x1: x(original), x2: x(original), y1: 2, y2: 14 }));
  picture.append(draw("circle", "rejected", { cx: x(rejected), cy: 8, r: 3.5 }), draw("circle", "refined", { cx: x(refined), cy: 8, r: 4 }));
  return picture;
}

function pane(name, pieces, tag, words) {
  const text = element("div", "text fold");
  text.dir = "auto";
  for (const [piece, changed] of pieces) {
    if (!changed) appendText(text, piece);
    else text.append(appendText(element(tag, !piece.trim() && piece.includes("\n") ? "break" : ""), piece));
  }
  const changes = pieces.some((piece) => piece[1]) ? "" : ", nothing " + (tag === "del" ? "deleted" : "inserted");
  return element("section", `pane ${name.toLowerCase()}`, element("h3", "", name, element("span", "muted", ` ${counted(words, "word")}${changes}`)), text);
}

/** A row of the file that is no pair: why, and what stands there. */
function badCard(row) {
  const heading = element("h2", "", element("span", "muted", `${row.line ? "line " : ""}${whole(row.line ?? row.n)} `), textBlock(row.id, "id", "bdi"));
  const head = element("header", "", heading, element("strong", "", "Unusable row"));
  const raw = textBlock(row.raw, "text fold");
  return element("article", "card bad", head, section("Cannot be shown because", textBlock(row.reason)), section("The line", raw));
}

/** Fold what is long, with a button that opens it; what is folded away but found is opened at once. */
function addOpener(node) {
  const folds = [...node.querySelectorAll(".fold")].filter((fold) => fold.scrollHeight > fold.clientHeight + 1);
  if (!folds.length) return;
  const button = element("button", "opener", "Show all");
  button.type = "button";
  const open = (wanted) => {
    node.classList.toggle("open", wanted);
    button.textContent = wanted ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(wanted));
  };
  for (const fold of folds) fold.classList.add("folded");
  button.addEventListener("click", () => {
    open(!node.classList.contains("open"));
    if (button.getBoundingClientRect().top < 0) node.scrollIntoView();
  });
  node.append(button);
  open(folds.some((fold) => fold.classList.contains("has-found")));
}

/** Mark what was searched for, without touching the text's elements, and open the details that have it. */
function markFound() {
  const marks = [];
  for (const block of query ? byId("list").querySelectorAll(".text, .id") : []) {
    const before = marks.length;
    for (const range of rangesOf(query, block)) if (marks.length < MOST_MARKS) marks.push(range);
    if (marks.length === before) continue;
    block.closest("details")?.setAttribute("open", "");
    block.closest(".fold")?.classList.add("has-found");
  }
  if (window.CSS?.highlights) CSS.highlights.set("found", new Highlight(...marks));
}

// ----------------------------------------------------------------------------------------------------------- overview

function buildOverview() {
  const pairs = rows.filter(isPair).length;
  const column = (pick) => rows.map((row) => (isPair(row) ? pick(row) ?? null : null));
  const lengths = [0, 1].map((side) => column((row) => row.words[side]));
  const known = (values) => values.filter((value) => value !== null);
  const wordEdges = known(lengths[0]).length ? lengthEdges(known(lengths.flat())) : [];
  for (const [title, values, edges] of [
    ["Margin", column((row) => row.margin), edgesFor],
    ["Edit similarity", column((row) => row.edit_similarity), () => range(0, 20, 0.05)],
    ["Words in rejected", lengths[0], () => wordEdges],
    ["Words in refined", lengths[1], () => wordEdges],
  ]) {
    if (!known(values).length) continue;
    const histogram = new Histogram(title, values, edges(known(values)), pairs, update);
    histograms.push(histogram);
    byId("overview").append(histogram.node);
  }
  const box = element("div", "left-out", ...about.left_out.map(leftOut));
  byId("overview").append(box);
  if (box.scrollHeight > box.clientHeight) box.tabIndex = 0; // to be scrolled by the keyboard
}

/** The rows of one kind that are not among the pairs, counted by reason. */
function leftOut(group) {
  const count = element("span", "muted", group.note ?? counted(group.count, "row"));
  const table = element("table", "", element("caption", "", element("b", "", group.name), " ", count));
  for (const [reason, count] of group.reasons) {
    const cell = textBlock(reason, "", "th");
    cell.scope = "row";
    table.append(element("tr", "", cell, element("td", "", whole(count))));
  }
  return table;
}

function start() {
  const pairs = rows.filter(isPair).length;
  document.title = `Refined pairs: ${about.file}`;
  byId("title").replaceChildren("Refined pairs: ", textBlock(about.file, "id", "bdi"));
  const others = about.left_out.map((group) => `${whole(group.count)} ${group.name.toLowerCase()}`);
  byId("summary").textContent = [counted(pairs, "pair"), ...others].join(", ");
  buildOverview();
  for (const pager of document.querySelectorAll(".pager")) buildPager(pager);
  let timer;
  const searchIn = (delay) => {
    clearTimeout(timer);
    timer = setTimeout(update, delay);
  };
  byId("search").addEventListener("input", () => searchIn(SEARCH_DELAY));
  byId("search").addEventListener("keydown", (event) => event.key === "Enter" && searchIn(0));
  byId("sort").addEventListener("change", update);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => {
    byId("search").value = "";
    for (const histogram of histograms) histogram.clear();
    update();
    byId("search").focus();
  });
  update();
}

start();
