"""Hostile files of public benchmarks: what is wrong is said and counted, and never becomes a wrong number."""

import copy
import json
import random
import re

import pyarrow.parquet
import pytest
from benchmark_fixtures import (
    COUNTS,
    evalbias_row,
    llmbar_row,
    rewardbench2_row,
    rewardbench_row,
    rm_bench_row,
    write_all,
    write_json,
    write_lines,
)

from distiller.records import InputError
from RewardTrainer.eval.benchmarks import load_benchmark

HOSTILE = [
    (None, "must be an object|JSON object"),
    ("text", "JSON object expected, not str"),
    ({"chosen": None}, "field `chosen` is missing"),
    ({"rejected": 5}, "field `rejected` must be a string, not int"),
    ({"chosen": ["a"]}, "field `chosen` must be a string, not list"),
    ({"prompt": ""}, "field `prompt` is empty"),
    ({"prompt": None}, "field `prompt`"),
    ({"id": True}, "field `id`"),
    ({"id": 0}, "came before"),
    ({"subset": 3}, "field `subset`"),
    ({"chosen": "\ud800"}, "surrogate"),
]


@pytest.mark.parametrize(("harm", "words"), HOSTILE)
def test_a_hostile_row_is_skipped_with_its_place_and_field(tmp_path, harm, words):
    rows = [rewardbench_row(0, "hep-go"), rewardbench_row(1, "hep-go"), rewardbench_row(2, "hep-go")]
    rows[1] = {**rows[1], **harm} if isinstance(harm, dict) else harm
    write_lines(tmp_path / "rewardbench" / "filtered.jsonl", rows)
    benchmark = load_benchmark("rewardbench", tmp_path)
    assert [item.id for item in benchmark.items] == ["0", "2"]
    (message,) = benchmark.skipped
    assert "filtered.jsonl, line 2: " in message
    assert re.search(words, message)


def test_an_empty_response_of_a_public_benchmark_stays_because_upstreams_numbers_have_it(tmp_path):
    write_lines(tmp_path / "rewardbench" / "filtered.jsonl", [rewardbench_row(0, "hep-go", rejected="")])
    assert load_benchmark("rewardbench", tmp_path).items[0].responses == ("yes", "")


def test_a_file_of_other_fields_is_refused_without_a_flag_that_evaluation_does_not_have(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "yes", "worse": "no"}])
    with pytest.raises(InputError, match="field `rejected` is missing; .* rename one of them, or leave the row out"):
        load_benchmark(str(tmp_path / "pairs.jsonl"), None)


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = write_json(tmp_path / "evalbiasbench" / "biasbench.json", {})
    path.write_text("{broken")
    with pytest.raises(InputError, match="biasbench.json: not valid JSON"):
        load_benchmark("evalbiasbench", tmp_path)
    path.write_text('[{"bias": "x"}]')
    with pytest.raises(InputError, match="one object of lists expected"):
        load_benchmark("evalbiasbench", tmp_path)


@pytest.mark.parametrize("label", [None, 0, 3, "A", True, [1], 1.5])
@pytest.mark.parametrize("name", ["llmbar", "evalbiasbench"])
def test_a_label_that_is_neither_1_nor_2_is_refused(tmp_path, name, label):
    write_json(tmp_path / "llmbar/Natural/dataset.json", [{**llmbar_row(0, 1), "label": label}, llmbar_row(1, 2)])
    rows = [{**evalbias_row("length bias", 0), "label": label}, evalbias_row("length bias", 1)]
    write_json(tmp_path / "evalbiasbench" / "biasbench.json", {"length bias": rows})
    benchmark = load_benchmark(name, tmp_path)
    assert [item.id for item in benchmark.items] == ["1"]
    assert len(benchmark.skipped) == 1 and "field `label` must be 1 or 2, not" in benchmark.skipped[0]


@pytest.mark.parametrize("label", [1, 2, 1.0, 2.0, "2"])
@pytest.mark.parametrize("name", ["llmbar", "evalbiasbench"])
def test_a_label_written_as_another_kind_of_number_names_the_same_response(tmp_path, name, label):
    write_json(tmp_path / "llmbar/Natural/dataset.json", [{**llmbar_row(0, 1), "label": label}])
    row = {**evalbias_row("length bias", 0), "label": label}
    write_json(tmp_path / "evalbiasbench" / "biasbench.json", {"length bias": [row]})
    benchmark = load_benchmark(name, tmp_path)
    right = int(label) - 1
    scores = [[float(n == right) for n in range(2)]]
    assert benchmark.summarize(benchmark.items, scores)["overall"] == 1
    assert benchmark.summarize(benchmark.items, [scores[0][::-1]])["overall"] == 0


