"""The page of `inspect_pairs.py` in real headless Chromium: hostile text, the marked differences, access for all."""

import random
import re
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from inspect_fixtures import HOSTILE, count_found, read, requests_of, scored_row, search, status, texts
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from distiller.records import dump_line
from refine.inspect_pairs import main

pytestmark = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------------- hostility


def test_hostile_rows_are_shown_as_the_text_they_are(open_page):
    reasons = [{"id": str(n), "reason": text} for n, text in enumerate(HOSTILE)]
    rows = [scored_row(text, number) for number, text in enumerate(HOSTILE)]
    browser = open_page(*rows, b"<script>alert(5)</script>\n", filtered=reasons, failed=reasons)
    assert count_found(browser) == len(HOSTILE) + 1
    for selector, expected in {
        ".card:not(.bad) .id": [row["id"] for row in rows],
        ".pane.rejected .text": [row["rejected"] for row in rows],
        ".pane.refined .text": [row["chosen"] for row in rows],
        "details .text": [row[name] for row in rows for name in ("teacher_response", "original_chosen")],
        ".columns > section > .short > .text": [
            text for row in rows for text in (*(turn["content"] for turn in row["prompt"]), row["diagnosis"])
        ],
        ".bad .text.fold": ["<script>alert(5)</script>"],
    }.items():
        assert texts(browser, selector) == expected, selector
    listed = texts(browser, ".left-out th")
    assert HOSTILE[0].replace("1", "N").replace("2", "N") in listed

    tags = Counter(read(browser, "return [...document.querySelectorAll('*')].map((node) => node.localName)"))
    assert tags["script"] == 2  # the page's own, and one of data
    assert not {"img", "iframe", "base", "a"} & tags.keys()
    inside = "'.text *, .id *, .left-out th *'"
    found = read(
        browser, f"return [...document.querySelectorAll({inside})].map((n) => n.localName + '.' + n.className)"
    )
    assert set(found) <= {"del.", "ins.", "del.break", "ins.break", "span.hidden-character"}


def test_overrides_and_isolates_reorder_nothing_and_are_named(open_page):
    browser = open_page(scored_row(HOSTILE[3]))
    boxes = browser.find_elements(By.CSS_SELECTOR, ".rejected .hidden-character")
    names = [box.get_attribute("data-name") for box in boxes]
    assert names == ["RLO", "PDF", "RLI", "PDI", "RLO", "LRI"]
    places = """
        const block = document.querySelector('.pane.rejected .text');
        const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
        const places = [];
        while (walker.nextNode()) {
          const node = walker.currentNode;
          if (node.parentNode.className === 'hidden-character') continue;
          for (let i = 0; i < node.length; i++) {
            if (!/\\w/.test(node.data[i])) continue;
            const range = new Range();
            range.setStart(node, i);
            range.setEnd(node, i + 1);
            const box = range.getBoundingClientRect();
            places.push([Math.round(box.top), box.left]);
          }
        }
        return places;
    """
    shown = read(browser, places)
    assert len(shown) > 20
    assert all(right > left for (line, left), (next_line, right) in pairwise(shown) if line == next_line)


