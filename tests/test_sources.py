"""Files as other people have them: every form gives the rows that JSON lines would."""

import bz2
import csv
import gzip
import json
import lzma
import pickle
import tarfile
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from distiller.fields import check_field
from distiller.records import BadRow, InputError, prompt_messages, read_rows, response_text
from distiller.sources import lines, values

ROWS = [
    {"id": f"r{n}", "prompt": f'Who, {n}?\n"Quoted"', "chosen": "ä, \t;", "rejected": "no\r\nyes", "margin": n / 4}
    for n in range(5)
]
MESSAGES = [{"role": "user", "content": "hi"}]


def jsonl(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_csv(path: Path, rows=ROWS, opened=open) -> None:
    delimiter = "\t" if ".tsv" in path.name else ","
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, form) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with form(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=2)


FORMS = {
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "named-otherwise": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS}, indent=1)),
    "train.json": lambda path: path.write_text(json.dumps({"version": 2, "rows": ROWS})),
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.csv.gz": lambda path: write_csv(path, opened=gzip.open),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved-dict": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_rows_of_json_lines(tmp_path, name):
    FORMS[name](tmp_path / name)
    required = dict.fromkeys(("prompt", "chosen", "rejected", "margin"), "")
    assert list(read_rows(tmp_path / name, required=required)) == ROWS


def test_a_split_of_a_saved_dataset_is_named_behind_a_colon(tmp_path):
    FORMS["saved-dict"](tmp_path / "set")
    assert list(read_rows(f"{tmp_path}/set:test")) == ROWS[:1]
    with pytest.raises(InputError, match="has no split dev; it has train, test"):
        list(read_rows(f"{tmp_path}/set:dev"))


def test_configurations_of_a_hub_dataset_are_named_before_the_split(monkeypatch):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:test", "owner/name:default:test"):
        assert list(read_rows(source)) == ROWS
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", None, "test"),
        ("owner/name", "default", "test"),
    ]
    with pytest.raises(InputError, match="owner/name:config:split"):
        list(read_rows("owner/name:a:b:c"))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_a_missing_file_is_not_looked_for_on_the_hub(ending):
    with pytest.raises(InputError, match="does not exist"):
        list(read_rows(f"folder/none.{ending}"))


