import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from distiller import store as store_module
from distiller.engine import Ask, AskError, Completion, EngineDead, EngineNotStarted
from distiller.manifest import Manifest, differences
from distiller.records import BadRow, InputError, read_rows
from distiller.runner import Done, Failed, Filtered, ParseError, Progress, ask_seed, ask_until, run_stage
from distiller.store import LineFile, Store
from distiller.usage import Usage

SUFFIXES = ("", ".filtered.jsonl", ".failed.jsonl")


class ScriptedEngine:
    """Stands in for an LLM: the reply is a function of prompt and seed; asks finish in any order, a few at a time."""

    def __init__(self, reply=lambda ask: f"{ask.messages[-1]['content']}:{ask.seed}", capacity=7, order=0):
        self.reply, self.capacity, self.random = reply, capacity, random.Random(order)
        self.flying: dict[int, Ask] = {}
        self.most = self.asked = 0
        self.closed = False

    def submit(self, key, ask):
        assert key not in self.flying
        self.flying[key] = ask
        self.asked += 1
        self.most = max(self.most, len(self.flying))

    def collect(self):
        keys = self.random.sample(sorted(self.flying), self.random.randint(1, len(self.flying)))
        return [(key, self._answer(self.flying.pop(key))) for key in keys]

    def _answer(self, ask):
        text = self.reply(ask)
        return text if isinstance(text, AskError) else Completion(text, None, "stop", 1, 1, None)

    def close(self):
        self.closed = True

    def facts(self):
        return {"name": "scripted"}


def work(row):
    """Two asks; by its number a row is also filtered, refused by its content, or impossible to parse."""
    first = yield from ask_until(
        [{"role": "user", "content": row["prompt"]}], parse_number, seed=5, row_id=row["id"], max_tries=3
    )
    if isinstance(first, Failed):
        return first
    if first % 5 == 0:
        return Filtered(row, "divisible by 5")
    if row["n"] % 17 == 3:
        raise InputError("content of no use")
    second = yield Ask([{"role": "user", "content": "again"}], ask_seed(5, row["id"], 1))
    return Done({**row, "first": first, "second": second.text})


def parse_number(reply):
    number = int(reply.text.rpartition(":")[2])
    if number % 3 == 0:
        raise ParseError("divisible by 3")
    return number


def make_rows(count):
    return [{"id": f"r{n}", "n": n, "prompt": f"prompt {n} é"} for n in range(count)]


def stage(output, rows, engine=None, identity=None, stage_work=work, **options):
    engine = engine or ScriptedEngine()
    manifest = Manifest({"stage": "test", **(identity or {})}, {"commit": "c1"})
    return run_stage(rows, stage_work, lambda: engine, output, manifest, total=len(rows), **options)


def files_of(output):
    """{suffix: {id: row}}, having checked that every line is whole and no id occurs twice in all three files."""
    found, seen = {}, set()
    for suffix in SUFFIXES:
        data = Path(f"{output}{suffix}").read_bytes()
        assert not data or data.endswith(b"\n")
        rows = [json.loads(line) for line in data.splitlines()]
        ids = [row["id"] for row in rows]
        assert len(set(ids)) == len(ids) and not seen & set(ids)
        seen |= set(ids)
        found[suffix] = {row["id"]: row for row in rows}
    return found


def test_every_row_ends_in_exactly_one_file_whatever_the_order_of_replies(tmp_path):
    rows = make_rows(200)
    results = []
    for order, capacity in ((1, 1), (2, 7), (3, 64)):
        engine = ScriptedEngine(order=order, capacity=capacity)
        summary = stage(tmp_path / f"o{order}.jsonl", rows, engine)
        assert engine.most == capacity and engine.closed
        results.append(files_of(tmp_path / f"o{order}.jsonl"))
        assert summary.counts.total() == 200
        assert [summary.counts[k] for k in ("done", "filtered", "failed")] == [len(results[-1][s]) for s in SUFFIXES]
    assert results[0] == results[1] == results[2]
    assert all(results[0][suffix] for suffix in SUFFIXES)
    assert {row["id"] for part in results[0].values() for row in part.values()} == {row["id"] for row in rows}


