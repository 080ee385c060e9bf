// Showing text that comes from a model or a file, and may be hostile: as text, and all of it visible.

/** A new element; strings among the children are text. */
function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Characters that show nothing, or make others show elsewhere; joiners only where no script needs them.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180e\\u200b\\u200e\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff0-\\ufffb\\u{e0000}-\\u{e0fff}\\p{Cs}]|(?<=^|[\\0-\\u052f])[\\u200c\\u200d]",
  "gu",
);
const NAMES = {
  "\0": "NUL", "\r": "CR", "\u001b": "ESC", "\u00ad": "SHY", "\u061c": "ALM", "\u200b": "ZWSP", "\u200c": "ZWNJ", "\u200d": "ZWJ",
  "\u200e": "LRM", "\u200f": "RLM", "\u2028": "LS", "\u2029": "PS", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
  "\u202e": "RLO", "\u2060": "WJ", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM",
};

/**
 * Append text to an element as text. Characters that hide are each put in a box of their own that shows their name:
 * being a box of its own, it also keeps an override or an isolate in it from reordering anything outside. The element's
 * textContent stays the text.
 */
function appendText(parent, text) {
  let shown = 0;
  for (const match of text.matchAll(HIDDEN)) {
    parent.append(text.slice(shown, match.index));
    const box = element("span", "hidden-character", match[0]);
    box.dataset.name = NAMES[match[0]] ?? "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parent.append(box);
    shown = match.index + match[0].length;
  }
  parent.append(text.slice(shown));
  return parent;
}

/** An element with the text of a model or a file in it, which may run in any direction. */
function textBlock(text, className = "text", tag = "div") {
  const block = appendText(element(tag, className), text);
  block.dir = "auto";
  return block;
}

/** A Range for every place where an element's text, all its text nodes joined, matches a RegExp. */
function* rangesOf(query, block) {
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  let [node, start] = [walker.nextNode(), 0];
  for (const match of block.textContent.matchAll(new RegExp(query, "giu"))) {
    const range = new Range();
    for (const [set, offset] of [["setStart", match.index], ["setEnd", match.index + match[0].length]]) {
      while (offset > start + node.length) {
        start += node.length;
        node = walker.nextNode();
      }
      range[set](node, offset - start);
    }
    yield range;
  }
}