def test_several_lists_in_one_object_are_not_chosen_between(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(InputError, match="`prompt` is missing; the row has `train`, `test`"):
        list(read_rows(tmp_path / "f.json", required={"prompt": ""}))
    (tmp_path / "f.json").write_text(json.dumps(ROWS[0], indent=1))  # one row over many lines
    assert list(read_rows(tmp_path / "f.json")) == ROWS[:1]


def test_cells_hold_numbers_messages_and_nothing(tmp_path):
    cells = {"id": "1", "prompt": json.dumps(MESSAGES), "chosen": "a", "rejected": "b", "margin": "", "note": "3"}
    write_csv(tmp_path / "f.csv", [cells, cells | {"id": "2", "margin": "-0.5"}])
    first, second = read_rows(tmp_path / "f.csv", optional=("prompt", "margin"))
    assert first["prompt"] == MESSAGES and first["margin"] is None and first["note"] == "3"
    assert second["margin"] == -0.5
    write_csv(tmp_path / "g.csv", [cells | {"margin": "1,5"}, cells | {"id": "2", "prompt": str(MESSAGES)}])
    number, python = read_rows(tmp_path / "g.csv", optional=("margin",))
    assert isinstance(number, BadRow) and number.reason == "field `margin` must be a number, not a string"
    assert "'1,5'" in number.remedy and number.line == 2
    assert isinstance(python, BadRow) and "save messages as JSON" in python.remedy
    (tmp_path / "h.csv").write_text("prompt,chosen\na,b,c\n")
    with pytest.raises(InputError, match=r"h\.csv, line 2: more cells"):
        list(read_rows(tmp_path / "h.csv"))
    (tmp_path / "h.csv").write_bytes(b"prompt,chosen\na,\xff\n")
    with pytest.raises(InputError, match=r"h\.csv, line .: no CSV"):
        list(read_rows(tmp_path / "h.csv"))


def test_what_pandas_writes_for_a_gap_is_read(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(
        jsonl([{"id": 7.0, "prompt": "p", "margin": 1.0, "other": float("nan"), "deep": {"a": [1.0, float("-inf")]}}])
    )
    (row,) = read_rows(path, required={"prompt": ""}, optional=("margin",))
    assert row == {"id": "7", "prompt": "p", "margin": 1.0, "other": None, "deep": {"a": [1.0, None]}}
    path.write_bytes(jsonl([{"id": 7.5, "prompt": "p"}, {"id": 1, "prompt": "p", "margin": float("nan")}]))
    half, gap = read_rows(path, optional=("margin",))
    assert "field `id` must be" in half.reason and gap["margin"] is None
    half, gap = read_rows(path, required={"margin": ""})
    assert gap.reason == "field `margin` is NaN or infinite"
    write_csv(tmp_path / "f.csv", [{"prompt": "p", "margin": "nan"}, {"prompt": "q", "margin": "inf"}])
    gap, infinite = read_rows(tmp_path / "f.csv", optional=("margin",))
    assert gap["margin"] is None and infinite.reason == "field `margin` is NaN or infinite"
    assert [row["margin"] for row in read_rows(tmp_path / "f.csv", required={"prompt": ""})] == [None, None]


def test_cells_that_nobody_reads_as_numbers_or_messages_stay_text(tmp_path):
    cells = {"id": "1", "prompt": '[{"a": 1}] as YAML, please', "chosen": '[{"name": "Bob"}]', "margin": "large"}
    cells |= {"rejected": "[{'a': 1}]"}
    write_csv(tmp_path / "F.CSV", [cells])
    assert list(read_rows(tmp_path / "F.CSV", required={"prompt": "", "chosen": ""})) == [cells]
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder/f.csv", [cells | {"prompt": f" {json.dumps(MESSAGES, indent=1)}"}])
    for source in (tmp_path / "folder", f"{tmp_path}/folder:train"):
        (row,) = read_rows(source, required={"prompt": ""})
        assert row["prompt"] == MESSAGES
    table = pyarrow.Table.from_pylist([{"prompt": json.dumps(MESSAGES), "margin": "1.5"}])
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    (row,) = read_rows(tmp_path / "f.parquet", required={"prompt": ""}, optional=("margin",))
    assert row["prompt"] == MESSAGES and row["margin"] == 1.5
    (tmp_path / "f.jsonl").write_bytes(jsonl([{"id": "1", "prompt": json.dumps(MESSAGES)}]))
    assert next(iter(read_rows(tmp_path / "f.jsonl")))["prompt"] == json.dumps(MESSAGES)  # JSON has lists of its own


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.csv", "prompt,chosen,chosen\np,a,b\n", "f.csv, line 1: the column `chosen` is there twice"),
        (
            "f.json",
            '[{"prompt": "p", "chosen": "a", "chosen": "b"}]',
            "f.json: an object in it has the key `chosen` twice",
        ),
        ("g.json", '{"data": [{"prompt": "p",\n"chosen": "a", "chosen": "b"}]}', "has the key `chosen` twice"),
        ("f.jsonl", '{"prompt": "p", "chosen": "a", "chosen": "b"}\n', "has a key twice in one object; `chosen`"),
    ],
)
def test_what_stands_in_a_row_twice_is_not_chosen_between(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        list(read_rows(tmp_path / name, required={"prompt": ""}, strict=True))


def test_what_rows_stand_in_is_named_where_they_cannot_be_read(tmp_path):
    chat = [{"role": "user", "content": "q"}]
    for content, said in (
        ({"data": ROWS}, "if rows stand in `data`, write them one a line"),
        ({"train": ROWS, "test": ROWS}, "if rows stand in `train`, write them one a line"),
        ({"chosen": "H: q\n\nA: a", "rejected": "H: q\n\nA: b"}, "write the whole conversations as messages"),
        ({"conversation": chat, "chosen": "a"}, "rename one of them"),
    ):
        (tmp_path / "f.jsonl").write_text(json.dumps(content) + "\n")
        with pytest.raises(InputError, match=f"line 1: field `prompt` is missing; .*{said}"):
            list(read_rows(tmp_path / "f.jsonl", required={"prompt": ""}))
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(ROWS))
    with pytest.raises(InputError, match="rows.pkl is a pickle, not JSONL: save it as"):
        list(read_rows(tmp_path / "rows.pkl"))
    (tmp_path / "f.jsonl").write_bytes(jsonl())
    with tarfile.open(tmp_path / "f.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "f.jsonl", "f.jsonl")
    with pytest.raises(InputError, match="f.tar.gz is a tar archive, not JSONL: unpack it"):
        list(read_rows(tmp_path / "f.tar.gz"))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "stream")
    assert list(read_rows(tmp_path / "stream")) == ROWS