def test_a_run_cut_at_any_byte_resumes_to_the_same_files(tmp_path):
    rows, output = make_rows(60), tmp_path / "o.jsonl"
    stage(output, rows)
    whole = files_of(output)
    contents = {suffix: Path(f"{output}{suffix}").read_bytes() for suffix in SUFFIXES}
    draw = random.Random(0)
    for trial in range(150):
        for suffix, data in contents.items():
            Path(f"{output}{suffix}").write_bytes(data[: draw.randint(0, len(data))])
        stage(output, rows, ScriptedEngine(order=trial, capacity=draw.randint(1, 20)))
        assert files_of(output) == whole


def test_a_finished_run_loads_no_engine_and_says_the_same(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(30)
    first = stage(output, rows)
    again = run_stage(rows, work, lambda: pytest.fail("loaded"), output, Manifest({"stage": "test"}), total=30)
    assert (again.counts, again.reasons, again.exit_code) == (first.counts, first.reasons, first.exit_code)


def test_each_finished_row_is_on_disk_before_the_next_reply_is_awaited(tmp_path):
    output = tmp_path / "o.jsonl"
    seen = []

    def reply(ask):
        seen.append(sum(1 for _ in output.open()))
        return "1:1"

    stage(output, make_rows(3), ScriptedEngine(reply, capacity=1))
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_row_that_stalls_holds_no_other_row_back(tmp_path):
    """Its answer comes when nothing else is in flight, and by then every other row is on disk."""
    output, rows = tmp_path / "o.jsonl", make_rows(200)
    on_disk = []

    class Stalling(ScriptedEngine):
        def collect(self):
            stalled = self.flying.pop(0)
            if self.flying:
                replies = super().collect()
                self.flying[0] = stalled
                return replies
            on_disk.append(sum(Path(f"{output}{suffix}").read_bytes().count(b"\n") for suffix in SUFFIXES))
            return [(0, self._answer(stalled))]

        def submit(self, key, ask):
            if on_disk:  # what the row asks after that
                self.collect = super().collect
            super().submit(key, ask)

    stage(output, rows, Stalling())
    assert on_disk == [199]
    assert {i for part in files_of(output).values() for i in part} == {row["id"] for row in rows}


def test_a_reply_that_cannot_be_parsed_is_asked_again_with_another_seed_then_fails(tmp_path):
    seeds = []

    def reply(ask):
        seeds.append(ask.seed)
        return f"nonsense {len(seeds)}:3"

    summary = stage(tmp_path / "o.jsonl", make_rows(1), ScriptedEngine(reply))
    assert seeds == [ask_seed(5, "r0", 0, attempt) for attempt in range(3)] and len(set(seeds)) == 3
    failed = files_of(tmp_path / "o.jsonl")[".failed.jsonl"]["r0"]
    assert (failed["reason"], failed["raw"], failed["n"]) == ("divisible by 3", "nonsense 3:3", 0)
    assert summary.exit_code == 1


def test_an_ask_the_engine_refuses_fails_its_row_at_once(tmp_path):
    engine = ScriptedEngine(lambda ask: AskError("prompt of 9000 tokens") if " 0 " in str(ask) else "1:1")
    summary = stage(tmp_path / "o.jsonl", make_rows(4), engine, max_failure_rate=0.25)
    failed = files_of(tmp_path / "o.jsonl")[".failed.jsonl"]
    assert failed["r0"]["reason"] == "prompt of 9000 tokens" and failed["r0"]["raw"] is None
    assert summary.reasons["failed"] == {"content of no use": 1, "prompt of N tokens": 1}
    assert summary.exit_code == 1 and "50.0%" in str(summary)


def test_the_exit_code_follows_the_failure_rate(tmp_path):
    engine = ScriptedEngine(lambda ask: "1:1")
    assert stage(tmp_path / "a.jsonl", make_rows(21), engine, max_failure_rate=0.09).exit_code == 1  # r3, r20
    assert stage(tmp_path / "b.jsonl", make_rows(21), engine, max_failure_rate=0.1).exit_code == 0


def test_retry_failed_runs_only_the_failed_rows_again_with_other_seeds(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(60)
    seeds = set()
    stage(output, rows, ScriptedEngine(lambda ask: seeds.add(ask.seed) or f":{ask.seed}"))
    before = files_of(output)
    engine = ScriptedEngine()
    stage(output, rows, engine)
    assert engine.asked == 0
    engine = ScriptedEngine(lambda ask: pytest.fail("old seed") if ask.seed in seeds else f":{ask.seed}")
    stage(output, rows[:30], engine, retry_failed=True)
    after = files_of(output)
    assert all(set(before[suffix]) <= set(after[suffix]) for suffix in SUFFIXES[:2])
    assert {i for part in after.values() for i in part} == {row["id"] for row in rows}
    beyond = {i: row for i, row in before[SUFFIXES[2]].items() if row["n"] >= 30}
    assert beyond and beyond.items() <= after[SUFFIXES[2]].items()
    assert len(after[SUFFIXES[2]]) < len(before[SUFFIXES[2]])


def test_a_bad_row_goes_to_the_failed_file_once(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "n": 1, "prompt": "p"}\n{broken\n{"id": "a", "n": 1, "prompt": "q"}\n')
    rows = list(read_rows(source, required={"prompt": ""}))
    assert sum(isinstance(row, BadRow) for row in rows) == 2
    for _ in range(2):
        summary = stage(tmp_path / "o.jsonl", rows, ScriptedEngine(lambda ask: ":1"))
    failed = files_of(tmp_path / "o.jsonl")[".failed.jsonl"]
    assert (failed["line-2"]["reason"], failed["line-2"]["raw"]) == ("not valid JSON", "{broken")
    assert (failed["a#3"]["line"], failed["a#3"]["file"]) == (3, str(source))
    assert summary.counts == {"done": 1, "failed": 2}
    assert capsys.readouterr().err.count("line 2: not valid JSON") == 1


def test_a_run_whose_result_would_differ_is_refused_with_the_difference(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    stage(output, rows, identity={"sampling": {"temperature": 0.7, "top_k": 1}})
    before = files_of(output)
    with pytest.raises(InputError, match=r"sampling\.temperature: 0\.7 before, 1\.0 now"):
        stage(output, rows, identity={"sampling": {"temperature": 1.0, "top_k": 1}})
    assert files_of(output) == before
    stage(output, rows[:5], identity={"sampling": {"temperature": 1.0}}, overwrite=True)
    assert sum(map(len, files_of(output).values())) == 5
    Path(f"{output}.manifest.json").unlink()
    with pytest.raises(InputError, match="not its manifest"):
        stage(output, rows)


def test_a_row_with_columns_of_a_bad_rows_names_is_retried_like_any_other(tmp_path):
    output, rows = tmp_path / "o.jsonl", [{**row, "line": 1, "remedy": "tea"} for row in make_rows(5)]
    stage(output, rows, ScriptedEngine(lambda ask: AskError("busy")))
    summary = stage(output, rows, retry_failed=True)
    assert summary.counts["failed"] < 5


def test_other_versions_are_said_aloud_and_do_not_stop_the_run(tmp_path, capsys):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    stage(output, rows[:10])
    manifest = Manifest({"stage": "test"}, {"commit": "c2"})
    run_stage(rows, work, ScriptedEngine, output, manifest, total=20)
    assert 'commit: "c1" before, "c2" now' in capsys.readouterr().err
    assert sum(map(len, files_of(output).values())) == 20
    assert json.loads(Path(f"{output}.manifest.json").read_text())["made_with"]["engine"] == {"name": "scripted"}


def test_a_context_that_changes_the_models_rotary_factors_is_refused_and_another_longer_one_is_not(tmp_path):
    class Engine(ScriptedEngine):
        def facts(self):
            return {"max_model_len": length, "rope": "long" if length > 64 else "short"}

    output, rows, length = tmp_path / "o.jsonl", make_rows(20), 32
    stage(output, rows[:10], Engine())
    before, length = files_of(output), 128
    for more in (rows, rows[:10]):
        with pytest.raises(InputError, match=r"--max_model_len \(32 before, 128 now\)"):
            stage(output, more, Engine(), retry_failed=True)
    assert files_of(output) == before
    length = 64
    stage(output, rows, Engine())
    assert sum(map(len, files_of(output).values())) == 20


def test_differences_are_found_at_any_depth():
    assert differences({"a": {"b": [1], "c": 2}}, {"a": {"b": [1]}, "d": None}) == ["a.c: 2 before, null now"]


def test_a_file_no_stage_wrote_is_not_gone_on_with(tmp_path):
    output = tmp_path / "o.jsonl"
    stage(output, make_rows(5))
    output.write_text('{"other": 1}\n')
    with pytest.raises(InputError, match="line 1: not a row a stage wrote; take the line out"):
        stage(output, make_rows(5))


@pytest.mark.parametrize("content", ['[{"prompt": "one line"}]', '{"prompt": "a"}\n{"prompt": "cut'])
def test_a_file_no_stage_wrote_is_not_touched_whatever_it_ends_with(tmp_path, content):
    output = tmp_path / "o.jsonl"
    output.write_text(content)
    with pytest.raises(InputError, match="not its manifest"):
        stage(output, make_rows(5))
    assert output.read_text() == content


def test_what_overwrite_replaces_stays_until_the_engine_is_up(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    stage(output, rows)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def not_started():
        raise EngineNotStarted("no such model")

    with pytest.raises(EngineNotStarted):
        run_stage(rows, work, not_started, output, Manifest({"stage": "other"}), total=20, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    engine = ScriptedEngine()
    stage(output, rows[:7], engine, identity={"seed": 2}, overwrite=True)
    assert sum(map(len, files_of(output).values())) == 7 and engine.closed


def test_what_overwrite_replaces_stays_until_there_is_a_row_to_put_in_its_place(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    waiting = Path(f"{output}.new.failed.jsonl")
    useless = Path(f"{output}.new.filtered.jsonl")
    stage(output, rows)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = {"identity": {"seed": 2}, "overwrite": True}

    def left_as_it_was():
        return {path: path.read_bytes() for path in tmp_path.iterdir() if path not in (waiting, useless)} == before

    refusing = ScriptedEngine(lambda ask: AskError("it cannot", raw="thinking", completion_tokens=3))
    summary = stage(output, rows, refusing, max_failure_rate=1.0, **other)
    assert left_as_it_was() and summary.exit_code == 1 and summary.counts == {"failed": 20}
    assert f"not one new row can be used: {output} is the earlier one" in str(summary) and str(waiting) in str(summary)
    assert {row["id"] for row in map(json.loads, waiting.read_text().splitlines())} == {row["id"] for row in rows}
    assert "the same command runs them again" in str(stage(output, rows, refusing, **other))
    filtering = ScriptedEngine(lambda ask: "x:10")  # a number that the work filters
    summary = stage(output, rows, filtering, **other)
    assert left_as_it_was() and summary.exit_code == 1 and summary.counts == {"filtered": 20}
    assert useless.read_bytes().count(b"\n") == 20 and not waiting.exists()

    def dying(ask):
        if ask.messages[0]["content"].startswith("prompt 3 "):
            raise EngineDead("gone")
        return AskError("it cannot")

    begun = []
    with pytest.raises(EngineDead):
        stage(output, rows, ScriptedEngine(dying, capacity=1), on_begun=lambda: begun.append(1), **other)
    assert left_as_it_was() and not begun
    assert [row["id"] for row in map(json.loads, waiting.read_text().splitlines())] == ["r0", "r1", "r2"]

    def late(ask):
        return AskError("not yet") if engine.asked <= 5 else f"{ask.messages[-1]['content']}:1"

    engine = ScriptedEngine(late, capacity=1)
    summary = stage(output, rows, engine, on_begun=lambda: begun.append(1), **other)
    assert not waiting.exists() and not useless.exists() and begun
    found = files_of(output)
    assert sum(map(len, found.values())) == 20 == summary.counts.total()
    assert [row["reason"] for row in found[".failed.jsonl"].values()].count("not yet") == 5
    assert stage(output, rows, identity={"seed": 2}).counts == summary.counts  # its manifest is the new run's
    stage(output, rows, ScriptedEngine(), **other)
    assert not waiting.exists()


def test_an_earlier_output_without_a_finished_row_is_replaced_at_once(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(5)
    refusing = ScriptedEngine(lambda ask: AskError("it cannot"))
    stage(output, rows, refusing)
    summary = stage(output, rows, refusing, identity={"seed": 2}, overwrite=True)
    assert not summary.waiting and len(files_of(output)[".failed.jsonl"]) == 5
    assert stage(output, rows, identity={"seed": 2}, retry_failed=True).counts["failed"] < 5


def test_a_link_to_what_is_not_there_yet_stays_one(tmp_path):
    output = tmp_path / "o.jsonl"
    (tmp_path / "elsewhere").mkdir()
    output.symlink_to(tmp_path / "elsewhere/o.jsonl")

    def not_started():
        raise EngineNotStarted("no such model")

    with pytest.raises(EngineNotStarted):
        run_stage(make_rows(3), work, not_started, output, Manifest({"stage": "test"}), total=3)
    assert output.is_symlink() and not list((tmp_path / "elsewhere").iterdir())
    stage(output, make_rows(3))
    assert output.is_symlink() and (tmp_path / "elsewhere/o.jsonl").stat().st_size


def test_a_fault_of_the_program_ends_the_run_and_keeps_the_rows(tmp_path):
    def broken(row):
        yield Ask([{"role": "user", "content": "x"}], 0)
        return Done({**row, "n": 1 / (row["n"] - 2)})

    engine = ScriptedEngine(capacity=1)
    with pytest.raises(ZeroDivisionError):
        stage(tmp_path / "o.jsonl", make_rows(5), engine, stage_work=broken)
    assert engine.closed
    assert list(files_of(tmp_path / "o.jsonl")[""]) == ["r0", "r1"]


def test_a_stage_that_changes_an_id_or_returns_nothing_is_at_fault(tmp_path):
    def renaming(row):
        yield from ()
        return Done({**row, "id": "other"})

    def forgetful(row):
        yield from ()

    with pytest.raises(ValueError, match="keep the row's id"):
        stage(tmp_path / "a.jsonl", make_rows(1), stage_work=renaming)
    with pytest.raises(TypeError, match="returns Done"):
        stage(tmp_path / "b.jsonl", make_rows(1), stage_work=forgetful)


def test_a_dead_engine_ends_the_run_and_a_rerun_finishes_it(tmp_path):
    class Dying(ScriptedEngine):
        def collect(self):
            if self.asked > 30:
                raise EngineDead("out of memory")
            return super().collect()

    rows = make_rows(50)
    stage(tmp_path / "whole.jsonl", rows)
    with pytest.raises(EngineDead):
        stage(tmp_path / "o.jsonl", rows, Dying())
    assert 0 < sum(map(len, files_of(tmp_path / "o.jsonl").values())) < 50
    stage(tmp_path / "o.jsonl", rows)
    assert files_of(tmp_path / "o.jsonl") == files_of(tmp_path / "whole.jsonl")


def test_an_engine_that_loses_an_ask_does_not_hang_the_run(tmp_path):
    class Forgetful(ScriptedEngine):
        def collect(self):
            return []

    with pytest.raises(EngineDead, match="lost 3 asks"):
        stage(tmp_path / "o.jsonl", make_rows(3), Forgetful())


def test_the_seed_of_an_ask_depends_on_run_row_ask_and_try_alone():
    seeds = {ask_seed(s, i, n, t) for s in (0, 1) for i in ("a", "b", "a 1") for n in (0, 1) for t in (0, 1)}
    assert len(seeds) == 24 and all(0 <= seed < 2**31 for seed in seeds)
    assert ask_seed(0, "a") == 914939576


def test_progress_tells_how_far_it_is_while_no_row_is_finished_and_later(tmp_path, capsys):
    class Slow(ScriptedEngine):
        """Of every ask it writes a token each time it is asked for what has finished, and ends it with the fourth."""

        written = read = 0

        def submit(self, key, ask):
            super().submit(key, ask)
            self.read += 5

        def collect(self):
            for _ in range(4):
                self.written += len(self.flying)
                time.sleep(0.03)
            return [
                (key, Completion(self._answer(self.flying.pop(key)).text, None, "stop", 5, 4, None))
                for key in list(self.flying)
            ]

        def tokens(self):
            return self.written, self.read

    stage(tmp_path / "o.jsonl", make_rows(20), Slow(), progress_seconds=0.02)
    lines = capsys.readouterr().err.splitlines()
    pattern = (
        r"(\d+)/20 rows, \d+ failed, \d+ filtered, (\d) under way, (\d+) tokens written, (\d+) read, "
        r"\S+ written/s, (time left unknown until a row is finished|(\S+) left)"
    )
    told = [match for line in lines if (match := re.fullmatch(pattern, line))]
    assert len(told) > 5 and told[0][1] == "0" and told[0][6] is None and told[0][2] == "7"
    written = [int(match[3]) for match in told]
    assert written == sorted(written) and 0 < written[0] < 28 < written[-1]  # 28: of the first seven asks
    assert int(told[-1][1]) > 7 and told[-1][6] is not None


def test_the_time_left_is_that_of_the_tokens_not_yet_written(tmp_path):
    usage = Usage()
    store = SimpleNamespace(counts=Counter(), manifest=SimpleNamespace(usage=usage))
    engine = SimpleNamespace(tokens=lambda: (1500, 0))
    progress = Progress(20, store, 60, engine)
    progress._earlier, progress._earlier_of_engine = (0, 0), (500, 0)
    progress.started -= 100
    store.counts["done"], usage.completion_tokens = 2, 400
    # 200 tokens a row: 18 rows are 3,600, of which 600 are written, at 1,000 in 100 s.
    progress.under_way = 7
    assert progress.line().endswith("1,000 tokens written, 0 read, 10 written/s, 5m00s left")
    progress.under_way = 2  # no more than 200 of the 600 count
    assert progress.line().endswith("5m40s left")


# What follows runs in a process of its own: python test_runner.py <command> ...


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment, stdout=subprocess.PIPE)


def test_killed_run_resumes_without_loss_or_repeat(tmp_path):
    rows, output = make_rows(4000), tmp_path / "o.jsonl"
    stage(tmp_path / "whole.jsonl", rows)
    kills = 0
    for delay in (0.02, 0.05, 0.1, 0.03, 0.08):
        child = start("stage", output, len(rows))
        child.stdout.readline()
        time.sleep(delay)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 3
    stage(output, rows)
    assert files_of(output) == files_of(tmp_path / "whole.jsonl")


def test_two_runs_on_one_output_at_once_are_refused(tmp_path):
    output = tmp_path / "o.jsonl"
    child = start("hold", output)
    child.stdout.readline()
    try:
        with pytest.raises(InputError, match="another command is writing"):
            stage(output, make_rows(3))
    finally:
        child.kill()
        child.wait()
    stage(output, make_rows(3))


def test_of_two_runs_that_start_at_once_the_refused_one_leaves_the_file_to_the_other(tmp_path):
    output, children = tmp_path / "o.jsonl", []

    def overtaken(path):
        file = LineFile(path)
        children.append(start("hold", output))
        children[0].stdout.readline()
        return file

    try:
        with pytest.raises(InputError, match="another command is writing"):
            stage(output, make_rows(3), open_done=overtaken)
        assert output.exists()
    finally:
        children[0].kill()
        children[0].wait()


def test_a_hundred_thousand_rows_take_no_more_memory_than_their_ids(tmp_path):
    """A run, the same command again, and its failed rows again: 64 MiB at most above 10,000 rows."""
    peaks = []
    for count in (10_000, 100_000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            for n in range(count):
                file.write(json.dumps({"id": f"{n} " + "i" * 200, "n": n, "prompt": f"{n} " + "x" * 400}) + "\n")
        child = start("memory", tmp_path / f"o{count}.jsonl", source, count)
        peak, *kinds = map(int, child.communicate()[0].split())
        assert child.returncode == 0 and sum(kinds) == count and min(kinds) > count / 50
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 64 * 1024  # KiB


def main(command, output, *arguments):
    if command == "hold":
        store = Store(output, Manifest({"stage": "test"}))
        print("holding", store.counts.total(), flush=True)
        time.sleep(60)
    elif command == "stage":
        print("started", flush=True)
        stage(output, make_rows(int(arguments[0])))
    elif command == "slow stage":
        stage(output, make_rows(int(arguments[0])), ScriptedEngine(lambda ask: time.sleep(0.02) or f":{ask.seed}"))
    elif command == "memory":
        rows = read_rows(arguments[0], required={"prompt": ""})
        for options in ({}, {}, {"retry_failed": True}):
            engine = ScriptedEngine(capacity=64)
            run_stage(
                rows,
                work,
                lambda engine=engine: engine,
                output,
                Manifest({"stage": "test"}),
                total=int(arguments[1]),
                max_failure_rate=1,
                **options,
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak, *(Path(f"{output}{suffix}").read_bytes().count(b"\n") for suffix in SUFFIXES))


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_what_overwrite_replaces_is_not_touched_under_another_name(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    stage(output, rows)
    kept = {}
    for suffix in SUFFIXES:
        Path(f"{tmp_path}/kept{suffix}").hardlink_to(f"{output}{suffix}")
        kept[suffix] = Path(f"{output}{suffix}").read_bytes()
    stage(output, rows[:5], overwrite=True)
    assert {suffix: Path(f"{tmp_path}/kept{suffix}").read_bytes() for suffix in SUFFIXES} == kept
    assert sum(map(len, files_of(output).values())) == 5
    child = start("hold", output)  # the new file is locked as the old one was
    child.stdout.readline()
    try:
        with pytest.raises(InputError, match="another command is writing"):
            stage(output, rows, overwrite=True)
    finally:
        child.kill()
        child.wait()


def test_links_stay_links(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    (tmp_path / "elsewhere").mkdir()
    names = [f"o.jsonl{suffix}" for suffix in (*SUFFIXES, ".manifest.json")]
    for name in names:
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    stage(output, rows)
    stage(output, rows, retry_failed=True)
    stage(output, rows, overwrite=True)
    assert all((tmp_path / name).is_symlink() and (tmp_path / "elsewhere" / name).exists() for name in names)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(store_module.fcntl, "lockf", refuse)
    with pytest.raises(InputError, match=r"o.jsonl cannot be locked \(No locks available\).* another disk"):
        stage(tmp_path / "o.jsonl", make_rows(3))


@pytest.mark.parametrize(("text", "why"), [("1:1\0", "a NUL character"), ("1:1\ud800", "a lone surrogate")])
def test_a_reply_that_no_row_may_hold_is_asked_again(tmp_path, text, why):
    stage(tmp_path / "o.jsonl", make_rows(1), ScriptedEngine(lambda ask: text))
    failed = files_of(tmp_path / "o.jsonl")[".failed.jsonl"]["r0"]
    assert failed["reason"].startswith(f"the reply has {why}")


def test_rows_finished_already_are_never_more_than_those_wanted(tmp_path, capsys):
    stage(tmp_path / "o.jsonl", make_rows(20))
    stage(tmp_path / "o.jsonl", make_rows(20)[:5])
    assert "5 of 5 rows are finished already" in capsys.readouterr().err


def test_lines_that_no_retry_can_help_are_told_from_replies_that_one_may(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"id": "r{n}", "prompt": "1"}}\n' for n in range(3)) + "{torn\n")
    rows = list(read_rows(tmp_path / "in.jsonl", required={"prompt": ""}))
    good = ScriptedEngine(lambda ask: "1:1")
    summary = run_stage(rows, one_ask, lambda: good, tmp_path / "o.jsonl", Manifest({"stage": "test"}), total=4)
    assert summary.exit_code == 1 and "1 are lines that cannot be used" in str(summary)
    assert "--retry_failed" not in str(summary)
    again = run_stage(
        rows,
        one_ask,
        lambda: pytest.fail("loaded"),
        tmp_path / "o.jsonl",
        Manifest({"stage": "test"}),
        total=4,
        retry_failed=True,
    )
    assert again.counts == summary.counts
    bad = ScriptedEngine(lambda ask: "1:3")
    summary = run_stage(rows, one_ask, lambda: bad, tmp_path / "p.jsonl", Manifest({"stage": "test"}), total=4)
    assert "--retry_failed" in str(summary) and "1 are lines that cannot be used" in str(summary)


def one_ask(row):
    reply = yield from ask_until([{"role": "user", "content": row["prompt"]}], parse_number, seed=5, row_id=row["id"])
    return reply if isinstance(reply, Failed) else Done(row)
