"""Searching, sorting and counting on the page of `inspect_pairs.py`, in real headless Chromium."""

import random
import re

import numpy as np
import pytest
from inspect_fixtures import count_found, ids_on_all_pages, read, scored_row, search, sort, status, texts
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.slow

WORDS = [f"word{number}" for number in range(40)] + ["naïve", "日本", "don't", "3.14", "(a,b)", "—", "Ünï"]
SORTS = {"margin": "margin", "similarity": "edit_similarity"}
TORN = '{"torn": "half a wor'


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
