import json

import pytest

from distiller.records import (
    BadRow,
    InputError,
    dump_line,
    parse_columns,
    prompt_messages,
    read_rows,
    response_text,
    row_id,
    survey,
)

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(path, *lines):
    """Each line a dict, a str or bytes; nothing is added but the newline."""
    data = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def good_and_bad(path, **options):
    rows = list(read_rows(path, **options))
    return [r for r in rows if not isinstance(r, BadRow)], [r for r in rows if isinstance(r, BadRow)]


def test_unknown_fields_travel_untouched_and_an_id_is_kept(tmp_path):
    row = {"id": "a", **PAIR, "extra": {"x": [1, None, "é\u2028"]}, "big": 12345678901234567890, "f": 0.1}
    assert list(read_rows(write(tmp_path / "f.jsonl", row))) == [row]


def test_a_row_without_id_gets_one_from_its_content_alone(tmp_path):
    (first,) = read_rows(write(tmp_path / "f.jsonl", {**PAIR, "note": 1}))
    (second,) = read_rows(write(tmp_path / "g.jsonl", {"note": 2, **dict(reversed(PAIR.items()))}))
    assert first["id"] == second["id"] == row_id(PAIR)
    assert len(first["id"]) == 16
    assert row_id({**PAIR, "model": "m"}) != first["id"]


def test_an_int_id_becomes_its_string_and_other_ids_are_bad(tmp_path):
    lines = [{"id": 7, **PAIR}, {"id": "", **PAIR}, {"id": 1.5, **PAIR}, {"id": True, **PAIR}]
    good, bad = good_and_bad(write(tmp_path / "f.jsonl", *lines))
    assert [row["id"] for row in good] == ["7"]
    assert [row.id for row in bad] == ["line-2", "line-3", "line-4"]
    assert all("`id`" in row.reason for row in bad)


def test_each_bad_line_harms_only_itself_and_says_where_and_why(tmp_path):
    path = write(
        tmp_path / "f.jsonl",
        {"id": "ok", **PAIR, "rejected_score": 3},
        "{broken",
        b'{"prompt": "\xff"}',
        "[1, 2]",
        '{"id": "nan", "prompt": "p", "rejected": "r", "rejected_score": NaN}',
        '{"id": "inf", "prompt": "p", "rejected": "r", "rejected_score": 1e999}',
        {"id": "missing", "prompt": "p"},
        {"id": "null", "prompt": "p", "rejected": None},
        {"id": "empty", "prompt": "p", "rejected": " \n"},
        {"id": "type", "prompt": "p", "rejected": 3},
        {"id": "score", "prompt": "p", "rejected": "r", "rejected_score": "8"},
        {"id": "bool", "prompt": "p", "rejected": "r", "rejected_score": True},
        {"id": "surrogate", "prompt": "p", "rejected": "r \ud800"},
        "[" * 100_000,
        {"id": "last", **PAIR},
    )
    good, bad = good_and_bad(path, required={"prompt": "", "rejected": "python make.py"}, optional=("rejected_score",))
    assert [row["id"] for row in good] == ["ok", "nan", "last"]
    assert good[1]["rejected_score"] is None  # as pandas writes what is missing
    said = {row.id: row.reason for row in bad}
    assert said["line-2"] == "not valid JSON"
    assert said["line-3"] == "not valid UTF-8"
    assert said["line-4"] == "not a JSON object"
    assert said["inf"] == "field `rejected_score` is NaN or infinite"
    assert said["missing"] == "field `rejected` is missing" and said["null"] == "field `rejected` is null"
    assert said["empty"] == "field `rejected` is empty"
    assert "list of messages, not a number" in said["type"]
    assert said["score"] == "field `rejected_score` must be a number, not a string"
    assert said["bool"] == "field `rejected_score` must be a number, not true or false"
    assert "surrogate" in said["surrogate"]
    assert said["line-14"] == "not valid JSON"
    assert len(bad) == 12
    missing = next(row for row in bad if row.id == "missing")
    assert f"{path}, line 7: field `rejected` is missing" in str(missing)
    assert "python make.py" in str(missing)
    assert json.loads(missing.raw)["id"] == "missing"


def test_of_two_rows_with_one_id_the_first_keeps_it(tmp_path):
    lines = [{"id": "a", **PAIR}, {"id": "a", **PAIR, "chosen": "other"}, {"id": "a", **PAIR}, {"id": "a#2", **PAIR}]
    good, bad = good_and_bad(write(tmp_path / "f.jsonl", *lines))
    assert [(row["id"], row["chosen"]) for row in good] == [("a", "c")]
    assert [row.id for row in bad] == ["a#2", "a#3", "a#2#4"]


