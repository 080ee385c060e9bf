"""Tokens counted, priced and capped, by the real runner over a played engine."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from test_cli import DemoArguments, Teacher, make_work
from test_runner import ScriptedEngine, files_of, make_rows, stage, start, work

from distiller import cli
from distiller.cli import run
from distiller.engine import Ask, AskError, Completion, EngineDead, EngineNotStarted
from distiller.manifest import Manifest
from distiller.records import BadRow
from distiller.runner import Done, run_stage
from distiller.usage import Budget, Usage


class Counting(ScriptedEngine):
    """Each answer takes between 5 and 40 tokens, the same for the same prompt and seed, and 2 of them from a cache."""

    def __init__(self, **options):
        super().__init__(**options)
        self.spent = 0

    def _answer(self, ask):
        prompt, completion = 4 + ask.seed % 17, 1 + ask.seed % 20
        self.spent += prompt + completion
        if ask.seed % 11 == 0 and ask.messages[-1]["content"] != "again":
            return AskError("an answer of no use", prompt, completion, 2)
        text = f"{ask.messages[-1]['content']}:{ask.seed}"
        return Completion(text, None, "stop", prompt, completion, None, 2)


def usage_of(output) -> dict:
    return json.loads(Path(f"{output}.manifest.json").read_text())["usage"]


def total(output) -> int:
    usage = usage_of(output)
    return usage["prompt_tokens"] + usage["completion_tokens"]


def test_every_answer_is_counted_and_a_rerun_counts_on(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(80)
    engines = [Counting(), Counting(), Counting()]
    stage(output, rows[:50], engines[0])
    stage(output, rows, engines[1])
    summary = stage(output, rows, engines[2])
    used = usage_of(output)
    assert engines[2].asked == 0 and used["asks"] == engines[0].asked + engines[1].asked
    assert total(output) == engines[0].spent + engines[1].spent == summary.usage.total
    assert used["cached_tokens"] == 2 * used["asks"]
    assert f"= {total(output):,} tokens in {used['asks']} asks" in str(summary)
    stage(output, rows[:5], Counting(), overwrite=True)
    assert total(output) < 1000


def test_the_cost_is_that_of_all_tokens_at_the_prices_given():
    usage = Usage(3, 2_000_000, 500_000, None, [1.5, 6])
    assert usage.cost == 6.0 and "cost 6 " in str(usage)
    usage.cached_tokens = 1_000_000
    assert usage.cost == 6.0
    usage.price_per_million = [1.5, 6, 0.5]
    assert usage.cost == 5.0 and usage.as_dict()["cost"] == 5.0 and "(1,000,000 from the cache)" in str(usage)
    usage.price_per_million = None
    assert usage.cost is None and "cost" not in usage.as_dict() and "cost" not in str(usage)


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_a_capped_run_ends_with_whole_rows_near_the_cap_and_a_higher_cap_goes_on(tmp_path, capacity):
    rows, whole, output = make_rows(300), tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    stage(whole, rows, Counting())
    everything = total(whole)
    dearest = 4 * 40  # a row has four asks at most
    for share in (0.01, 0.3, 0.31, 0.8):
        cap = int(share * everything)
        summary = stage(output, rows, Counting(capacity=capacity), max_tokens_total=cap)
        assert cap <= total(output) < cap + dearest
        finished = sum(map(len, files_of(output).values()))
        assert summary.left == len(rows) - finished > 0
        assert summary.exit_code == 3 or summary.failure_rate > 0.1
        assert f"stopped at --max_tokens_total {cap} with {summary.left} rows left" in str(summary)
    summary = stage(output, rows, Counting(capacity=capacity), max_tokens_total=2 * everything)
    assert summary.left == 0 and files_of(output) == files_of(whole) and total(output) == everything


def test_a_cap_already_reached_loads_no_engine(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(20)
    stage(output, rows[:10], Counting())

    def capped(count, cap):
        manifest, limits = Manifest({"stage": "test"}), {"max_tokens_total": cap, "max_failure_rate": 1}
        return run_stage(rows[:count], work, lambda: pytest.fail("loaded"), output, manifest, total=count, **limits)

    summary = capped(20, total(output))
    assert (summary.exit_code, summary.left) == (3, 10)
    summary = capped(10, 1)  # where no row is left there is nothing to stop
    assert (summary.exit_code, summary.left) == (0, 0)


def test_rows_that_take_no_tokens_are_not_held_back_by_a_cap(tmp_path):
    def askless(row):
        yield from ()
        return Done(row)

    summary = stage(tmp_path / "o.jsonl", make_rows(50), Counting(), stage_work=askless, max_tokens_total=1)
    assert summary.counts == {"done": 50} and summary.exit_code == 0


def test_the_budget_starts_with_one_row_and_never_promises_more_than_is_left():
    draw = random.Random(0)
    for _ in range(300):
        usage, cap = Usage(), draw.randint(1, 3000)
        budget, flying, started = Budget(usage, cap), [], 0
        while True:
            while len(flying) < 20 and budget.allows(len(flying)):
                flying.append(draw.randint(50, 100))
                started += 1
                assert started > 1 or len(flying) == 1
            if not flying:
                break
            usage.prompt_tokens += (tokens := flying.pop(draw.randrange(len(flying))))
            budget.finished(tokens)
        # The first row alone is unknown; after it no row costs more than twice the costliest known.
        assert cap <= usage.total < cap + 100 + 50 * 20


def test_tokens_outlive_a_kill(tmp_path):
    output, rows = tmp_path / "o.jsonl", make_rows(60)
    child = start("slow stage", output, len(rows))
    try:
        while not output.exists() or len(output.read_bytes().splitlines()) < 20:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    asks = usage_of(output)["asks"]
    finished = sum(map(len, files_of(output).values()))
    assert asks >= finished - 0.3 / 0.02  # 0.02 s an ask: what the last moment may cost, at most
    stage(output, rows)
    assert usage_of(output)["asks"] > asks and sum(map(len, files_of(output).values())) == 60


def test_a_run_that_wrote_nothing_leaves_no_file_but_its_tokens(tmp_path):
    output = tmp_path / "o.jsonl"

    def no_engine():
        raise EngineNotStarted("no such model")

    with pytest.raises(EngineNotStarted):
        run_stage_with(no_engine, output)
    assert list(tmp_path.iterdir()) == []

    class Forgetful(Counting):
        def collect(self):
            if self.asked > 7:
                raise EngineNotStarted("no more")
            return [(key, self._answer(self.flying.pop(key))) for key in sorted(self.flying)[:1]]

    with pytest.raises(EngineNotStarted):
        run_stage_with(lambda: Forgetful(capacity=7), output)
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl.manifest.json"]
    assert (spent := total(output)) > 0
    engine = Counting()
    stage(output, make_rows(30), engine)
    assert total(output) == spent + engine.spent


def run_stage_with(make_engine, output):
    run_stage(make_rows(30), work, make_engine, output, Manifest({"stage": "test"}), total=30)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A stage with an example configuration and three rows, in the current directory."""
    (tmp_path / "stage" / "configs").mkdir(parents=True)
    config = "input: in.jsonl\noutput: out.jsonl\nmodel: tiny\nprompt_file: say.txt\ntop_k: -1\n"
    (tmp_path / "stage" / "configs" / "example.yaml").write_text(config)
    (tmp_path / "say.txt").write_text("say: {{ prompt }}\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": p, "prompt": p}) + "\n" for p in "abc"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "make_engine", lambda args: Teacher())
    return tmp_path


