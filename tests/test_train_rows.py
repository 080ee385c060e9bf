"""Which rows are trained on, which are held out, and what is refused."""

import json
import logging
from collections import Counter

import pytest

from distiller.records import InputError
from RewardTrainer.train.data import load_mixture, load_pairs, parse_weights


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count, prompts=None, **fields):
    return [
        {"id": f"p{i}", "prompt": f"q{i % (prompts or count)}", "chosen": f"good {i}", "rejected": "bad", **fields}
        for i in range(count)
    ]


def test_missing_margin_is_the_difference_of_the_scores(tmp_path):
    rows = pairs(3, chosen_score=7.5, rejected_score=4)
    rows[1]["margin"] = 9.0  # one that is there stays
    rows[2] |= {"margin": None, "extra": [1]}
    train, held_out = load_pairs(write(tmp_path / "s.jsonl", rows), required=["margin"])
    assert [row["margin"] for row in train] == [3.5, 9.0, 3.5] and held_out == []
    assert train[2]["extra"] == [1]


@pytest.mark.parametrize(
    ("field", "command"),
    [
        ("margin", "cali_score_vllm.py"),
        ("rejected_score", "score_orig_vllm.py"),
        ("teacher_response", "refine_response_vllm.py"),
    ],
)
def test_missing_field_is_refused_with_file_row_and_command(field, command, tmp_path):
    rows = pairs(3, margin=1.0, chosen_score=7.0, rejected_score=4.0, teacher_response="t")
    del rows[2][field]
    if field == "margin":
        del rows[2]["chosen_score"]
    with pytest.raises(InputError, match=rf"s\.jsonl.* 3\b.*`{field}`.*{command}"):
        load_pairs(write(tmp_path / "s.jsonl", rows), required=[field])


def test_rating_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: field `margin` must be a number, not a string"):
        load_pairs(write(tmp_path / "s.jsonl", pairs(2, margin="2")), required=["margin"])


def test_empty_file_says_what_may_have_happened(tmp_path):
    with pytest.raises(
        InputError, match=r"s\.jsonl: 0 rows: every row was filtered or failed.*s\.jsonl\.failed\.jsonl"
    ):
        load_pairs(write(tmp_path / "s.jsonl", []))


def test_rows_that_cannot_be_used_are_skipped_and_counted_by_reason_where_that_is_asked_for(tmp_path, caplog):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = pairs(6, margin=1.0)
    rows[1] = {"id": "apart", "chosen": [*turns, *turns], "rejected": [turns[0], turns[1] | {"content": "b"}]}
    rows[2]["rejected"] = rows[3]["rejected"] = ""
    del rows[4]["margin"]
    path = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(InputError, match=r"line 2: fields .* part before the last turn; .* --skip_bad_rows true"):
        load_pairs(path, required=["margin"])
    with caplog.at_level(logging.WARNING):
        train, _ = load_pairs(path, required=["margin"], skip_bad_rows=True)
    assert [row["id"] for row in train] == ["p0", "p5"]
    for said in ("2 rows skipped: field `rejected` is empty", "1 rows skipped: fields `chosen` and `rejected` part",
                 "1 rows skipped: field `margin` is missing", "line 3: field `rejected` is empty"):  # fmt: skip
        assert said in caplog.text, said
    with pytest.raises(InputError, match="0 rows are left of 6"):
        load_pairs(write(tmp_path / "n.jsonl", pairs(6)), required=["margin"], skip_bad_rows=True)


def test_repeated_rows_are_dropped_with_a_count(tmp_path, caplog):
    rows = pairs(3)
    with caplog.at_level(logging.WARNING):
        train, _ = load_pairs(write(tmp_path / "s.jsonl", [*rows, rows[0], rows[2]]))
    assert len(train) == 3 and "2 repeated rows dropped" in caplog.text


def test_an_id_that_two_rows_of_other_content_have_is_refused(tmp_path):
    rows = pairs(3)
    with pytest.raises(InputError, match="line 4: field `id` came before in the file, with other content; give every"):
        load_pairs(write(tmp_path / "s.jsonl", [*rows, rows[0] | {"chosen": "another one"}]))


def test_rows_of_one_prompt_never_straddle_the_split(tmp_path):
    path = write(tmp_path / "s.jsonl", pairs(60, prompts=20))
    train, held_out = load_pairs(path, eval_ratio=0.2, seed=3)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len(held_out) == 12 and len(train) == 48
    assert {row["id"] for row in train} | {row["id"] for row in held_out} == {f"p{i}" for i in range(60)}


def test_split_depends_on_seed_and_prompts_alone(tmp_path):
    rows = pairs(40)
    path, backwards = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])

    def held(path, seed):
        return {row["id"] for row in load_pairs(path, eval_ratio=0.25, seed=seed)[1]}

    assert held(path, 1) == held(path, 1) == held(backwards, 1) != held(path, 2)


def test_prompts_that_differ_in_outer_white_space_or_form_count_as_one(tmp_path):
    rows = pairs(3)
    rows[0]["prompt"], rows[1]["prompt"] = "same", [{"role": "user", "content": "same\n"}]
    train, _ = load_pairs(
        write(tmp_path / "a.jsonl", rows), eval_file=write(tmp_path / "b.jsonl", [rows[1] | {"id": "e"}])
    )
    assert [row["id"] for row in train] == ["p2"]


