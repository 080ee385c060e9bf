"""What `inspect_pairs.py` puts in the page, counts and refuses; the page itself is tried in test_inspect_page."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspect_fixtures import HOSTILE, scored_row

from distiller.records import dump_line
from refine.inspect_pairs import main

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The page as an HTML parser sees it: its tags, and the text in each script element."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        *parts, last, _ = self.scripts
        self.rows = [row for part in parts for row in json.loads(part)]
        self.about = json.loads(last)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts[-1] += data

    def group(self, name: str) -> dict:
        return next(group for group in self.about["left_out"] if group["name"] == name)


def write(path: Path, *rows: dict | bytes) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else dump_line(row) for row in rows))
    return path


def test_a_scored_row_and_the_refined_row_before_it_show_the_same_responses(tmp_path):
    refined = {
        "id": "a",
        "prompt": "p",
        "chosen": "the original",
        "chosen_score": 8.0,
        "rejected": "an old word",
        "rejected_score": 3.0,
        "teacher_response": "y",
        "diagnosis": "old is wrong",
        "refined_response": "a new word",
        "edit_similarity": 0.5,
    }
    scored = {
        **{name: value for name, value in refined.items() if name != "refined_response"},
        "chosen": "a new word",
        "chosen_score": 7.0,
        "margin": 4.0,
        "original_chosen": "the original",
        "original_chosen_score": 8.0,
    }
    shown = []
    for name, row in (("refined", refined), ("scored", scored)):
        assert main(["--input", str(write(tmp_path / f"{name}.jsonl", row))]) == 0
        shown += Page(tmp_path / f"{name}.html").rows
    before, after = shown
    assert after.pop("margin") == 4.0
    assert after.pop("refined_score") == 7.0
    assert before == after
    assert (before["refined"], before["original_chosen"], before["original_score"]) == (
        "a new word",
        "the original",
        8,
    )
    assert before["words"] == [3, 3]


def test_every_text_comes_back_from_the_page_unchanged_and_adds_no_element_to_it(tmp_path):
    plain = write(tmp_path / "plain.jsonl", scored_row("plain"))
    hostile = write(tmp_path / "hostile.jsonl", *(scored_row(text, index) for index, text in enumerate(HOSTILE)))
    for source in (plain, hostile):
        assert main(["--input", str(source)]) == 0
    page = Page(tmp_path / "hostile.html")
    assert [row["diagnosis"] for row in page.rows] == list(HOSTILE)
    assert [row["rejected"] for row in page.rows] == [scored_row(text)["rejected"] for text in HOSTILE]
    assert page.tags == Page(tmp_path / "plain.html").tags


def test_rows_that_are_no_pair_are_counted_by_reason_and_kept_in_their_place(tmp_path):
    lacking = {**scored_row("x", 1)}
    del lacking["rejected"]
    source = write(
        tmp_path / "scored.jsonl",
        scored_row("good", 0),
        b'{"id": "torn", "prompt": "half a\n',
        lacking,
        scored_row("margin is text", 2) | {"margin": "high"},
        scored_row("no prompt", 3) | {"prompt": None},
        scored_row("bad prompt", 4) | {"prompt": [{"role": "user"}]},
        scored_row("huge", 5) | {"margin": 10**400},
        b"\xff\xfe\n",
        {"id": "original", "prompt": "p", "chosen": "c", "rejected": "r"},
        scored_row("good", 0),
        scored_row("good", 9),
    )
    assert main(["--input", str(source)]) == 0
    page = Page(tmp_path / "scored.html")
    assert [row["n"] for row in page.rows] == list(range(1, 12))
    assert [row["id"] for row in page.rows if "refined" in row] == [scored_row("good", n)["id"] for n in (0, 9)]
    reasons = {row["n"]: row["reason"] for row in page.rows if "refined" not in row}
    assert reasons[2] == "not valid JSON"
    assert reasons[3] == "field `rejected` is missing"
    assert reasons[4] == "field `margin` must be a number, not str"
    assert reasons[5] == "field `prompt` is missing"
    assert "field `prompt` has a message" in reasons[6]
    assert reasons[7] == "field `margin` is too large"
    assert "UTF-8" in reasons[8]
    assert "run: python refine/refine_response_vllm.py" in reasons[9]
    assert "came before" in reasons[10]
    assert page.rows[1]["raw"] == '{"id": "torn", "prompt": "half a'
    assert json.loads(page.rows[3]["raw"])["margin"] == "high"
    unusable = page.group("Unusable")
    assert unusable["count"] == len(unusable["reasons"]) == 9


def test_filtered_and_failed_rows_are_counted_by_reason_with_the_most_frequent_first(tmp_path):
    source = write(tmp_path / "scored.jsonl", scored_row("good"))
    reasons = ["margin not over min_margin"] * 3 + ["refined equals rejected"]
    write(tmp_path / "scored.jsonl.filtered.jsonl", *({"id": str(n), "reason": r} for n, r in enumerate(reasons)))
    over = [{"id": str(n), "reason": f"the prompt has {n} tokens", "raw": None} for n in (9000, 9001)]
    write(tmp_path / "scored.jsonl.failed.jsonl", *over, b'{"id": "torn", "rea')
    assert main(["--input", str(source)]) == 0
    page = Page(tmp_path / "scored.html")
    assert page.group("Filtered")["reasons"] == [["margin not over min_margin", 3], ["refined equals rejected", 1]]
    assert page.group("Failed")["reasons"] == [["the prompt has N tokens", 2], ["unreadable line: not valid JSON", 1]]
    assert (page.group("Filtered")["count"], page.group("Failed")["count"]) == (4, 3)


def test_a_file_all_of_whose_rows_were_filtered_still_makes_a_page(tmp_path):
    source = write(tmp_path / "scored.jsonl")
    write(tmp_path / "scored.jsonl.filtered.jsonl", {"id": "1", "reason": "refined equals rejected"})
    assert main(["--input", str(source)]) == 0
    page = Page(tmp_path / "scored.html")
    assert page.rows == []
    assert page.group("Filtered")["count"] == 1
    assert "there is no scored.jsonl.failed.jsonl" in page.group("Failed")["note"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"id": "1", "prompt": "p", "chosen": "c", "rejected": "r"},
            "neither `refined_response` nor `original_chosen`",
        ),
        (b"not json\n", "not valid JSON"),
    ],
)
def test_a_file_without_a_single_pair_is_refused_and_the_page_that_was_there_stays(tmp_path, capsys, row, said):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>the old page")
    assert main(["--input", str(write(tmp_path / "pairs.jsonl", row)), "--output", str(page)]) == 1
    error = capsys.readouterr().err
    assert "pairs.jsonl" in error
    assert said in error
    assert page.read_text() == "<!doctype html>the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "pairs.jsonl"]


def test_a_missing_input_and_an_output_over_the_input_are_refused(tmp_path, capsys):
    assert main(["--input", str(tmp_path / "none.jsonl")]) == 1
    assert "to make refined rows, run: python refine/refine_response_vllm.py" in capsys.readouterr().err
    source = write(tmp_path / "scored.jsonl", scored_row("good"))
    text = source.read_bytes()
    assert main(["--input", str(source), "--output", str(source)]) == 1
    assert "would write over the input" in capsys.readouterr().err
    other = write(tmp_path / "refined.jsonl", {"id": "paid for"})
    assert main(["--input", str(source), "--output", str(other)]) == 1
    assert "refined.jsonl is there and is no page" in capsys.readouterr().err
    assert source.read_bytes() == text and json.loads(other.read_text()) == {"id": "paid for"}


def test_limit_takes_the_first_rows_and_the_page_says_so(tmp_path):
    source = write(tmp_path / "scored.jsonl", *(scored_row("good", n) for n in range(5)))
    assert main(["--input", str(source), "--limit", "2", "--output", str(tmp_path / "new" / "page.html")]) == 0
    page = Page(tmp_path / "new" / "page.html")
    assert len(page.rows) == 2
    assert "first 2 rows" in page.about["file"]


def test_the_bare_command_takes_the_scored_file_of_the_directory_it_runs_in(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "scored.jsonl", scored_row("good"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "refine" / "inspect_pairs.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "data/scored.html: 1 pairs, 0 filtered, 0 failed, 0 unusable\n"
    assert len(Page(tmp_path / "data" / "scored.html").rows) == 1