def test_sharegpts_names_of_roles_are_read(tmp_path):
    turns = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "q"}]
    row = {
        "id": "1",
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    (tmp_path / "f.jsonl").write_bytes(jsonl([row]))
    needs = dict.fromkeys(("prompt", "chosen", "rejected"), "")
    (read,) = read_rows(tmp_path / "f.jsonl", {"prompt": "conversations"}, required=needs)
    assert prompt_messages(read["prompt"]) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "q"},
    ]
    assert (response_text(read["chosen"]), response_text(read["rejected"])) == ("a", "b")


def test_one_table_has_the_same_ids_in_every_form(tmp_path):
    rows = [{"id": 39.0, "prompt": "p"}, {"id": 40.0, "prompt": "q"}]
    write_csv(tmp_path / "f.csv", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    for name in ("f.csv", "f.parquet"):
        assert [row["id"] for row in read_rows(tmp_path / name)] == ["39", "40"]


def test_what_only_looks_like_something_else_is_read(tmp_path):
    (tmp_path / "f.csv").write_text("prompt,chosen,,\np,a,,\n")  # as spreadsheets write it
    assert next(iter(read_rows(tmp_path / "f.csv")))["chosen"] == "a"
    rows = [{"id": "1", "prompt": "x" * (257 - len('{"id": "1", "prompt": "')) + "ustard"}]
    (tmp_path / "f.jsonl").write_bytes(jsonl(rows))
    assert jsonl(rows)[257:262] == b"ustar" and list(read_rows(tmp_path / "f.jsonl")) == rows
    (tmp_path / "g.jsonl").write_bytes(jsonl([{"prompt": [{"from": ["human"], "value": "x"}]}, rows[0]]))
    row, _ = read_rows(tmp_path / "g.jsonl", optional=("prompt",))
    assert isinstance(row, BadRow) and "has a message without a role" in row.reason


def test_a_directory_that_is_no_dataset_is_named(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match="is a directory, and the datasets library finds no train data in it"):
        list(read_rows(tmp_path))


def test_columns_of_bytes_are_text_and_decimals_are_numbers(tmp_path):
    row = {"prompt": "Was heißt ‘warum’?".encode(), "margin": Decimal("1.5"), "image": b"\x89PNG\xff"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "f.parquet")
    (read,) = read_rows(tmp_path / "f.parquet", required={"prompt": "", "margin": ""})
    assert (read["prompt"], read["margin"], read["image"]) == ("Was heißt ‘warum’?", 1.5, None)


def test_a_json_file_is_one_object_or_an_object_a_line(tmp_path, monkeypatch):
    single = {"messages": MESSAGES, "response": "a"}
    for row in (single, {"conversation": [{"from": "human", "value": "q"}], "better": "b"}, {"messages": MESSAGES}):
        (tmp_path / "f.json").write_text(json.dumps(row))
        (read,) = read_rows(tmp_path / "f.json")
        assert {name: read[name] for name in row} == row
    for packed in (gzip, bz2, lzma):
        (tmp_path / "p.json").write_bytes(packed.compress(json.dumps({"version": "1", "data": ROWS}).encode()))
        assert list(read_rows(tmp_path / "p.json")) == ROWS == [value for _, value in values(f"{tmp_path}/p.json")]
    (tmp_path / "v.json").write_text(json.dumps({"a": [1, 2], "b": [3]}))
    assert [value for _, value in values(f"{tmp_path}/v.json")] == [1, 2, 3]
    (tmp_path / "lines.json").write_bytes(jsonl())
    asked = []
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads, **_: asked.append(len(text)) or loads(text))
    assert len(list(lines(f"{tmp_path}/lines.json"))) == len(ROWS)
    assert asked == [len(jsonl(ROWS[:1]))]  # the rest is not read whole