def test_the_same_content_twice_without_id_is_a_duplicate(tmp_path):
    good, bad = good_and_bad(write(tmp_path / "f.jsonl", PAIR, PAIR))
    assert (len(good), [row.line for row in bad]) == (1, [2])


def test_byte_order_mark_crlf_and_blank_lines_are_no_trouble(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}\r\n{"prompt": "c"}')
    assert [row["prompt"] for row in read_rows(path)] == ["a", "b", "c"]
    assert survey(path)[0] == 3


def test_a_line_is_counted_as_an_editor_counts_it(tmp_path):
    path = write(tmp_path / "f.jsonl", {"prompt": "with \u2028 inside"}, "", "{", PAIR)
    _, (bad,) = good_and_bad(path)
    assert bad.line == 3


def test_a_json_array_is_read_like_lines(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([PAIR, 3, {**PAIR, "chosen": float("nan")}], indent=1))
    good, bad = good_and_bad(path, required={"chosen": ""})
    assert [row["chosen"] for row in good] == ["c"]
    assert [(row.line, row.reason) for row in bad] == [
        (2, "not a JSON object"),
        (3, "field `chosen` is null"),
    ]


def test_a_file_that_does_not_fit_at_all_is_refused_as_a_whole(tmp_path):
    path = write(tmp_path / "f.jsonl", *({"id": str(n), "prompt": "p"} for n in range(5)))
    with pytest.raises(InputError, match=r"line 1: field `rejected` is missing; to get it, run: python refine\.py"):
        list(read_rows(path, required={"rejected": "python refine.py"}))
    with pytest.raises(InputError, match="no rows"):
        list(read_rows(write(tmp_path / "empty.jsonl")))
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        list(read_rows(tmp_path / "nowhere.jsonl"))


def test_strict_reading_raises_at_the_first_bad_row(tmp_path):
    path = write(tmp_path / "f.jsonl", PAIR, "{", PAIR)
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        list(read_rows(path, strict=True))


def test_rows_that_differ_in_any_of_their_texts_have_ids_of_their_own(tmp_path):
    talk = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in "ab"]
    rows = [{"messages": talk[0]}, {"messages": talk[1]}]
    rows += [{"prompt": "q", "responses": ["a"]}, {"prompt": "q", "responses": ["b"]}]
    rows += [{"prompt": "q", "teacher_response": "a"}, {"prompt": "q", "teacher_response": "b"}, {"prompt": "q"}]
    good, bad = good_and_bad(write(tmp_path / "f.jsonl", *rows, rows[1]))
    assert len({row["id"] for row in good}) == len(rows) and len(bad) == 1


def test_limit_takes_the_first_rows(tmp_path):
    path = write(tmp_path / "f.jsonl", *({**PAIR, "id": str(n)} for n in range(9)))
    assert [row["id"] for row in read_rows(path, limit=3)] == ["0", "1", "2"]


def test_columns_are_renamed_at_once_and_a_missing_one_is_named(tmp_path):
    path = write(
        tmp_path / "f.jsonl", {"id": "a", "instruction": "i", "chosen": "x", "rejected": "y"}, {**PAIR, "id": "b"}
    )
    columns = parse_columns("prompt=instruction, chosen=rejected,rejected=chosen")
    (row, other) = read_rows(path, columns)
    assert row == {"id": "a", "prompt": "i", "chosen": "y", "rejected": "x"}
    assert other["prompt"] == "p"
    _, (bad,) = good_and_bad(path, columns={"response": "instruction"}, required={"response": ""})
    assert bad.reason == "field `response` (column `instruction`) is missing"
    with pytest.raises(InputError, match="the row has `id`, `chosen`, `rejected`, `instruction`:"):  # as in the file
        list(read_rows(path, {"prompt": "instruction"}, required={"response": ""}))
    with pytest.raises(InputError, match="ours=theirs"):
        parse_columns("prompt")


