"""filter_pairs.py as a command: what becomes of every row, of the files, and of what was there before."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine.filter_pairs import main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "refine/filter_pairs.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SUFFIXES = {"done": "", "filtered": ".filtered.jsonl", "failed": ".failed.jsonl"}
ALL_GATES = "--min_margin 0.5 --min_edit_similarity 0.2 --max_edit_similarity 0.99 --max_length_ratio 2".split()
ALL_GATES += "--judge_agreement --duplicates near --benchmarks bench.jsonl --ngram 4".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, with a scored file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write("data/scored.jsonl", [pair(n) for n in range(20)])
    write("bench.jsonl", [{"prompt": "nothing of the kind is asked for here"}])
    return tmp_path


def pair(n, **fields):
    return {
        "id": f"p{n}",
        "prompt": f"Which number comes after {n}?",
        "chosen": f"It is {n + 1} I think",
        "rejected": f"It is {n + 2} I think",
        "margin": n / 4,
        "edit_similarity": 0.8,
        "original_chosen": f"{n + 1}",
        "original_chosen_score": 7.0,
        "chosen_score": 3.0 + n / 4,
        "rejected_score": 3.0,
        "mark": {"kept": [n, None, "é"]},
    } | fields


def write(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    Path(path).write_bytes(b"".join(line + b"\n" for line in lines))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def outcome(output="data/train.jsonl"):
    """{kind: rows}"""
    return {kind: read(f"{output}{suffix}") for kind, suffix in SUFFIXES.items()}


def everything(output="data/train.jsonl"):
    """The bytes of all files that begin with the output's name."""
    return {path.name: path.read_bytes() for path in Path(output).parent.glob(f"{Path(output).name}*")}


def test_the_bare_command_drops_what_is_plainly_useless_and_shows_what_it_saw(place, capsys):
    rows = read("data/scored.jsonl")
    same, again = pair(20, chosen="It is 22 I think "), pair(3, id="again")
    write("data/scored.jsonl", [*rows, same, again])
    assert main([]) == 0
    files = outcome()
    assert files["done"] == rows and files["failed"] == []
    assert files["filtered"] == [
        {**same, "reason": "chosen equals rejected", "reason_value": 1.0},
        {**again, "reason": "pair came before", "reason_value": {"id": "p3"}},
    ]
    said = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["margin", "22", "0", "0.2625", "2.375", "4.737", "5"] in said
    assert ["longer", "/", "shorter", "22", "1", "1", "1", "1", "1"] in said
    assert "judge and label: 22 agree, 0 ties, 0 contradict".split() in said
    table = said[said.index(["gate", "removed", "left"]) + 1 :][:3]
    assert table == [["22"], [*"chosen equals rejected".split(), "1", "21"], [*"pair came before".split(), "1", "20"]]


def test_each_gate_takes_its_rows_in_turn_and_the_table_adds_up(place, capsys):
    rows = [
        pair(10),
        pair(11, margin=0.5),
        pair(12, edit_similarity=0.1),
        pair(13, edit_similarity=0.995),
        pair(14, chosen="Fifteen"),
        pair(15, original_chosen_score=2.0),
        pair(16, prompt="Tell: NOTHING, of the Kind!"),
        pair(10, id="whole"),
        pair(10, id="exact", chosen="I do not know it"),
        pair(10, id="near", rejected="it is 12, I think..."),
        pair(17),
    ]
    write("data/scored.jsonl", rows)
    assert main(ALL_GATES) == 0
    files = outcome()
    assert [row["id"] for row in files["done"]] == ["p10", "p17"]
    assert [(row["id"], row["reason"], row["reason_value"]) for row in files["filtered"]] == [
        ("p11", "margin not over min_margin", 0.5),
        ("p12", "edit_similarity under min_edit_similarity", 0.1),
        ("p13", "edit_similarity over max_edit_similarity", 0.995),
        ("p14", "length ratio over max_length_ratio", 5.0),
        ("p15", "judge contradicts the label", -1.0),
        (
            "p16",
            "overlaps with a benchmark prompt",
            {"ngram": "nothing of the kind", "benchmark": "bench.jsonl, row 1"},
        ),
        ("whole", "pair came before", {"id": "p10"}),
        ("exact", "duplicate", {"id": "p10"}),
        ("near", "near duplicate", {"id": "p10", "jaccard": 1.0}),
    ]
    table = capsys.readouterr().err.partition("removed     left\n")[2].splitlines()
    assert [line.split()[-2:] for line in table[2:11]] == [["1", str(left)] for left in range(10, 1, -1)]


