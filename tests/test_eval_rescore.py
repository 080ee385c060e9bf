"""Stored scores and verdicts give the benchmark's table again, without a model."""

import json
import subprocess
import sys

import pytest
from benchmark_fixtures import judgebench_row, llmbar_row, write_all, write_json, write_lines
from eval_fixtures import pair, write_jsonl

from distiller.records import InputError
from RewardTrainer.eval.benchmarks import load_benchmark
from RewardTrainer.eval.rescore import rescore
from RewardTrainer.eval.stored import read_scores, read_verdicts


@pytest.fixture
def judgebench(tmp_path):
    rows = [judgebench_row(f"p{n}", "livecodebench", label) for n, label in enumerate(("A>B", "B>A", "A>B"))]
    write_lines(tmp_path / "judgebench-gpt" / "gpt.jsonl", rows)
    return tmp_path


def score_lines(scores: dict[str, list], **more) -> list[dict]:
    line = {"benchmark": "judgebench-gpt", "subset": "Coding", **more}
    return [{**line, "id": i, "response": n, "score": s} for i, row in scores.items() for n, s in enumerate(row)]


def verdict_lines(verdicts: dict[str, list]) -> list[dict]:
    line = {"benchmark": "judgebench-gpt", "subset": "Coding", "raw": "..."}
    return [
        {**line, "id": identifier, "order": order, "verdict": verdict}
        for identifier, said in verdicts.items()
        for order, verdict in said
    ]


def test_the_command_prints_the_table_from_scores_and_loads_no_model(judgebench, tmp_path):
    scores = {"p0": [2.0, 1.0], "p1": [2.0, 1.0], "p2": [1, 1]}
    path = write_lines(tmp_path / "scores.jsonl", [*score_lines(scores), *score_lines(scores, benchmark="other")])
    command = [sys.executable, "-X", "importtime", "-m", "RewardTrainer.eval.rescore", "--benchmark", "judgebench-gpt"]
    command += ["--scores", str(path), "--data_dir", str(judgebench)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["judgebench-gpt:", "3", "of", "3", "rows"],
        ["Overall"],
        ["0.333"],
    ]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not {"torch", "transformers", "vllm"} & imported


def test_verdicts_are_read_in_every_spelling_and_flipped_back(judgebench, tmp_path):
    # p0 is A's: right in both orders. p1 is B's: first says B, swapped says A (= B shown first). p2: one null, one tie
    verdicts = {
        "p0": [([0, 1], "A"), ([1, 0], "B")],
        "p1": [("AB", "B>A"), ("BA", "A>B")],
        "p2": [([0, 1], None), ([1, 0], "A=B")],
    }
    path = write_lines(tmp_path / "verdicts.jsonl", verdict_lines(verdicts))
    summary, rows = rescore("judgebench-gpt", judgebench, None, path)
    assert (summary["overall"], rows) == (pytest.approx(2 / 3), "3 of 3 rows")
    said = read_verdicts(path, "judgebench-gpt", load_benchmark("judgebench-gpt", judgebench).items).said
    assert [[verdict.winner for verdict in row] for row in said] == [[0, 0], [1, 1], [None, "tie"]]


def test_rows_with_lines_missing_are_left_out_named_and_counted(judgebench, tmp_path, capsys):
    lines = score_lines({"p0": [2, 1], "p1": [2, 1], "p9": [1, 2]})
    path = write_lines(
        tmp_path / "scores.jsonl", [line for line in lines if (line["id"], line["response"]) != ("p1", 1)]
    )
    summary, rows = rescore("judgebench-gpt", judgebench, path, None)
    assert (summary["overall"], rows) == (1.0, "1 of 3 rows")
    said = capsys.readouterr().err
    assert "1 of its 2 responses have a line" in said and "0 of its 2 responses" in said
    assert (
        "2 rows lack lines in the file" in said and "2 lines are about rows that the benchmark does not have" in said
    )