def test_an_implicit_prompt_is_the_longest_common_beginning(tmp_path):
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    (row,) = read_rows(write(tmp_path / "f.jsonl", {"chosen": talk + answers[0], "rejected": talk + answers[1]}))
    assert (row["prompt"], row["chosen"], row["rejected"]) == (talk, *answers)
    (row,) = read_rows(write(tmp_path / "g.jsonl", {"chosen": talk + answers[0], "rejected": talk + answers[0]}))
    assert (row["prompt"], row["chosen"]) == (talk, answers[0])
    lines = [
        {"prompt": "u", "chosen": talk[:2], "rejected": talk[:2]},
        {"chosen": talk + answers[0], "rejected": talk[1:]},
    ]
    lines += [{"prompt": "other", "chosen": talk[:2], "rejected": "r"}, {"chosen": [{}, {}], "rejected": "r"}]
    lines += [{"chosen": talk + answers[0], "rejected": talk[:2]}]
    path = write(tmp_path / "h.jsonl", *lines)
    (row,), (apart, other, broken, uneven) = good_and_bad(path, optional=("chosen", "rejected"))
    assert (row["prompt"], row["chosen"]) == ("u", talk[1:2])
    assert "in common" in apart.reason
    assert other.reason == "field `chosen` must be one assistant message"
    assert uneven.reason == "fields `chosen` and `rejected` part before the last turn"
    assert broken.reason.startswith("field `chosen` has a message without a role")
    assert {**lines[2], "id": other.id} in list(read_rows(path))  # untouched for who does not need it


def test_prompts_and_responses_are_taken_in_both_forms():
    assert prompt_messages("hi") == [{"role": "user", "content": "hi"}]
    talk = [{"role": "system", "content": "", "name": "n"}, {"role": "user", "content": "u"}]
    assert prompt_messages(talk) == [{"role": "system", "content": ""}, {"role": "user", "content": "u"}]
    assert response_text([{"role": "assistant", "content": "a"}]) == "a"
    wrong = (
        None,
        [],
        "",
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
    )
    for prompt in wrong:
        with pytest.raises(InputError):
            prompt_messages(prompt)
    for response in (None, [], " ", 3, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": ""}]):
        with pytest.raises(InputError):
            response_text(response)


def test_a_written_line_is_json_and_utf8_or_is_refused():
    assert dump_line({"a": "é"}) == '{"a": "é"}\n'.encode()
    assert json.loads(dump_line({"a": "\ud800\n"})) == {"a": "\ud800\n"}
    with pytest.raises(ValueError, match="JSON"):
        dump_line({"a": float("nan")})


def test_what_is_no_file_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "test.jsonl", {**PAIR, "id": "x"}, {**PAIR, "id": "y"})
    assert [row["id"] for row in read_rows(f"{folder}:test")] == ["x", "y"]
    with pytest.raises(InputError, match="finds no nosplit data in it"):
        list(read_rows(f"{folder}:nosplit"))


def test_a_key_that_is_there_twice_is_told(tmp_path):
    path = write(tmp_path / "f.jsonl", '{"id": "a", "prompt": "p", "prompt": "q"}', '{"id": "b", "prompt": "p"}')
    (good,), (bad,) = good_and_bad(path, required={"prompt": ""})
    assert good["id"] == "b" and bad.reason == "has a key twice in one object" and "`prompt`" in bad.remedy
    nested = '{"id": "c", "prompt": [{"role": "user", "content": "a", "content": "b"}]}'
    _, (bad,) = good_and_bad(
        write(tmp_path / "g.jsonl", nested, '{"id": "b", "prompt": "p"}'), required={"prompt": ""}
    )
    assert "`content`" in bad.remedy


def test_a_byte_order_mark_in_the_middle_of_joined_files_is_no_part_of_a_row(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a"}\n\xef\xbb\xbf{"id": "b"}\n')
    assert [row["id"] for row in read_rows(tmp_path / "f.jsonl")] == ["a", "b"]


def test_a_developers_message_is_named_with_what_to_write(tmp_path):
    path = write(tmp_path / "f.jsonl", {"id": "a", "prompt": [{"role": "developer", "content": "x"}]}, PAIR)
    _, (bad,) = good_and_bad(path, required={"prompt": ""})
    assert bad.reason == "field `prompt` has a developer message" and '"system"' in bad.remedy


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"images": ["a.png"]}, "field `images` is not passed on"),
        ({"tools": [{"name": "f"}]}, "field `tools` is not passed on"),
        (
            {"prompt": [{"role": "user", "content": "x", "tool_calls": [{"id": 1}]}]},
            "field `prompt` has tool calls",
        ),
    ],
)
def test_what_would_be_dropped_without_a_word_is_refused(tmp_path, more, reason):
    empty = {"id": "e", **PAIR, "images": [], "tools": None}
    (good,), (bad,) = good_and_bad(write(tmp_path / "f.jsonl", {**PAIR, **more}, empty), required={"prompt": ""})
    assert good["id"] == "e" and bad.reason == reason