def random_line(random_, n):
    """A line of a file that has been through many hands."""
    row = pair(n, margin=random_.choice([0.1, 2, 2.5]), edit_similarity=random_.choice([0.1, 0.5, 1]))
    fault = random_.random()
    if fault < 0.5:
        return row
    if fault < 0.55:
        return random_.choice([b"{broken", b"[1, 2]", b'{"id": "x\xff"}', b"", b"   ", b'{"margin": NaN}', b"7"])
    if fault < 0.65:
        del row[random_.choice(list(row))]
    elif fault < 0.75:
        row[random_.choice(list(row))] = random_.choice([None, "", 7, [], "text", 10**400, {"a": 1}])
    elif fault < 0.85:
        row |= {"id": f"p{random_.randrange(n + 1)}"}
    elif fault < 0.95:
        row = pair(random_.randrange(n + 1), id=f"q{n}", rejected=random_.choice(["It is 7!", "No, none.", "x " * 40]))
    else:
        row |= {"chosen": row["rejected"]}
    return row


@pytest.mark.parametrize("seed", range(6))
def test_every_line_of_any_file_ends_in_exactly_one_of_the_three(place, seed):
    random_ = random.Random(seed)
    lines = [random_line(random_, n) for n in range(150)]
    write("data/scored.jsonl", lines)
    flags = [*ALL_GATES, "--max_failure_rate", "1"]
    flags += random_.choice([[], ["--limit", "90"], ["--duplicate_key", "prompt"]])
    assert main(flags) == 0
    taken = [line for line in lines if not isinstance(line, bytes) or line.strip()]
    taken = taken[: 90 if "--limit" in flags else None]
    files = outcome()
    ids = [row["id"] for rows in files.values() for row in rows]
    assert len(ids) == len(set(ids)) == len(taken)
    first = {}  # where each id stands first
    for number, row in enumerate(taken):
        if isinstance(row, dict) and isinstance(row.get("id"), str | int) and row["id"] != "":
            first.setdefault(str(row["id"]), number)
    assert set(first) <= set(ids)
    order = [first[row["id"]] for row in files["done"] if row["id"] in first]
    assert order == sorted(order)
    assert all(row == {**taken[first[row["id"]]], "id": row["id"]} for row in files["done"] if row["id"] in first)
    assert all(row["reason"] for kind in ("filtered", "failed") for row in files[kind])
    assert files["done"] and files["filtered"] and files["failed"]
    before = everything()
    assert main(flags) == 0 and everything() == before


@pytest.mark.parametrize(
    ("field", "flags", "command"),
    [
        ("margin", ["--min_margin", "1"], "python score/cali_score_vllm.py"),
        ("edit_similarity", ["--max_edit_similarity", "0.9"], "python refine/refine_response_vllm.py"),
        ("original_chosen_score", ["--judge_agreement"], "python score/score_orig_vllm.py"),
    ],
)
def test_a_file_without_the_field_of_a_gate_is_refused_and_one_such_row_fails(place, capsys, field, flags, command):
    rows = [{name: value for name, value in row.items() if name != field} for row in read("data/scored.jsonl")]
    if field == "margin":
        rows = [{**row, "rejected_score": None} for row in rows]
    write("old.jsonl", rows)
    assert main(["--input", "old.jsonl", *flags]) == 1
    said = capsys.readouterr().err
    assert f"old.jsonl, line 1: field `{field}` is missing; to get it, run: {command}" in said
    assert not Path("data/train.jsonl").exists()
    assert main(["--input", "old.jsonl"]) == 0  # without the gate nobody needs it
    write("one.jsonl", [*rows[:1], *read("data/scored.jsonl")[5:]])
    assert main(["--input", "one.jsonl", "--output", "one.out", *flags]) == 0
    (failed,) = outcome("one.out")["failed"]
    assert (failed["id"], failed["file"], failed["line"]) == ("p0", "one.jsonl", 1)
    assert failed["reason"] == f"field `{field}` is missing" and command in failed["remedy"]


def test_scores_whose_difference_is_no_number_are_unusable(place):
    far = pair(21, margin=None, chosen_score=-1e308, rejected_score=1e308)
    write("data/scored.jsonl", [*read("data/scored.jsonl"), far])
    assert main(["--min_margin", "0"]) == 0
    (failed,) = outcome()["failed"]
    assert (failed["id"], failed["reason"]) == ("p21", "the difference of the scores is too large for a number")


def test_too_many_unusable_lines_end_with_exit_code_1(place, capsys):
    write("data/scored.jsonl", [*read("data/scored.jsonl"), *[b"{"] * 3])
    assert main([]) == 1
    assert "13.0% of the rows failed" in capsys.readouterr().err
    assert len(outcome()["done"]) == 20


