// A word-level diff of two texts.

// Scripts that write no space between words: each character is one word, as in `edit_similarity`.
const UNSPACED =
  "\\u0e00-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u3001-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff\\uff01-\\uffef\\u{20000}-\\u{3ffff}";
const LETTER = `(?![${UNSPACED}])[\\p{L}\\p{M}\\p{N}_\\u200c\\u200d]`;
const TOKEN = new RegExp(`\\s+|(?:${LETTER})+(?:['’.\\-](?:${LETTER})+|,\\p{N}+)*|.`, "gsu");
const TABLE_CELLS = 1e6; // most cells of one table of common subsequences: two stretches of 1,000 words
const ALL_CELLS = 4e6; // and of all tables for a pair: what exceeds it counts as changed

/** White space, words, and single other characters (punctuation, ideographs); joined again they are the text. */
function tokens(text) {
  return text.match(TOKEN) ?? [];
}

/**
 * Both texts cut into pieces that are kept or changed.
 *
 * Returns [rejected, refined], each a list of [text, changed]; joined they are the two texts, and their unchanged parts
 * are the same. White space is not aligned for itself: what stands at both ends of a gap between kept words is kept.
 */
function diff(before, after) {
  const numbers = new Map(); // numbers compare faster than words
  const [left, right] = [before, after].map((text) => locate(text, numbers));
  const pieces = [[], []];
  let at = [0, 0];
  const gap = (ends) => {
    const parts = [before.slice(at[0], ends[0]), after.slice(at[1], ends[1])];
    const head = commonSpace(parts[0], parts[1], false);
    const rests = parts.map((part) => part.slice(head.length));
    const tail = commonSpace(rests[0], rests[1], true);
    for (const side of [0, 1]) {
      push(pieces[side], head, false);
      push(pieces[side], rests[side].slice(0, rests[side].length - tail.length), true);
      push(pieces[side], tail, false);
    }
    at = ends;
  };
  for (const [i, j] of align(left.words, right.words)) {
    gap([left.starts[i], right.starts[j]]);
    const word = before.slice(left.starts[i], left.ends[i]);
    for (const side of pieces) push(side, word, false);
    at = [left.ends[i], right.ends[j]];
  }
  gap([before.length, after.length]);
  return pieces;
}

/** The words of a text, each as its number in `numbers`, and where they start and end. */
function locate(text, numbers) {
  const [words, starts, ends] = [[], [], []];
  let offset = 0;
  for (const token of tokens(text)) {
    if (token.trim()) {
      if (!numbers.has(token)) numbers.set(token, numbers.size);
      words.push(numbers.get(token));
      starts.push(offset);
      ends.push(offset + token.length);
    }
    offset += token.length;
  }
  return { words, starts, ends };
}

function push(pieces, text, changed) {
  if (!text) return;
  const last = pieces.at(-1);
  if (last && last[1] === changed) last[0] += text;
  else pieces.push([text, changed]);
}

/** The longest white space that both texts begin (or end) with. */
function commonSpace(a, b, atEnd) {
  const pick = (text, n) => (atEnd ? text[text.length - 1 - n] : text[n]);
  let n = 0;
  while (n < a.length && n < b.length && pick(a, n) === pick(b, n) && !pick(a, n).trim()) n++;
  return n === 0 ? "" : atEnd ? a.slice(-n) : a.slice(0, n);
}

/**
 * Pairs of indices of equal words, rising in both texts: a longest common subsequence. Where its table would be too
 * large, the words that occur once in either text are aligned first and the stretches between them one by one.
 */
function align(a, b, from = [0, 0], to = [a.length, b.length], found = [], budget = { cells: ALL_CELLS }) {
  let [i, j] = from;
  let [m, n] = to;
  while (i < m && j < n && a[i] === b[j]) found.push([i++, j++]);
  const tail = [];
  while (i < m && j < n && a[m - 1] === b[n - 1]) tail.push([--m, --n]);
  const cells = (m - i + 1) * (n - j + 1);
  if (i < m && j < n && cells <= Math.min(TABLE_CELLS, budget.cells)) {
    budget.cells -= cells;
    longestCommon(a, b, [i, j], [m, n], found);
  } else if (i < m && j < n) {
    const anchors = commonAnchors(a, b, [i, j], [m, n]);
    for (const anchor of anchors) {
      align(a, b, [i, j], anchor, found, budget);
      found.push(anchor);
      [i, j] = [anchor[0] + 1, anchor[1] + 1];
    }
    if (anchors.length) align(a, b, [i, j], [m, n], found, budget);
  }
  for (const pair of tail.reverse()) found.push(pair);
  return found;
}

function longestCommon(a, b, [i, j], [m, n], found) {
  const width = n - j + 1;
  const table = new Uint16Array((m - i + 1) * width); // [x, y]: common words from x and y on
  for (let x = m - 1; x >= i; x--) {
    const row = (x - i) * width;
    for (let y = n - 1; y >= j; y--) {
      const cell = row + y - j;
      table[cell] =
        a[x] === b[y] ? table[cell + width + 1] + 1 : Math.max(table[cell + width], table[cell + 1]);
    }
  }
  for (let [x, y] = [i, j]; x < m && y < n; ) {
    const cell = (x - i) * width + y - j;
    if (a[x] === b[y]) found.push([x++, y++]);
    else if (table[cell + width] >= table[cell + 1]) x++;
    else y++;
  }
}

/** Places of the words that occur once in both stretches, the longest chain of them that rises in both (patience). */
function commonAnchors(a, b, [i, j], [m, n]) {
  const once = (words, start, end) => {
    const places = new Map();
    for (let x = start; x < end; x++) places.set(words[x], places.has(words[x]) ? -1 : x);
    return places;
  };
  const others = once(b, j, n);
  const piles = []; // the last link of the best chain of each length: {pair, before}
  for (const [word, x] of once(a, i, m)) {
    const y = others.get(word) ?? -1;
    if (x < 0 || y < 0) continue;
    let [low, high] = [0, piles.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (piles[middle].pair[1] < y) low = middle + 1;
      else high = middle;
    }
    piles[low] = { pair: [x, y], before: piles[low - 1] };
  }
  const chain = [];
  for (let link = piles.at(-1); link; link = link.before) chain.push(link.pair);
  return chain.reverse();
}
