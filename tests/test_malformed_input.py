"""Every kind of malformed input, through a real stage: what is said names file, line, field and remedy.

A bad line costs its row and no other; a bad file or configuration is refused before anything is written.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from distiller.engine import Completion
from score import cali_score_vllm as cali

ROOT = Path(__file__).parents[1]
ROW = {
    "prompt": "Which metal is it?",
    "chosen": "It is iron.",
    "rejected": "It is green.",
    "teacher_response": "Iron.",
    "diagnosis": "A colour is no metal.",
    "refined_response": "It is iron.",
    "rejected_score": 3,
}
TURN = {"role": "user", "content": "Which metal is it?"}
REPLY = {"role": "assistant", "content": "It is iron."}
FORM = 'write a text, or [{"role": "user", "content": "..."}, ...]'


class Teacher:
    """Gives every edit an 8."""

    capacity = 2

    def __init__(self):
        self.asked = []

    def submit(self, key, ask):
        self.asked.append(key)

    def collect(self):
        keys, self.asked = self.asked, []
        return [(key, Completion("<score>8</score>", None, "stop", 1, 1, None)) for key in keys]

    def close(self):
        pass

    def facts(self):
        return {}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distiller.cli.make_engine", lambda args: Teacher())
    return tmp_path


def score(*flags: str) -> int:
    """The scoring stage on in.jsonl, greedy; its exit code."""
    prompts = ["--prompt_file", ROOT / "score/prompts/calibrate.txt"]
    prompts += ["--strength_prompt_file", ROOT / "score/prompts/strength.txt"]
    prompts += ["--refine_prompt_file", ROOT / "refine/prompts/refine.txt"]
    given = [] if "--config" in flags else ["--config", ROOT / "score/configs/paper.yaml"]
    given += [] if "--input" in flags else ["--input", "in.jsonl"]
    return cali.main(list(map(str, [*given, "--output", "out.jsonl", "--max_failure_rate", "1", *prompts, *flags])))


def line_of(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def without(name: str) -> dict:
    return {field: value for field, value in ROW.items() if field != name}


BAD_LINES = {
    "broken JSON": (b'{"prompt": "a", "chosen": }', "not valid JSON", "Expecting value at character 27"),
    "torn line": (b'{"prompt": "Which met', "not valid JSON", "one whole JSON object a line"),
    "two objects on a line": (b"{} {}", "not valid JSON", "Extra data at character 4"),
    "single quotes": (b"{'prompt': 'a'}", "not valid JSON", "double quotes"),
    "a list for an object": ([ROW], "not a JSON object", "not a list"),
    "a bare string": (b'"hello"', "not a JSON object", "not a string"),
    "NUL bytes": (b'{"prompt": "\x00\x00\x00"}', "has NUL bytes", "write the line again"),
    "a line of NULs": (b"\x00" * 300, "has NUL bytes", "the file was damaged"),
    "Latin-1": (b'{"prompt": "caf\xe9"}', "not valid UTF-8", "byte 16 of the line; save the file as UTF-8"),
    "nested too deep": (b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}", "not valid JSON", "nested more than 100 deep"),
    "endless brackets": (b"[" * 100_000, "not valid JSON", "one whole JSON object a line"),
    "a number of 5,000 digits": (b'{"margin": ' + b"9" * 5000 + b"}", "not valid JSON", "digits"),
    "lone surrogate": ({**ROW, "prompt": "half \ud83d"}, "`prompt` has a lone surrogate", "character 6"),
    "number for a text": ({**ROW, "chosen": 7}, "`chosen` must be a string or a list", FORM),
    "true for a text": ({**ROW, "rejected": True}, "`rejected` must be a string or a list", "not true or false"),
    "object for a text": ({**ROW, "prompt": {"text": "a"}}, "`prompt` must be a string or a list", "not an object"),
    "nested lists": ({**ROW, "prompt": [[TURN]]}, "`prompt` has a message without a role", FORM),
    "list of strings": ({**ROW, "prompt": ["a", "b"]}, "`prompt` has a message without a role", FORM),
    "number for a diagnosis": ({**ROW, "diagnosis": 1}, "`diagnosis` must be a string", "it is a number"),
    "empty prompt": ({**ROW, "prompt": ""}, "`prompt` is empty", "fill it in"),
    "blank response": ({**ROW, "rejected": " \n\t"}, "`rejected` is empty", "fill it in"),
    "no messages": ({**ROW, "prompt": []}, "`prompt` is empty", "fill it in"),
    "empty message": ({**ROW, "prompt": [{**TURN, "content": " "}]}, "`prompt` is empty", "fill it in"),
    "null content": (
        {**ROW, "prompt": [{**TURN, "content": None}]},
        "`prompt` has a message whose",
        "it is null: give a text",
    ),
    "an image among the parts": (
        {**ROW, "prompt": [{**TURN, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "`prompt` has a message whose content is not text",
        "it has parts of type image_url: give a text; images are not supported",
    ),
    "no parts": ({**ROW, "prompt": [{**TURN, "content": []}]}, "content is not text", "it is a list: give a text"),
    "unknown role": ({**ROW, "prompt": [{**TURN, "role": "narrator"}]}, "`prompt` has a message without a role", FORM),
    "other names": ({**ROW, "prompt": [{"speaker": "human", "text": "a"}]}, "`prompt` has a message without", FORM),
    "no user message": (
        {**ROW, "prompt": [{"role": "system", "content": "Be kind."}]},
        "`prompt` has no user message",
        "add the message",
    ),
    "system in the middle": (
        {**ROW, "prompt": [TURN, {"role": "system", "content": "Be kind."}, TURN]},
        "`prompt` has a system message that is not the first",
        "put it first",
    ),
    "tool message": (
        {**ROW, "prompt": [TURN, {"role": "tool", "content": "42"}]},
        "`prompt` has a tool message",
        "tool use is not supported",
    ),
    "answered prompt": ({**ROW, "prompt": [TURN, REPLY]}, "`prompt` ends with an assistant", "drop that message"),
    "response of two messages": (
        {**ROW, "chosen": [TURN, {**REPLY, "content": "Iron"}], "prompt": "Another?"},
        "`chosen` must be one assistant message",
        "turns before it belong in `prompt`",
    ),
    "response of a user": ({**ROW, "rejected": [TURN]}, "`rejected` must be one assistant message", "assistant"),
    "nothing in common": (
        {**without("prompt"), "chosen": [TURN, REPLY], "rejected": [{**TURN, "content": "Other?"}, REPLY]},
        "`chosen` and `rejected` have no prompt in common",
        "give the row a `prompt`",
    ),
    "missing field": (without("chosen"), "`chosen` is missing", "the row has `id`, `prompt`, `rejected`"),
    "missing field of a stage": (
        without("diagnosis"),
        "`diagnosis` is missing",
        "to get it, run: python refine/refine_response_vllm.py",
    ),
    "null field": ({**ROW, "rejected": None}, "`rejected` is null", "give it a value"),
    "id of another type": ({**ROW, "id": {"n": 1}}, "`id` must be a non-empty string or an integer", "an object"),
    "fraction as id": ({**ROW, "id": 1.5}, "`id` must be a non-empty string", "leave it out to have one made"),
    "empty id": ({**ROW, "id": ""}, "`id` must be a non-empty string", "leave it out to have one made"),
    "id twice": ({**ROW, "id": "first"}, "`id` came before", "an id of its own"),
    "score out of range": ({**ROW, "rejected_score": 11}, "`rejected_score` is outside [1, 10]", "it is 11"),
    "negative score": ({**ROW, "rejected_score": -0.5}, "`rejected_score` is outside [1, 10]", "bring it to that"),
    "score in words": ({**ROW, "rejected_score": "8"}, "`rejected_score` must be a number", "quotation marks"),
    "score as list": ({**ROW, "chosen_score": [8]}, "`chosen_score` must be a number, not a list", "leave it out"),
    "score beyond all numbers": (b'{"id": "m", "rejected_score": 1e999}', "is NaN or infinite", "write a number"),
    "score of 400 digits": ({**ROW, "chosen_score": 10**400}, "`chosen_score` is too large", "correct it"),
}
OF_THE_LINE = ("not valid", "not a JSON object", "has NUL bytes")  # such a line has no fields to name


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_costs_its_row_alone_and_is_told_with_file_line_field_and_remedy(place, capsys, kind):
    bad, reason, remedy = BAD_LINES[kind]
    bad = {"id": kind, **bad} if isinstance(bad, dict) else bad
    lines = [line_of({**ROW, "id": "first"}), b"", line_of(bad), line_of({**ROW, "id": "last"})]
    Path("in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert score() == 0
    (failed,) = rows_of("out.jsonl.failed.jsonl")
    assert (failed["file"], failed["line"]) == ("in.jsonl", 3)
    assert reason in failed["reason"] and remedy in f"{failed['reason']}; {failed['remedy']}" and failed["remedy"]
    assert "field" in failed["reason"] or failed["reason"].startswith(OF_THE_LINE)
    assert f"in.jsonl, line 3: {failed['reason']}; {failed['remedy']}" in capsys.readouterr().err
    assert [row["id"] for row in rows_of("out.jsonl")] == ["first", "last"]


def test_the_same_content_twice_without_id_counts_once(place):
    Path("in.jsonl").write_bytes(line_of(ROW) + b"\n" + line_of(ROW) + b"\n" + line_of({**ROW, "id": "a"}) + b"\n")
    assert score() == 0 and len(rows_of("out.jsonl")) == 2
    (failed,) = rows_of("out.jsonl.failed.jsonl")
    assert failed["line"] == 2 and "no `id`" in failed["reason"] and "give both an id" in failed["remedy"]


def test_what_only_looks_malformed_is_read(place):
    rows = [line_of({**ROW, "id": n}) for n in range(3)]
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n   \n".join(rows))
    assert score() == 0 and len(rows_of("out.jsonl")) == 3
    in_form = {**ROW, "prompt": [{"role": "system", "content": ""}, TURN, REPLY, TURN], "chosen": [REPLY]}
    Path("array.json").write_text(json.dumps([in_form, {**ROW, "id": "\u0000 \u2028 \ud800"}], indent=1))
    assert score("--input", "array.json", "--overwrite") == 0 and len(rows_of("out.jsonl")) == 2


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", line_of(ROW))


GOOD = b"".join(line_of({**ROW, "id": n}) + b"\n" for n in range(5))
ARRAY = json.dumps([ROW] * 3, indent=1).encode()
BAD_FILES = {
    "missing": (None, "in.jsonl does not exist; to make it, run: python refine/refine_response_vllm.py"),
    "directory": (Path.mkdir, "in.jsonl is a directory, and the datasets library finds no train data in it"),
    "empty": (b"", "in.jsonl has no rows; where a command of this repository wrote it, in.jsonl.failed.jsonl"),
    "blank": (b"\n \n\r\n", "in.jsonl has no rows"),
    "empty array": (b"[]", "in.jsonl has no rows"),
    "array cut off": (ARRAY[: len(ARRAY) // 2], "in.jsonl, line 15, column 3: not a whole JSON array"),
    "array cut off on one line": (json.dumps([ROW, ROW]).encode()[:-40], "in.jsonl, line 1, column "),
    "one object over many lines": (json.dumps(ROW, indent=1).encode(), "in.jsonl, line 1: not valid JSON"),
    "CSV": (b"prompt,chosen,rejected\na,b,c\nd,e,f\n", "in.jsonl, line 1: not valid JSON"),
    "gzip cut off": (gzip.compress(GOOD)[:-9], "in.jsonl is damaged ("),
    "gzip of something else": (gzip.compress(b"\xff\xfea"), "in.jsonl is UTF-16 text, not JSONL: save it as UTF-8"),
    "bzip2 cut off": (bz2.compress(GOOD)[:-9], "in.jsonl is damaged ("),
    "xz cut off": (lzma.compress(GOOD)[:-9], "in.jsonl is damaged ("),
    "zip": (zipped, "in.jsonl is a ZIP archive, not JSONL: unpack it"),
    "Parquet cut off": (b"PAR1" + b"x" * 90, "in.jsonl is damaged, or no table ("),
    "UTF-16": (GOOD.decode().encode("utf-16"), "in.jsonl is UTF-16 text, not JSONL: save it as UTF-8"),
    "rows of another command": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "b", "chosen": "b", "rejected": "c"}\n',
        "in.jsonl, line 1: field `teacher_response` is missing; to get it, run: python refine/refine_response_vllm.py",
    ),
    "scores of another scale": (
        b"".join(line_of({**ROW, "id": n, "rejected_score": 60 + n}) + b"\n" for n in range(5)),
        "in.jsonl, line 1: field `rejected_score` is outside [1, 10]; it is 60: bring it to that scale",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_whole_and_nothing_is_written(place, capsys, kind):
    content, message = BAD_FILES[kind]
    if isinstance(content, bytes):
        Path("in.jsonl").write_bytes(content)
    elif content:
        content(Path("in.jsonl"))
    assert score() == 1
    assert message in capsys.readouterr().err
    assert not list(place.glob("out*"))


def test_a_parquet_file_alone_in_a_directory_is_read(place, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    Path("set").mkdir()
    parquet(Path("set/rows.parquet"))
    assert score("--input", "set") == 0
    assert [row["prompt"] for row in rows_of("out.jsonl")] == [ROW["prompt"]]


BAD_FLAGS = {
    "columns that map nothing": (
        ["--columns", "prompt=prompt,margin=scroe"],
        "in.jsonl, lines 1 to 5: no row has a field `scroe`; correct --columns margin=scroe, or leave it out",
    ),
    "a needed column that is not there": (
        ["--columns", "prompt=instructoin"],
        "in.jsonl, lines 1 to 5: no row has a field `instructoin`; correct --columns prompt=instructoin",
    ),
    "columns without a name": (["--columns", "prompt"], "--columns wants ours=theirs"),
    "columns twice": (["--columns", "prompt=a,prompt=b"], "--columns names `prompt` twice"),
    "a hard link to the input": (["--output", "hard.jsonl", "--overwrite"], "(hard.jsonl is in.jsonl)"),
    "a link to its directory": (["--output", "here/in.jsonl", "--overwrite"], "(here/in.jsonl is in.jsonl)"),
    "a failed file that is a link to it": (["--output", "h"], "(h.failed.jsonl is in.jsonl)"),
    "an output in a directory that is read": (
        ["--input", "set", "--output", "set/out.jsonl"],
        "is in set, which is read",
    ),
    "standard input": (["--input", "-"], "- is a pipe or a device, and rows are read more than once"),
    "an input that is a file on the way": (["--input", "out.jsonl.new"], "would write over an input (out.jsonl.new)"),
    "a server without an address": (["--base_url", ""], "--base_url is empty"),
    "standard output": (["--output", "-"], "--output - is no file: rows are written to it and to files beside it"),
    "a device": (["--output", "/dev/null"], "--output /dev/null is no file"),
    "a pipe": (["--input", "pipe"], "pipe is a pipe or a device, and rows are read more than once"),
    "unknown field to leave out": (["--leave_out", "top_k"], "only temperature, top_p and seed can be left out"),
    "no name of a tag": (["--thinking_tags", "<>"], "--thinking_tags '<>': give the name of a tag"),
    "output equal input": (["--output", "in.jsonl"], "--output in.jsonl would write over an input"),
    "output that is a directory": (["--output", "."], "--output . is a directory: name a file in it"),
    "output whose failed file is the input": (
        ["--input", "o.failed.jsonl", "--output", "o"],
        "--output o would write over an input (o.failed.jsonl)",
    ),
    "value out of range": (["--top_p", "1.5"], "--top_p 1.5 is out of range (from 1e-09 to 1)"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_request_that_cannot_be_met_is_refused_and_nothing_is_written(place, capsys, kind):
    flags, message = BAD_FLAGS[kind]
    for name in ("in.jsonl", "o.failed.jsonl"):
        Path(name).write_bytes(b"".join(line_of({"id": n, **ROW}) + b"\n" for n in range(5)))
    for name in ("hard.jsonl", "h.failed.jsonl"):
        Path(name).hardlink_to("in.jsonl")
    Path("here").symlink_to(".")
    Path("set").mkdir()
    (Path("set") / "rows.jsonl").write_bytes(line_of(ROW) + b"\n")
    os.mkfifo("pipe")
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert score(*flags) == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == before


BAD_YAML = {
    "unknown key": ("seed: 1\ntemprature: 1", "c.yaml, line 2: unknown key `temprature`, did you mean `temperature`?"),
    "word for a number": ("\n\nmax_tokens: many", "c.yaml, line 3: argument --max_tokens/--max-tokens: invalid int"),
    "fraction for an integer": ("seed: 1.5", "c.yaml, line 1: argument --seed: invalid int value: '1.5'"),
    "word for a switch": ("overwrite: maybe", "c.yaml, line 1: argument --overwrite: Truthy value expected"),
    "list for one value": ("input: [a, b]", "c.yaml, line 1: argument --input: takes one value, not a list"),
    "mapping for one value": ("model: {a: b}", "c.yaml, line 1: argument --model: takes one value, not a mapping"),
    "unknown choice": ("score_mode: guess", "c.yaml, line 1: argument --score_mode/--score-mode: invalid choice"),
    "no mapping": ("- seed\n- 1", "c.yaml: must be a mapping of names to values"),
    "broken YAML": ("seed: [1", "c.yaml: cannot be read: while parsing a flow sequence"),
    "not UTF-8": (b"model: caf\xe9", "c.yaml: cannot be read: 'utf-8' codec can't decode byte"),
    "missing": (None, "c.yaml: cannot be read: [Errno 2] No such file or directory: 'c.yaml'"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_a_bad_configuration_is_refused_with_file_line_and_key(place, capsys, kind):
    content, message = BAD_YAML[kind]
    if content is not None:
        Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stopped:
        score("--config", "c.yaml")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "--help lists all arguments" in said