def test_training_rows_held_out_in_the_eval_file_are_dropped_with_a_count(tmp_path, caplog):
    rows = pairs(5)
    # The prompts of p0 and p2; the id of p3 says nothing.
    held_out = [{**rows[0], "id": "other"}, {**rows[3], "prompt": rows[2]["prompt"]}]
    with caplog.at_level(logging.WARNING):
        train, eval_rows = load_pairs(
            write(tmp_path / "a.jsonl", rows), eval_file=write(tmp_path / "b.jsonl", held_out)
        )
    assert [row["id"] for row in train] == ["p1", "p3", "p4"]
    assert [row["id"] for row in eval_rows] == ["other", "p3"]
    assert "2 training rows dropped" in caplog.text


def test_eval_file_that_holds_out_everything_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(4))
    with pytest.raises(InputError, match="the prompts of all 4 are held out"):
        load_pairs(path, eval_file=path)


def test_held_out_share_that_cannot_be_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(4, prompts=1))
    with pytest.raises(InputError, match="--eval_ratio 0 or --eval_file"):
        load_pairs(path, eval_ratio=0.1)
    with pytest.raises(InputError, match="less than 1"):
        load_pairs(path, eval_ratio=1.0)
    with pytest.raises(InputError, match="give one of them"):
        load_pairs(path, eval_ratio=0.1, eval_file=path)


def test_several_files_columns_and_limit(tmp_path):
    rows = [{"id": row["id"], "instruction": row["prompt"], "chosen": "c", "rejected": "r"} for row in pairs(6)]
    paths = [write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "b.jsonl", rows[3:])]
    train, _ = load_pairs(paths, columns={"prompt": "instruction"}, limit=5)
    assert [row["prompt"] for row in train] == ["q0", "q1", "q2", "q3", "q4"]


def test_limit_that_takes_nothing_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(3))
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"--limit {limit}: must be at least 1"):
            load_pairs(path, limit=limit)


def test_rows_that_two_files_share_are_trained_on_once(tmp_path, caplog):
    first, second = write(tmp_path / "a.jsonl", pairs(3)), write(tmp_path / "b.jsonl", pairs(5))
    with caplog.at_level(logging.WARNING):
        train, _ = load_pairs([first, second])
    assert [row["id"] for row in train] == [row["id"] for row in pairs(5)]
    assert "3 rows dropped" in caplog.text


def test_weight_is_how_often_a_file_is_seen(tmp_path):
    first = write(tmp_path / "a.jsonl", pairs(10))
    second = write(
        tmp_path / "b.jsonl", [{**row, "id": f"b{i}", "prompt": f"b{i // 3}"} for i, row in enumerate(pairs(30))]
    )
    mixture = load_mixture([first, second], weights=[2.5, 0.5], seed=4)
    seen = Counter(row["id"] for row in mixture.train)
    assert sorted(seen[f"p{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert len([name for name in seen if name[0] == "b"]) == 15 and {seen[n] for n in seen if n[0] == "b"} == {1}
    # Whole prompts: of three rows each, all or none.
    assert set(Counter(row["prompt"] for row in mixture.train if row["id"][0] == "b").values()) == {3}
    assert [(file.weight, file.read, file.distinct, file.rows) for file in mixture.files] == [
        (2.5, 10, 10, 25),
        (0.5, 30, 30, 15),
    ]


def test_rows_that_a_weight_draws_depend_on_seed_and_prompts_and_grow_with_the_weight(tmp_path):
    rows = pairs(40)
    path, backwards = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])

    def drawn(path, weight, seed=1):
        return {row["id"] for row in load_mixture(path, weights=[weight], seed=seed).train}

    assert drawn(path, 0.5) == drawn(backwards, 0.5) != drawn(path, 0.5, seed=2)
    assert drawn(path, 0.25) < drawn(path, 0.5) and len(drawn(path, 0.25)) == 10


def test_weights_neither_move_the_split_nor_let_a_prompt_straddle_it(tmp_path):
    first = write(tmp_path / "a.jsonl", pairs(30))
    second = write(tmp_path / "b.jsonl", [{**row, "id": f"b{i}"} for i, row in enumerate(pairs(30))])  # same prompts
    plain = load_mixture([first, second], eval_ratio=0.2, seed=3)
    weighted = load_mixture([first, second], eval_ratio=0.2, seed=3, weights=[3, 0.5])
    assert weighted.held_out == plain.held_out and len(plain.held_out) == 12
    assert not {row["prompt"] for row in weighted.train} & {row["prompt"] for row in weighted.held_out}
    assert [(file.distinct, file.rows) for file in weighted.files] == [(24, 72), (24, 12)]


def test_row_of_two_files_counts_for_the_first(tmp_path):
    first, second = write(tmp_path / "a.jsonl", pairs(3)), write(tmp_path / "b.jsonl", pairs(5))
    mixture = load_mixture([first, second], weights=[1, 2])
    assert Counter(row["id"] for row in mixture.train) == {"p0": 1, "p1": 1, "p2": 1, "p3": 2, "p4": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", r"1 weight\(s\) for 2 file"),
        ("1,2,3", r"3 weight\(s\) for 2 file"),
        ("1,twice", r"'twice' \(for b\.jsonl\) is not a number"),
        ("1,", "'' .*is not a number"),
        ("-1,1", r"-1 \(for a\.jsonl\) must be a finite number above 0"),
        ("1,0", "above 0; leave a file"),
        ("inf,1", "finite"),
        ("1,nan", "finite"),
    ],
)
def test_weights_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_weights(text, ["a.jsonl", "b.jsonl"])


def test_weight_that_leaves_nothing_of_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="0.01 of the 10 rows of .*a.jsonl is none"):
        load_mixture(write(tmp_path / "a.jsonl", pairs(10)), weights=[0.01])
