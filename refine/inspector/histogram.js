// Histograms of the rows, whose bars can be pressed to see the rows of a bar alone.

const MOST_BINS = 24;

/** Rounded edges [e0, e1, ...] for values; bin k holds e_k <= value < e_k+1. */
function edgesFor(values) {
  const low = least(values);
  const high = -least(values.map((value) => -value));
  const spread = high / MOST_BINS - low / MOST_BINS; // high - low may be infinite
  const step = roundStep(Math.max(spread || Math.abs(high) / MOST_BINS || 1, 1e-9), [1, 5, 10]); // whole and half grades
  return range(Math.floor(low / step), Math.floor(high / step) + 1, step);
}

/** Edges for lengths: from 0 to where 99 % of them lie; the last bin takes the few longer ones. */
function lengthEdges(values) {
  const sorted = Float64Array.from(values).sort();
  const most = sorted[Math.floor(0.99 * (sorted.length - 1))];
  const step = Math.max(1, roundStep(most / MOST_BINS));
  const edges = range(0, Math.floor(most / step) + 1, step);
  return sorted.at(-1) < edges.at(-1) ? edges : [...edges, Infinity];
}

function least(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

/** The least of 1, 2, 5, 10, 20, ... and 0.5, 0.2, ... that is not under x. */
function roundStep(x, factors = [1, 2, 5, 10]) {
  const power = Math.floor(Math.log10(x));
  const factor = factors.find((f) => f * 10 ** power >= x * (1 - 1e-9)) ?? 10;
  return power < 0 ? factor / 10 ** -power : factor * 10 ** power;
}

function range(first, last, step) {
  const inverse = Math.round(1 / step); // 3 / 20 is 0.15 and 3 * 0.05 is not
  return Array.from({ length: last - first + 1 }, (_, k) => (step < 1 ? (first + k) / inverse : (first + k) * step));
}

/** The bin of a value; the last edge belongs to the last bin, as in numpy. */
function binOf(edges, value) {
  let [low, high] = [0, edges.length - 2];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (value >= edges[middle]) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The value below and above which as many lie. */
function median(values) {
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : sorted[middle - 1] / 2 + sorted[middle] / 2;
}

/**
 * One histogram over `values`, a number or null for every row.
 *
 * `pairs` is the number of rows that should have one. this.passes(row) says whether a row's bar is pressed (or none is), this.draw(found) takes the indices of the rows to
 * show solid before all the others, `changed` is called when a bar was pressed.
 */
class Histogram {
  constructor(title, values, edges, pairs, changed) {
    this.edges = edges;
    this.bins = values.map((value) => (value === null ? -1 : binOf(edges, value)));
    this.pressed = new Set();
    this.counts = this.count(this.bins.keys());
    this.tallest = Math.max(...this.counts);
    const known = values.filter((value) => value !== null);
    this.bars = this.counts.map((count, bin) => this.bar(bin, count, changed));
    const bars = element("div", "bars", ...this.bars);
    bars.setAttribute("role", "toolbar");
    bars.setAttribute("aria-label", `${title}: show only the pairs of a bar`);
    bars.addEventListener("keydown", (event) => this.move(event));
    this.rest();
    const note = `median ${short(median(known))}` + (known.length < pairs ? ` of ${counted(known.length, "pair")}` : "");
    this.node = element(
      "figure",
      "histogram",
      element("figcaption", "", element("b", "", title), element("span", "muted", note), element("span", "tallest", whole(this.tallest))),
      bars,
      element("div", "axis muted", ...[0, this.counts.length >> 1, this.counts.length].map((edge) => this.tick(edge))),
    );
  }

  tick(edge) {
    const last = edge === this.counts.length;
    const open = this.edges[edge] === Infinity; // the last bin begins at the edge before
    const label = element("span", "", open ? `${short(this.edges[edge - 1])}+` : short(this.edges[edge]));
    label.style.left = `${(100 * edge) / this.counts.length}%`;
    label.style.transform = `translateX(${edge ? (last ? -100 : -50) : 0}%)`;
    return label;
  }

  bar(bin, count, changed) {
    const button = element("button", "bar", element("i", "all"), element("i", "found"));
    button.type = "button";
    button.disabled = !count;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      if (!this.pressed.delete(bin)) this.pressed.add(bin);
      this.rest(bin);
      changed();
    });
    this.height(button.firstChild, count);
    return button;
  }

  height(node, count) {
    node.style.height = count ? `max(2px, ${(100 * count) / this.tallest}%)` : "0";
  }

  name(bin) {
    const [from, to] = [this.edges[bin], this.edges[bin + 1]];
    return to === Infinity ? `${short(from)} and over` : `${short(from)} to ${short(to)}`;
  }

  count(rows) {
    const counts = new Array(this.edges.length - 1).fill(0);
    for (const row of rows) if (this.bins[row] >= 0) counts[this.bins[row]]++;
    return counts;
  }

  passes(row) {
    return !this.pressed.size || this.pressed.has(this.bins[row]);
  }

  draw(found) {
    this.count(found).forEach((count, bin) => {
      const button = this.bars[bin];
      this.height(button.lastChild, count);
      button.title = `${this.name(bin)}: ${whole(count)} of ${whole(this.counts[bin])} pairs`;
      button.setAttribute("aria-label", button.title);
      button.setAttribute("aria-pressed", String(this.pressed.has(bin)));
    });
  }

  clear() {
    this.pressed.clear();
  }

  /** One bar takes part in the tab order: `bin`, or the first that has rows. */
  rest(bin = this.bars.findIndex((bar) => !bar.disabled)) {
    this.bars.forEach((bar, index) => (bar.tabIndex = index === bin ? 0 : -1));
  }

  /** Arrow keys, Home and End go from bar to bar. */
  move(event) {
    const usable = this.bars.filter((bar) => !bar.disabled);
    const at = usable.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: usable.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const bar = usable[Math.min(Math.max(to, 0), usable.length - 1)];
    this.rest(this.bars.indexOf(bar));
    bar.focus();
  }
}

/** A number to read, with at most three decimals: 0.875; 6.5; 1,234. */
function short(number) {
  const text = Math.abs(number) < 1e9 ? number.toLocaleString("en", { maximumFractionDigits: 3 }) : number.toPrecision(4);
  return text.replace("-", "\u2212");
}

function whole(number) {
  return number.toLocaleString("en");
}

function counted(number, noun) {
  return `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
}