def test_a_row_of_a_subset_upstream_does_not_have_is_no_further_term_of_the_mean(tmp_path):
    rows = [rewardbench2_row("1", "Math"), rewardbench2_row("2", "math"), rewardbench2_row("3", "")]
    write_lines(tmp_path / "rewardbench2" / "t.jsonl", rows)
    styles = [rm_bench_row(1, domain="chat"), rm_bench_row(2, domain="safety-both"), rm_bench_row(3, domain="chats")]
    write_json(tmp_path / "rm-bench" / "total_dataset.json", styles)
    write_lines(tmp_path / "rewardbench" / "f.jsonl", [rewardbench_row(1, "hep-go"), rewardbench_row(2, " ")])
    for name, skipped in {"rewardbench2": 2, "rm-bench": 2, "rewardbench": 1}.items():
        benchmark = load_benchmark(name, tmp_path)
        assert [item.id for item in benchmark.items] == ["1"]
        assert len(benchmark.skipped) == skipped
        assert all("is no subset of this benchmark" in message for message in benchmark.skipped)


def test_ties_are_known_in_either_spelling(tmp_path):
    rows = [rewardbench2_row("ref:1", "ties", 1, 1), rewardbench2_row("tied:1", "Ties", 2, 1)]
    write_lines(tmp_path / "rewardbench2" / "t.jsonl", rows)
    assert {item.subset for item in load_benchmark("rewardbench2", tmp_path).items} == {"Ties"}


HARM = (None, True, 0, 1.0, 2, -1, 1.5, 10**400, float("nan"), float("inf"), "", " ", "x" * 50_000, "\ud800", "\x00")
HARM += ([], [None], [[]], ["a", None], ["a"] * 3, {}, {"content": None}, "A>B", "ref:1", "tied:", "Ties", "/")
HARM += ([{"role": "user", "content": "q"}], [{"role": "user"}], [{"role": "assistant", "content": "q"}])


def harm(draw: random.Random, node):
    """One value somewhere below is removed, repeated or made something else."""
    if not isinstance(node, dict | list) or not node or draw.random() < 0.1:
        return copy.deepcopy(draw.choice(HARM))
    key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
    how = draw.random()
    if how < 0.1:
        del node[key]
    elif how < 0.2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = harm(draw, node[key])
    return node


def tear(draw: random.Random, text: str) -> str:
    """Some characters are lost."""
    place = draw.randrange(len(text))
    return text[:place] + text[place + draw.randint(1, 5) :]


def contents(path):
    """What a JSON or JSONL file of the fixtures holds."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", COUNTS)
def test_damage_anywhere_in_a_benchmarks_files_is_refused_or_skipped_and_never_a_number_outside_its_range(
    tmp_path, name
):
    """Whatever is read can be scored: every row has a right and a wrong text that can be tokenized, ids are unique."""
    data = write_all(tmp_path)
    folder = next(data / part for part in (name, *name.split("-")) if (data / part).is_dir())
    for parquet in folder.rglob("*.parquet"):
        rows = pyarrow.parquet.read_table(parquet).to_pylist()
        parquet.unlink()
        write_lines(parquet.with_suffix(".jsonl"), rows)
    originals = {path: contents(path) for path in sorted(folder.rglob("*.json*"))}
    draw = random.Random(name)
    outcomes = set()
    for _ in range(150):
        path = draw.choice([*originals])
        rows = copy.deepcopy(originals[path])
        for _ in range(draw.randint(1, 3)):
            rows = harm(draw, rows)
        lines = isinstance(rows, list) and path.suffix == ".jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
        path.write_text(tear(draw, text) if draw.random() < 0.1 and text else text)
        try:
            benchmark = load_benchmark(name, data)
        except InputError:
            outcomes.add("refused")
        else:
            outcomes.add("skipped" if benchmark.skipped else "read")
            check_usable(benchmark, draw)
        write = write_lines if path.suffix == ".jsonl" else write_json
        write(path, originals[path])
    assert {"skipped", "read"} <= outcomes


def check_usable(benchmark, draw: random.Random):
    """The rows can be tokenized, told apart and scored."""
    items = benchmark.items
    assert len({item.key for item in items}) == len(items)
    for item in items:
        for text in (item.id, item.subset, *item.responses, *(message["content"] for message in item.prompt)):
            text.encode("utf-8")
        assert item.id and item.subset and item.pairs()
    scores = [[draw.choice((0.0, 1.0, 2.0, None)) for _ in item.responses] for item in items]
    if items:
        summary = benchmark.summarize(items, scores)
        for row in summary["subsets"].values():
            assert all(-0.01 <= value <= 1.01 for column, value in row.items() if column != "n")
        assert summary["overall"] is None or -0.01 <= summary["overall"] <= 1.01