def test_damaged_files_and_datasets_that_need_a_script_are_named(tmp_path):
    (tmp_path / "f.jsonl.bz2").write_bytes(bz2.compress(jsonl())[:20] + b"nothing of the kind")
    with pytest.raises(InputError, match=r"f\.jsonl\.bz2 is damaged"):
        list(read_rows(tmp_path / "f.jsonl.bz2"))
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted/scripted.py").write_text("")
    with pytest.raises(InputError, match="is a directory, and the datasets library finds no train data in it"):
        list(read_rows(tmp_path / "scripted"))
    FORMS["saved"](tmp_path / "saved")
    with pytest.raises(InputError, match="saved:test has no split test; it has train: name one as .*/saved:train"):
        list(read_rows(f"{tmp_path}/saved:test"))
    with pytest.raises(InputError, match=r"parts of type \['text'\]"):
        check_field("prompt", [{"role": "user", "content": [{"type": ["text"]}]}], None)


def test_dialogues_as_text_become_turns(tmp_path):
    begin = "\n\nHuman: Hi. Human: is a word.\n\nAssistant: Hello!\n\nHuman: How far is the moon?\n\nAssistant:"
    path = tmp_path / "f.jsonl"
    prompt = [
        {"role": "user", "content": "Hi. Human: is a word."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How far is the moon?"},
    ]
    rows = [
        {"id": "a", "chosen": f"{begin} Far.\n\nVery far.", "rejected": f"{begin} Near."},
        {"id": "b", "prompt": begin, "chosen": "Far.", "rejected": "Near."},
        {"id": "c", "prompt": "Human: what?", "chosen": "Human: a", "rejected": "b"},
        {"id": "d", "chosen": f"{begin} Far.", "rejected": "\n\nHuman: Hi. Human: is a word.\n\nAssistant: Bye."},
        {"id": "e", "prompt": begin, "chosen": f"{begin} Far.", "rejected": f"{begin} Near."},
        {"id": "f", "prompt": begin.removesuffix("\n\nAssistant:"), "chosen": "Far.", "rejected": "Near."},
        {"id": "g", "prompt": "Write a dialogue.", "chosen": f"{begin} Far.", "rejected": "No."},
    ]
    path.write_bytes(jsonl(rows))
    first, second, third, apart, beside, asks, written = read_rows(
        path, required=dict.fromkeys(("prompt", "chosen", "rejected"), "")
    )
    assert first["prompt"] == second["prompt"] == prompt
    assert first["chosen"] == [{"role": "assistant", "content": "Far.\n\nVery far."}]
    assert first["rejected"] == [{"role": "assistant", "content": "Near."}] and second["chosen"] == "Far."
    assert third == rows[2] and written == rows[6]
    assert beside == first | {"id": "e", "chosen": [{"role": "assistant", "content": "Far."}]}
    assert asks == second | {"id": "f"}
    assert apart.reason == "fields `chosen` and `rejected` part before the last turn"


def test_content_parts_of_text_are_their_text(tmp_path):
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "far?"}]
    path = tmp_path / "f.jsonl"
    row = {"id": "a", "prompt": [{"role": "user", "content": parts}]}
    row["chosen"] = [{"role": "assistant", "content": parts}]
    path.write_bytes(jsonl([row]))
    (row,) = read_rows(path, required={"prompt": "", "chosen": ""})
    assert prompt_messages(row["prompt"]) == [{"role": "user", "content": "How far?"}]
    assert response_text(row["chosen"]) == "How far?"


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path):
    (tmp_path / "f.csv").write_text('id,prompt\n1,"a\nb\nc"\n2,"d\n"\n3,\n4,e\n')
    bad = [row for row in read_rows(tmp_path / "f.csv", required={"prompt": ""}) if isinstance(row, BadRow)]
    assert [(row.id, row.line) for row in bad] == [("3", 7)]