def test_a_missing_input_names_the_commands_that_make_it(place, capsys):
    # Not the default name: where the demo has run, that file is there from the repository's root.
    assert main(["--input", "data/nowhere.jsonl"]) == 1
    said = capsys.readouterr().err
    assert "data/nowhere.jsonl does not exist" in said and "python score/cali_score_vllm.py" in said


def test_nothing_left_is_said_aloud(place, capsys):
    assert main(["--min_margin", "99"]) == 0
    assert "warning: no row is left: data/train.jsonl is empty" in capsys.readouterr().err
    assert len(outcome()["filtered"]) == 20


def test_another_result_replaces_the_old_one_only_when_told_to(place, capsys):
    assert main(["--min_margin", "1"]) == 0
    before = everything()
    assert main(["--min_margin", "1"]) == 0 and everything() == before
    assert main(["--min_margin", "2"]) == 1
    assert "options.min_margin: 1.0 before, 2.0 now" in capsys.readouterr().err and everything() == before
    write("data/scored.jsonl", read("data/scored.jsonl")[:-1])
    assert main(["--min_margin", "1"]) == 1 and everything() == before
    assert main(["--min_margin", "2", "--overwrite"]) == 0
    assert [row["id"] for row in outcome()["done"]] == [f"p{n}" for n in range(9, 19)]
    Path("data/train.jsonl.manifest.json").unlink()
    assert main(["--min_margin", "2"]) == 1 and "but not its manifest" in capsys.readouterr().err
    write("data/mine.jsonl", [{"precious": 1}])
    assert main(["--output", "data/mine.jsonl"]) == 1 and read("data/mine.jsonl") == [{"precious": 1}]
    for output in ("data/scored.jsonl", "bench.jsonl"):
        assert main(["--output", output, "--benchmarks", "bench.jsonl", "--overwrite"]) == 1
        assert "would write over an input" in capsys.readouterr().err


def command(*flags):
    return [sys.executable, str(SCRIPT), *flags]