class Counting(SimpleHTTPRequestHandler):
    """Serves a directory and remembers what was asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(directory: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=directory))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_page_that_is_served_asks_its_server_for_nothing_more_and_its_policy_forbids_it(browser, tmp_path):
    (tmp_path / "scored.jsonl").write_bytes(b"".join(dump_line(scored_row(text)) for text in HOSTILE))
    assert main(["--input", str(tmp_path / "scored.jsonl")]) == 0
    browser.get("about:blank")
    with serving(tmp_path) as server:
        browser.get_log("performance")
        browser.get(f"http://127.0.0.1:{server.server_port}/scored.html")
        search(browser, "script")
        assert count_found(browser)
        assert server.asked == ["/scored.html"]
        assert requests_of(browser) == [browser.current_url]
        # What hostile text would have to do, were it to become markup after all.
        outcome = browser.execute_async_script(
            """
            const done = arguments[0];
            const add = (tag, change) => {
              const node = document.createElement(tag);
              change(node);
              document.body.append(node);
            };
            const tries = {
              fetch: () => fetch('/stolen'),
              inline: () => add('script', (node) => node.append('window.ran = 1')),
              handler: () => add('img', (node) => {
                node.setAttribute('onerror', 'window.ran = 1');
                node.src = '/stolen.png';
              }),
              markup: () => { document.body.innerHTML = '<p>gone</p>'; },
              frame: () => add('iframe', (node) => { node.src = '/frame'; }),
              style: () => add('style', (node) => node.append('h1 { display: none }')),
            };
            (async () => {
              for (const name in tries) try { await tries[name](); } catch (fault) { continue; }
              await new Promise((resume) => setTimeout(resume, 500));
              done([window.ran === 1, document.querySelector('h1')?.checkVisibility()]);
            })();
            """
        )
        assert outcome == [False, True]
        assert server.asked == ["/scored.html"]
    browser.get_log("browser")  # the refusals


# --------------------------------------------------------------------------------------------------------- differences


def common_words(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook's recurrence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return row[-1]


def test_kept_and_marked_words_are_the_two_texts_and_no_more_is_marked_than_must_be(open_page):
    draw = random.Random(1)
    spaces = [" ", " ", " ", " ", "\n", "\n\n", "  ", "\t"]

    def text() -> str:
        words = draw.choices(["a", "b", "c", "it's", "x1", "naïve", "9.5"], k=draw.randint(0, 25))
        return draw.choice(["", " "]) + "".join(word + draw.choice(spaces) for word in words)

    rows = [scored_row("", n, rejected=text(), chosen=text()) for n in range(200)]
    browser = open_page(*rows)
    pieces = """
        return [...document.querySelectorAll('.card')].map((card) => ['rejected', 'refined'].map((side) =>
          [...card.querySelector(`.${side} .text`).childNodes].map((n) => [n.textContent, n.localName ?? ''])));
    """
    cards = []
    while len(cards) < len(rows):
        cards += read(browser, pieces)
        browser.find_elements(By.CSS_SELECTOR, "footer .pager button")[1].click()
    for row, (rejected, refined) in zip(rows, cards, strict=True):
        assert "".join(text for text, _ in rejected) == row["rejected"]
        assert "".join(text for text, _ in refined) == row["chosen"]
        assert {tag for _, tag in rejected} <= {"", "del"}
        assert {tag for _, tag in refined} <= {"", "ins"}
        kept = [text for text, tag in rejected if not tag and text]
        assert "".join(kept) == "".join(text for text, tag in refined if not tag)
        kept_words = [word for text in kept for word in text.split()]
        assert len(kept_words) == common_words(row["rejected"].split(), row["chosen"].split())


def test_a_few_edits_far_apart_in_a_long_response_are_all_that_is_marked(open_page):
    draw = random.Random(2)
    rejected = [f"w{draw.randint(0, 3000)}" for _ in range(6000)]
    refined = rejected[:]
    for place in (3, 2500, 5990):
        refined[place] = f"new{place}"
    browser = open_page(scored_row("", rejected=" ".join(rejected), chosen=" ".join(refined)))
    assert texts(browser, ".pane del") == [rejected[place] for place in (3, 2500, 5990)]
    assert texts(browser, ".pane ins") == ["new3", "new2500", "new5990"]


def test_long_responses_with_nothing_in_common_are_shown_whole(open_page):
    draw = random.Random(3)
    long = [" ".join(draw.choices([f"{side}{n}" for n in range(90)], k=9000)) for side in "ab"]
    mixed = [" ".join(draw.choices([f"w{n}" for n in range(4000)], k=8000)) for _ in range(2)]
    browser = open_page(*(scored_row("", n, rejected=a, chosen=b) for n, (a, b) in enumerate((long, mixed))))
    assert texts(browser, ".pane .text") == [*long, *mixed]
    assert texts(browser, ".card:first-child del") == [long[0]]
    kept = "[...document.querySelectorAll('.card:last-child .{} .text')[0].childNodes].filter((n) => n.nodeType === 3)"
    left, right = (
        read(browser, f"return {kept.format(side)}.map((n) => n.data).join('')") for side in ("rejected", "refined")
    )
    assert left == right


def test_marks_are_seen_without_colour_and_white_space_too(open_page):
    browser = open_page(scored_row("", rejected="one two\nthree", chosen="one four\n\nthree"))
    style = "const s = getComputedStyle(document.querySelector('{}')); return s.textDecorationLine"
    assert read(browser, style.format("del")) == "line-through"
    assert read(browser, style.format("ins")) == "underline"
    browser = open_page(scored_row("", rejected="one two", chosen="one\ntwo"))
    assert texts(browser, "ins") == ["\n"]
    shown = "return getComputedStyle(document.querySelector('ins'), '::before').content"
    assert read(browser, shown) == '"↵"'


# ------------------------------------------------------------------------------------------------------------- for all


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(open_page):
    browser = open_page(*(scored_row("plain", n, margin=n / 4) for n in range(45)))
    controls = browser.find_elements(By.CSS_SELECTOR, "button, input, select, summary")
    assert all(control.accessible_name.strip() for control in controls if control.is_displayed())
    reached = []
    for _ in range(14):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("id") or active.accessible_name)
    assert [name for name in reached if name in ("search", "sort")] == ["search", "sort"]
    assert {"Previous", "Next", "Teacher’s own answer", "Original chosen"} <= set(reached)
    assert sum(re.match(r"\S+ to \S+: \d+ of", name) is not None for name in reached) == 4  # one a histogram
    summary = next(c for c in controls if c.tag_name == "summary")
    summary.send_keys(Keys.ENTER)
    assert browser.find_element(By.CSS_SELECTOR, "details .text").is_displayed()
    browser.find_elements(By.CSS_SELECTOR, "#tools .pager button")[1].send_keys(Keys.ENTER)
    assert status(browser).startswith("21–40 of 45")
    browser.find_elements(By.CSS_SELECTOR, "footer .pager button")[1].send_keys(Keys.ENTER)
    assert status(browser).startswith("41–45 of 45")
    assert browser.execute_script("return document.getElementById('list').getBoundingClientRect().top >= 0")


CONTRAST = """
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const light = (colour, under) => {
      canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
      for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (colour !== 'rgba(0, 0, 0, 0)') return colour;
      }
    };
    return [...document.querySelectorAll('body *')].filter((n) => n.textContent.trim() && n.checkVisibility() &&
        n.closest('[aria-disabled=true]') === null && n.closest('svg') === null).map((n) => {
      const [a, b] = [light(getComputedStyle(n).color, ground(n)), light(ground(n), 'white')].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), n.localName + '.' + n.className];
    });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_light_and_dark(open_page, browser, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser = open_page(scored_row("a\u200bb"), b"{broken\n", filtered=[{"id": "1", "reason": "why"}])
    ground = read(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    ratios = read(browser, CONTRAST)
    assert len(ratios) > 40
    assert [(ratio, name) for ratio, name in ratios if ratio < 4.5] == []  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [360, 800, 1366])
def test_nothing_runs_out_of_a_screen_however_narrow(open_page, browser, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser = open_page(
        *(scored_row(text, n) for n, text in enumerate(HOSTILE)), filtered=[{"id": "1", "reason": "x" * 500}]
    )
    assert read(browser, "return document.documentElement.scrollWidth") <= width
    wide = "(n) => n.scrollWidth > n.clientWidth + 1"
    cut_off = f"return [...document.querySelectorAll('.text, .fold, th')].filter({wide}).length"
    assert read(browser, cut_off) == 0
    columns = "return new Set([...document.querySelectorAll('.card .pane')].slice(0, 2).map((p) => p.offsetLeft)).size"
    assert read(browser, columns) == (1 if width < 700 else 2)


def test_long_texts_are_folded_and_a_button_opens_them(open_page):
    browser = open_page(scored_row("lorem ipsum " * 3000))
    block = browser.find_element(By.CSS_SELECTOR, ".pane.rejected .text")
    folded = block.size["height"]
    opener = browser.find_element(By.CSS_SELECTOR, ".opener")
    assert opener.get_attribute("aria-expanded") == "false"
    opener.send_keys(Keys.ENTER)
    assert opener.get_attribute("aria-expanded") == "true"
    assert block.size["height"] > 5 * folded
    opener.send_keys(Keys.ENTER)
    assert block.size["height"] == folded