def test_a_null_score_leaves_its_row_out_unless_the_benchmark_has_a_rule_for_it(judgebench, tmp_path, capsys):
    path = write_lines(tmp_path / "scores.jsonl", score_lines({"p0": [2, None], "p1": [1, 2], "p2": [1, 2]}))
    summary, rows = rescore("judgebench-gpt", judgebench, path, None)
    assert (summary["overall"], rows) == (0.5, "2 of 3 rows")
    assert "1 rows have a null" in capsys.readouterr().err
    write_json(tmp_path / "llmbar" / "Natural" / "dataset.json", [llmbar_row(0, 1)])
    lines = [{"id": 0, "subset": "Natural", "response": n, "score": s} for n, s in enumerate((None, 3))]
    summary, _ = rescore("llmbar", tmp_path, write_lines(tmp_path / "ratings.jsonl", lines), None)
    assert summary["overall"] == 0.5


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ({"score": "2"}, "line 2: field `score` must be a number or null, not '2'"),
        ({"score": True}, "field `score`"),
        ({"score": 10**400}, "field `score`"),
        ({"response": -1}, "field `response`"),
        ({"response": 2}, "response 2 of a row that has 2"),
        ({"response": 0}, "id 'p0', response 0 came before"),
        ({"id": None}, "field `id`"),
        ({"subset": ["x"]}, "field `subset`"),
        ({"benchmark": 3}, "field `benchmark`"),
    ],
)
def test_a_damaged_line_of_scores_ends_with_its_place_and_no_number(judgebench, tmp_path, harm, words):
    lines = score_lines({"p0": [2, 1], "p1": [2, 1]})
    lines[1] |= harm
    path = write_lines(tmp_path / "scores.jsonl", lines)
    with pytest.raises(InputError, match=words):
        rescore("judgebench-gpt", judgebench, path, None)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ({"verdict": "C"}, "line 2: field `verdict` must be one of A, B, tie or null, not 'C'"),
        ({"verdict": 1}, "field `verdict`"),
        ({"order": "ab"}, "field `order`"),
        ({"order": [0, 0]}, "field `order`"),
        ({"order": [0]}, "field `order`"),
        ({"order": [0, 2]}, "goes over the row's 2 responses"),
        ({"order": [0, 1]}, r"order \[0, 1\] came before"),
    ],
)
def test_a_damaged_line_of_verdicts_ends_with_its_place_and_no_number(judgebench, tmp_path, harm, words):
    lines = verdict_lines({"p0": [([0, 1], "A"), ([1, 0], "B")]})
    lines[1] |= harm
    path = write_lines(tmp_path / "verdicts.jsonl", lines)
    with pytest.raises(InputError, match=words):
        rescore("judgebench-gpt", judgebench, None, path)


@pytest.mark.parametrize("name", ["score", "verdict"])
def test_a_field_left_out_is_not_taken_for_null(judgebench, tmp_path, name):
    lines = score_lines({"p0": [2, 1]}) if name == "score" else verdict_lines({"p0": [([0, 1], "A")]})
    del lines[0][name]
    path = write_lines(tmp_path / "lines.jsonl", lines)
    with pytest.raises(InputError, match=f"field `{name}` is missing"):
        rescore("judgebench-gpt", judgebench, path if name == "score" else None, path)


@pytest.mark.parametrize("text", ["{torn", '{"score": NaN}', "[1]"])
def test_a_file_with_a_line_that_is_no_row_is_refused(judgebench, tmp_path, text):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(score_lines({"p0": [2]})[0]) + "\n" + text + "\n")
    with pytest.raises(InputError, match="line 2: "):
        rescore("judgebench-gpt", judgebench, path, None)


def test_a_file_about_another_benchmark_is_refused_and_not_scored_as_zero(judgebench, tmp_path):
    path = write_lines(tmp_path / "scores.jsonl", score_lines({"p0": [2, 1]}, benchmark="llmbar"))
    with pytest.raises(InputError, match="no row of judgebench-gpt is whole"):
        rescore("judgebench-gpt", judgebench, path, None)
    with pytest.raises(InputError, match="no such file"):
        rescore("judgebench-gpt", judgebench, tmp_path / "nothing.jsonl", None)


def test_a_preference_file_is_found_by_its_name_from_another_directory_too(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n, margin=n) for n in range(3)])
    lines = [
        {
            "benchmark": "../somewhere/pairs.jsonl",
            "id": f"row{n}",
            "subset": "all",
            "response": r,
            "score": float(-n * r),
        }
        for n in range(3)
        for r in range(2)
    ]
    summary, _ = rescore(str(path), None, write_lines(tmp_path / "scores.jsonl", lines), None)
    assert summary["overall"] == pytest.approx(2 / 3)
    assert summary["averages"]["gap_margin_slope"] == pytest.approx(1)


def test_scores_of_every_benchmark_survive_the_way_through_a_file(tmp_path):
    data = write_all(tmp_path)
    for name in ("rewardbench", "rewardbench2", "rm-bench", "judgebench-claude", "rmb-pairwise", "rmb-bon", "ifbench"):
        benchmark = load_benchmark(name, data)
        scores = [
            [float((len(item.id) * 5 + n * 3) % 7) for n in range(len(item.responses))] for item in benchmark.items
        ]
        lines = [
            {"benchmark": name, "id": item.id, "subset": item.subset, "response": n, "score": score}
            for item, row in zip(benchmark.items, scores, strict=True)
            for n, score in enumerate(row)
        ]
        stored = read_scores(write_lines(tmp_path / f"{name}.jsonl", lines[::-1]), name, benchmark.items)
        assert stored.said == scores
        assert not stored.missing and not stored.unknown