def test_a_full_disk_leaves_what_was_there(place):
    write("data/scored.jsonl", [pair(n) for n in range(500)])
    assert main(["--limit", "5"]) == 0
    before = everything()

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        command("--overwrite"), env=ENVIRONMENT, preexec_fn=small_disk, capture_output=True, text=True
    )
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert everything() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_midway_leaves_what_was_there_and_can_be_done_over(place, how):
    write("data/scored.jsonl", [pair(n) for n in range(5_000)])
    assert main(["--limit", "5"]) == 0
    before = everything()
    part = Path("data/train.jsonl.part")
    flags = ["--overwrite", "--min_margin", "1"]
    process = subprocess.Popen(command(*flags, "--duplicates", "near"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    process.send_signal(how)
    assert process.wait() == (-how if how == signal.SIGKILL else 128 + how)
    after = everything()
    assert {name: data for name, data in after.items() if not name.endswith(".part")} == before
    assert part.exists() == (how == signal.SIGKILL)
    assert main(flags) == 0
    assert not [name for name in everything() if name.endswith(".part")]
    assert len(outcome()["done"]) == 5_000 - 5


def test_killed_between_two_files_the_same_command_puts_it_right(place, monkeypatch):
    """The process ends at each renaming in turn; the output is never seen beside another command's manifest."""
    assert main(["--min_margin", "1"]) == 0
    wanted_old = everything()
    assert main(["--output", "data/other.jsonl", "--min_margin", "2"]) == 0
    wanted = [row["id"] for row in read("data/other.jsonl")]
    for steps in range(4):
        main(["--min_margin", "1", "--overwrite"])
        assert everything() == wanted_old
        left = iter([True] * steps)
        replace = os.replace

        def dying(old, new, replace=replace, left=left):
            if not next(left, False):
                raise KeyboardInterrupt("as if killed")
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                main(["--min_margin", "2", "--overwrite"])
        output = Path("data/train.jsonl")
        assert not output.exists()  # it comes last
        assert main(["--min_margin", "2"]) == 0
        assert [row["id"] for row in read(output)] == wanted


def test_rows_are_not_held_in_memory(place):
    """A row of 4 kB costs its id, its signature and some numbers: under 1.5 kB."""
    peaks = []
    measure = (
        "import sys\nfrom pathlib import Path\nfrom refine.filter_pairs import main\ncode = main(sys.argv[1:])\n"
        "status = Path('/proc/self/status').read_text()\n"  # not ru_maxrss, which begins with the parent's
        "print(status.partition('VmHWM:')[2].split()[0])\nsys.exit(code)\n"
    )
    for count in (5_000, 25_000):
        write("data/scored.jsonl", (pair(n, prompt=f"a{n} b{n} c{n}", notes="x" * 4000) for n in range(count)))
        flags = ["--overwrite", "--duplicates", "near", "--min_margin", "-1"]
        done = subprocess.run(
            [sys.executable, "-c", measure, *flags], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 20_000 * 1.5


def test_two_commands_cannot_write_one_output_at_a_time(place, capsys):
    hold = (
        "import fcntl, sys, time\nfile = open('data/train.jsonl.part', 'a+')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert main([]) == 1
        assert "another command is writing" in capsys.readouterr().err
        assert Path("data/train.jsonl.part").exists()  # it is the other one's
    finally:
        other.kill()
        other.wait()
    assert main([]) == 0


def test_flags_come_from_a_file_and_the_command_line_wins(place, capsys):
    Path("gates.yaml").write_text("min_margin: 3\nbenchmarks: [bench.jsonl]\njudge_agreement: true\n")
    assert main(["--config", "gates.yaml", "--min_margin", "4"]) == 0
    assert [row["id"] for row in outcome()["done"]] == ["p17", "p18", "p19"]
    assert "1 prompts" in capsys.readouterr().err
    Path("gates.yaml").write_text("min_margn: 3\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "gates.yaml"])
    assert "did you mean `min_margin`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length_ratio", "0.5"], "--max_length_ratio 0.5 is out of range (from 1)"),
        (["--min_edit_similarity", "2"], "--min_edit_similarity 2.0 is out of range (from 0 to 1)"),
        (["--min_margin", "nan"], "--min_margin nan is out of range"),
        (["--ngram", "0"], "--ngram 0 is out of range"),
        (["--near_threshold", "0"], "--near_threshold 0.0 is out of range (from 0.1 to 1)"),
        (["--benchmarks", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_written(place, capsys, flags, message):
    assert main(flags) == 1
    assert message in capsys.readouterr().err and not Path("data/train.jsonl").exists()


QUESTION = "Name three rivers that flow through the city of Basel."


STYLES = {"chosen": ["x"] * 3, "rejected": ["y"] * 3}
BENCHMARKS = {
    "total.json": [{"id": 8, "prompt": "Other?"}, {"id": 8, "prompt": QUESTION} | STYLES],  # ids repeat: RM-Bench
    "dataset.json": [{"input": QUESTION, "output_1": "x"}, {"input": QUESTION, "label": 2}],  # no ids: LLMBar
    "bias.json": {"length": [{"instruction": "Other?"}], "x": [{"instruction": QUESTION}]},  # EvalBiasBench
    "one.json": {"prompt": QUESTION},
    "talks.jsonl": [[{"role": "user", "content": QUESTION}], "Other?"],
    "chats.jsonl": [{"messages": [{"role": "user", "content": QUESTION}]}],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_read_in_their_own_forms(place, name):
    text = json.dumps(BENCHMARKS[name], indent=2)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in BENCHMARKS[name])
    Path(name).write_text(text)
    rows = [pair(1), pair(2, prompt=f"Please {QUESTION.upper()}"), pair(3, prompt="other")]
    write("data/scored.jsonl", rows)
    assert main(["--benchmarks", name, "--ngram", "9"]) == 0
    dropped = {row["id"]: row["reason_value"] for row in outcome()["filtered"]}
    assert dropped["p2"]["ngram"] == "name three rivers that flow through the city of"
    assert dropped["p2"]["benchmark"].startswith(f"{name}, row ")
    assert set(dropped) == ({"p2", "p3"} if "Other?" in text else {"p2"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p"}\n{"text": "q", "label": 1}\n', "bench.jsonl, row 2: has no prompt in any of the fields"),
        ('{"text": "q", "label": 1}\n', "it has text, label"),
        ('{"prompt": "p"}\n{"prompt\n', "bench.jsonl, line 2: not valid JSON"),
        ("\n", "bench.jsonl has no rows"),
        ('{"prompt": [{"role": "human", "content": "p"}]}\n', "row 1: has a message without a role"),
    ],
)
def test_a_benchmark_that_cannot_be_read_whole_is_refused(place, capsys, text, message):
    Path("bench.jsonl").write_text(text)
    assert main(["--benchmarks", "bench.jsonl"]) == 1
    assert message in capsys.readouterr().err and not Path("data/train.jsonl").exists()


def test_columns_are_renamed_and_other_forms_pass_as_they_came(place):
    talk = {
        "chosen": [{"role": "assistant", "content": "Ten."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    write("data/scored.jsonl", [{"id": 1, "question": "When?", **talk}, {"question": "When?", **talk}])
    assert main(["--columns", "prompt=question"]) == 0
    files = outcome()
    assert files["done"] == [{"id": "1", "prompt": "When?", **talk}]
    assert files["filtered"][0]["reason_value"] == {"id": "1"}