def demo(world, *argv):
    args = cli.parse_stage_args(DemoArguments, world / "stage/configs/example.yaml", argv=list(argv))
    return run(args, make_work, stage="demo", required={"prompt": ""})


def test_the_command_stops_at_its_cap_with_exit_code_3_and_goes_on_with_a_higher_one(world, capsys):
    assert demo(world, "--max_tokens_total", "7", "--price_per_million", "1000000", "0") == 3
    said = capsys.readouterr().err
    assert "6 prompt + 6 completion = 12 tokens in 2 asks; cost 6 at --price_per_million" in said
    assert "stopped at --max_tokens_total 7 with 1 rows left; the same command with a higher one" in said
    assert usage_of("out.jsonl")["cost"] == 6
    assert demo(world, "--max_tokens_total", "12") == 3
    assert demo(world, "--max_tokens_total", "13") == 0
    assert usage_of("out.jsonl") == {"asks": 3, "prompt_tokens": 9, "completion_tokens": 9, "cached_tokens": None}
    assert len((world / "out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "argv", [["--max_tokens_total", "0"], ["--price_per_million", "1"], ["--price_per_million", "1", "nan"]]
)
def test_a_cap_or_a_price_that_means_nothing_is_refused(world, capsys, argv):
    assert demo(world, *argv) == 1
    assert argv[0] in capsys.readouterr().err and not Path("out.jsonl").exists()


def test_an_engine_that_did_not_start_is_not_called_gone_and_leaves_no_file(world, capsys, monkeypatch):
    def no_engine(args):
        raise EngineNotStarted("tiny: no such model")

    monkeypatch.setattr(cli, "make_engine", no_engine)
    before = sorted(world.iterdir())
    assert demo(world) == 2
    said = capsys.readouterr().err
    assert "the teacher engine did not start: tiny: no such model" in said
    assert "No row was finished. To go on, run: " in said
    assert sorted(world.iterdir()) == before


def test_a_capped_run_is_not_said_to_fail_for_the_bad_lines_behind_the_cap(tmp_path):
    bad = [BadRow(f"bad{n}", "f.jsonl", n, "not valid JSON", "", "{") for n in range(5)]
    rows = [*make_rows(60), *bad]
    engine = Counting(reply=lambda ask: "1:1")
    summary = stage(tmp_path / "o.jsonl", rows, engine, max_tokens_total=400, max_failure_rate=0.2)
    assert 0 < summary.counts["done"] < 20 and summary.left > 40
    assert summary.exit_code == 3, str(summary)


def test_a_cap_that_cannot_be_kept_because_no_tokens_are_reported_ends_the_run(tmp_path):
    class Silent(ScriptedEngine):
        def _answer(self, ask):
            return Completion(self.reply(ask), None, "stop", 0, 0, None)

    with pytest.raises(EngineDead, match="--max_tokens_total"):
        stage(tmp_path / "o.jsonl", make_rows(9), Silent(lambda ask: "1:1"), max_tokens_total=1000)
    stage(tmp_path / "p.jsonl", make_rows(9), Silent(lambda ask: "1:1"))  # without a cap nobody needs them


def test_answers_that_came_before_the_engine_died_are_written_and_counted(tmp_path):
    class Dying(ScriptedEngine):
        def collect(self):
            answers = [(key, self._answer(ask)) for key, ask in sorted(self.flying.items())]
            self.flying.clear()
            self.dead = True
            return answers

        def submit(self, key, ask):
            if getattr(self, "dead", False):
                raise EngineDead("gone")
            super().submit(key, ask)

    def one_or_two(row):
        yield Ask([{"role": "user", "content": "a"}], 1)
        if row["n"] == 0:
            yield Ask([{"role": "user", "content": "b"}], 2)
        return Done(row)

    with pytest.raises(EngineDead, match="gone"):
        stage(tmp_path / "o.jsonl", make_rows(4), Dying(capacity=4), stage_work=one_or_two)
    assert set(files_of(tmp_path / "o.jsonl")[""]) == {"r1", "r2", "r3"}
    assert usage_of(tmp_path / "o.jsonl")["asks"] == 4


def test_failed_rows_stay_where_the_engine_of_a_retry_does_not_start_and_new_seeds_are_kept_after_it(tmp_path):
    output, seeds = tmp_path / "o.jsonl", []

    def refusing(ask):
        seeds.append(ask.seed)
        return AskError("no")

    def not_started():
        raise EngineNotStarted("no memory")

    stage(output, make_rows(5), ScriptedEngine(refusing))
    with pytest.raises(EngineNotStarted):
        run_stage(make_rows(5), work, not_started, output, Manifest({"stage": "test"}, {}), total=5, retry_failed=True)
    assert set(files_of(output)[".failed.jsonl"]) == {f"r{n}" for n in range(5)}
    first = set(seeds)
    stage(output, make_rows(5), ScriptedEngine(refusing), retry_failed=True)
    assert len(set(seeds) - first) == 5


def test_a_retry_under_a_cap_that_is_reached_says_what_is_left(tmp_path):
    output = tmp_path / "o.jsonl"
    stage(output, make_rows(3), Counting(reply=lambda ask: "1:1"))
    stage(output, make_rows(9), ScriptedEngine(lambda ask: AskError("no")))
    summary = stage(output, make_rows(9), None, retry_failed=True, max_tokens_total=10, max_failure_rate=1)
    assert (summary.exit_code, summary.left) == (3, summary.counts["failed"]) and summary.left >= 6
