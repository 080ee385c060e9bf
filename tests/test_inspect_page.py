"""The page of `inspect_pairs.py` in real headless Chromium."""

import json
import random
import re
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from inspect_fixtures import HOSTILE, scored_row, start_browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from distiller.records import dump_line
from refine.inspect_pairs import main

pytestmark = pytest.mark.slow

WORDS = [f"word{number}" for number in range(40)] + ["naïve", "日本", "don't", "3.14", "(a,b)", "—", "Ünï"]
SORTS = {"margin": "margin", "similarity": "edit_similarity"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that makes the page of some rows and opens it; afterwards nothing may have been complained of."""

    def open_page(*rows: dict | bytes, filtered: list[dict] = (), failed: list[dict] = ()):
        for name, lines in (("", rows), (".filtered.jsonl", filtered), (".failed.jsonl", failed)):
            text = b"".join(row if isinstance(row, bytes) else dump_line(row) for row in lines)
            (tmp_path / f"scored.jsonl{name}").write_bytes(text)
        assert main(["--input", str(tmp_path / "scored.jsonl")]) == 0
        browser.get((tmp_path / "scored.html").as_uri())
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    yield open_page
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if url != (tmp_path / "scored.html").as_uri()] == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def requests_of(browser) -> list[str]:
    """Addresses that were asked for since the log was last read; `data:` ones stay in the page."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def read(browser, script: str, *arguments: object) -> object:
    """What the script returns, by way of JSON, which unlike the driver's protocol keeps lone surrogates."""
    return json.loads(browser.execute_script(f"return JSON.stringify((() => {{ {script} }})())", *arguments))


def texts(browser, selector: str) -> list[str]:
    return read(browser, f"return [...document.querySelectorAll({selector!r})].map((node) => node.textContent)")


def status(browser) -> str:
    return browser.find_element(By.ID, "status").text


def count_found(browser) -> int:
    """The number the page says it found (or has)."""
    match = re.search(r" of ([\d,]+) row", status(browser))
    return int(match[1].replace(",", "")) if match else 0


def search(browser, text: str) -> None:
    """Type it, and wait until the page has searched for it."""
    box = browser.find_element(By.ID, "search")
    box.send_keys(Keys.CONTROL + "a")
    box.send_keys(text or Keys.BACKSPACE)
    WebDriverWait(browser, 60).until(lambda _: box.get_property("value") == text)
    browser.execute_script("document.getElementById('status').textContent = 'searching'")
    box.send_keys(Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda _: status(browser) != "searching")


def sort(browser, value: str) -> None:
    Select(browser.find_element(By.ID, "sort")).select_by_value(value)


def ids_on_all_pages(browser) -> list[str]:
    ids = texts(browser, ".card .id")
    while (following := browser.find_elements(By.CSS_SELECTOR, "#tools .pager button")[1]) and (
        following.get_attribute("aria-disabled") == "false"
    ):
        following.click()
        ids += texts(browser, ".card .id")
    return ids


def varied_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows with words, lengths and numbers that differ; some have no margin or no similarity."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        rejected = draw.choices(WORDS, k=draw.randint(1, 60))
        refined = [word for word in rejected if draw.random() < 0.9] + draw.choices(WORDS, k=draw.randint(1, 5))
        fields = {
            "id": f"row-{number}",
            "prompt": " ".join(draw.choices(WORDS, k=5)),
            "rejected": " ".join(rejected),
            "chosen": " ".join(refined),
            "diagnosis": f"Diagnosis {draw.choice(WORDS)}.",
            "margin": draw.choice([-1.0, 0.5, 1, 1.5, 2.25, 3, 4, 7.5, None]),
            "edit_similarity": draw.choice([0.0, 0.15, 0.5, 0.65, 0.875, 0.95, 1.0, None, draw.random()]),
        }
        rows.append(scored_row(draw.choice(WORDS), number, **fields))
    return rows


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


# ------------------------------------------------------------------------------------------ finding, sorting, counting


TORN = '{"torn": "half a wor'


def haystacks(row: dict) -> list[str]:
    names = ("id", "prompt", "rejected", "chosen", "teacher_response", "diagnosis", "original_chosen")
    return [row[name] for name in names]


def test_search_finds_the_rows_that_have_the_text_anywhere_whatever_its_case(open_page):
    rows = varied_rows(150)
    rows[7]["diagnosis"] = "C++ (or .* [a-z]) costs $5-6 \\d"
    browser = open_page(*rows, TORN.encode())
    for query in (
        "word1",
        "WORD39 ",
        "row-77",
        "NAÏVE",
        "diagnosis word",
        "日本",
        ".*",
        "[a-z]",
        "$5-6 \\d",
        "—",
        '"torn',
    ):
        pattern = re.compile(re.escape(query), re.IGNORECASE)
        search(browser, query)
        torn = bool(pattern.search(TORN))
        assert count_found(browser) == sum(any(map(pattern.search, haystacks(row))) for row in rows) + torn, query
    search(browser, "nowhere at all")
    assert status(browser) == "Nothing found"
    assert texts(browser, ".card") == []
    search(browser, "")
    assert count_found(browser) == 151


def test_what_was_found_is_marked_unfolded_and_leaves_the_text_alone(open_page):
    row = scored_row(
        "plain", teacher_response="deep down a needle", rejected="a nee\u200bdle " + "hay " * 4000 + "needle"
    )
    browser = open_page(row)
    assert not browser.find_element(By.CSS_SELECTOR, "details").get_attribute("open")
    search(browser, "NEEDLE")
    marked = "return [...CSS.highlights.get('found')].map((range) => range.toString())"
    assert read(browser, marked) == ["needle", "needle"]
    assert browser.find_element(By.CSS_SELECTOR, "details").get_attribute("open")
    assert "open" in browser.find_element(By.CSS_SELECTOR, ".card").get_attribute("class")
    assert texts(browser, ".pane.rejected .text") == [row["rejected"]]


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("field", SORTS)
def test_the_order_is_that_of_python_with_ties_as_in_the_file_and_missing_numbers_last(open_page, field, direction):
    rows = varied_rows(70)
    browser = open_page(*rows)
    assert ids_on_all_pages(browser) == [row["id"] for row in rows]
    sort(browser, f"{field}-{direction}")
    sign = -1 if direction == "down" else 1
    value = SORTS[field]
    expected = sorted(rows, key=lambda row: (row[value] is None, sign * (row[value] or 0)))
    assert ids_on_all_pages(browser) == [row["id"] for row in expected]


def bars(browser, title: str) -> tuple[list[float], list[int], list[int]]:
    """(edges, counts of all rows, counts of the rows found) of a histogram, as its bars say them."""
    buttons = browser.find_elements(By.CSS_SELECTOR, f"[aria-label^='{title}: show'] .bar")
    labels = [button.get_attribute("aria-label") for button in buttons]
    edges, counts, found = [], [], []
    for label in labels:
        span, _, numbers = label.replace(",", "").replace("\u2212", "-").partition(": ")
        low, _, high = span.partition(" to ")
        edges += [] if edges else [float(low.removesuffix(" and over"))]
        edges.append(float(high) if high else np.inf)
        found.append(int(numbers.split()[0]))
        counts.append(int(numbers.split()[2]))
    return edges, counts, found


def histogram_values(rows: list[dict]) -> dict[str, list[float]]:
    return {
        "Margin": [row["margin"] for row in rows if row["margin"] is not None],
        "Edit similarity": [row["edit_similarity"] for row in rows if row["edit_similarity"] is not None],
        "Words in rejected": [len(row["rejected"].split()) for row in rows],
        "Words in refined": [len(row["chosen"].split()) for row in rows],
    }


def test_histograms_count_as_numpy_does_for_all_rows_and_for_those_found(open_page):
    rows = [row for row in varied_rows(400, seed=4) if "日" not in row["rejected"] + row["chosen"]]
    rows[0]["rejected"] = "word1 " * 3000  # one that is far longer than the rest
    browser = open_page(*rows)
    for query in ("", "word7"):
        search(browser, query)
        found = [row for row in rows if any(query in text for text in haystacks(row))]
        for (title, values), values_found in zip(
            histogram_values(rows).items(), histogram_values(found).values(), strict=True
        ):
            edges, counts, counts_found = bars(browser, title)
            assert counts == np.histogram(values, edges)[0].tolist(), title
            assert counts_found == np.histogram(values_found, edges)[0].tolist(), title
            assert sum(counts) == len(values)
    assert bars(browser, "Words in rejected")[0][-1] == np.inf
    assert bars(browser, "Words in rejected")[0][-2] < 100


@pytest.mark.parametrize(
    "margins", [[3.0, 3.0], [0.0], [1e300, -1e300], [1e-12, 2e-12], [1e16, 1e16 + 2], [5e-324, 0.0]]
)
def test_odd_margins_are_all_counted(open_page, margins):
    browser = open_page(*(scored_row("x", n, margin=margin) for n, margin in enumerate(margins)))
    counts = "return histograms[0].counts"
    assert sum(read(browser, counts)) == len(margins)
    assert len(read(browser, counts)) < 60
    assert count_found(browser) == len(margins)


def test_a_bar_shows_its_pairs_alone_by_mouse_and_by_keyboard(open_page):
    rows = varied_rows(120)
    browser = open_page(*rows)
    edges, counts, _ = bars(browser, "Margin")
    buttons = browser.find_elements(By.CSS_SELECTOR, "[aria-label^='Margin: show'] .bar")
    usable = [index for index, count in enumerate(counts) if count]
    buttons[usable[1]].click()
    assert count_found(browser) == counts[usable[1]]
    low, high = edges[usable[1]], edges[usable[1] + 1]
    assert ids_on_all_pages(browser) == [
        row["id"] for row in rows if row["margin"] is not None and low <= row["margin"] < high
    ]
    buttons[usable[1]].send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert count_found(browser) == counts[usable[1]] + counts[usable[2]]
    assert browser.switch_to.active_element.get_attribute("aria-pressed") == "true"
    search(browser, "row-1")
    assert count_found(browser) < counts[usable[1]] + counts[usable[2]]
    browser.find_element(By.ID, "clear").click()
    assert count_found(browser) == len(rows)
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    assert not browser.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")


def test_left_out_rows_stand_on_the_page_by_reason(open_page):
    filtered = [{"id": str(n), "reason": "margin not over min_margin"} for n in range(3)]
    failed = [{"id": str(n), "reason": f"no <refined> in try {n}"} for n in range(2)]
    browser = open_page(scored_row("x"), b"{broken\n", filtered=filtered, failed=failed)
    assert browser.find_element(By.ID, "summary").text == "1 pair, 3 filtered, 2 failed, 1 unusable"
    shown = read(
        browser,
        "return [...document.querySelectorAll('.left-out tr')].map((row) => [...row.cells].map((c) => c.textContent))",
    )
    assert shown == [["margin not over min_margin", "3"], ["no <refined> in try N", "2"], ["not valid JSON", "1"]]
    (bad,) = browser.find_elements(By.CSS_SELECTOR, ".card.bad")
    assert "not valid JSON" in bad.text
    assert "{broken" in bad.text
    assert "line 2" in bad.text


# -------------------------------------------------------------------------------------------------------- ten thousand


def test_ten_thousand_pairs_open_are_searched_sorted_and_turned_over(open_page):
    draw = random.Random(5)
    vocabulary = [f"term{number}" for number in range(5000)]
    rows = []
    for number in range(10_000):
        words = draw.choices(vocabulary, k=150)
        fields = {"rejected": " ".join(words), "chosen": " ".join([*words[:70], "edited", *words[72:]])}
        rows.append(scored_row("x", number, margin=draw.randint(1, 900) / 100, **fields))
    browser = open_page(*rows)
    assert count_found(browser) == 10_000
    assert len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 20
    search(browser, "x 7654")
    assert texts(browser, ".card .id") == ["x 7654"]
    search(browser, "TERM4321")
    assert count_found(browser) == sum("term4321" in row["rejected"] or "term4321" in row["chosen"] for row in rows)
    search(browser, "")
    sort(browser, "margin-down")
    expected = [row["id"] for row in sorted(rows, key=lambda row: -row["margin"])]
    assert texts(browser, ".card .id") == expected[:20]
    field = browser.find_element(By.CSS_SELECTOR, "#tools .pager input")
    field.clear()
    field.send_keys("500", Keys.TAB)
    assert status(browser) == "9,981–10,000 of 10,000 rows"
    assert texts(browser, ".card .id") == expected[-20:]


# ------------------------------------------------------------------------------------------------------------- for all


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(open_page):
    browser = open_page(*varied_rows(45))
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
