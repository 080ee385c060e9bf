import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from distiller import cli
from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.dry_run import dry_run, estimate
from distiller.engine import Ask, Completion, EngineDead
from distiller.records import InputError, read_rows
from distiller.runner import Done, ask_seed
from distiller.templates import PromptError, conversation_text, load_prompt


@dataclass
class DemoArguments(StageArguments):
    min_margin: float = flag(0.0, "a stage's own option")
    responses: list[str] | None = flag(None, "several files")
    PROMPT_FIELDS: ClassVar[tuple[str, ...]] = ("prompt_file",)


class Teacher:
    """Stands in for an LLM: says the prompt in capitals, and is gone at the prompt "die"."""

    capacity = 4

    def __init__(self):
        self.flying = []

    def submit(self, key, ask):
        self.flying.append((key, ask.messages[-1]["content"]))

    def collect(self):
        key, text = self.flying.pop(0)
        if text == "say: wait":
            print("waiting", flush=True)
            time.sleep(60)
        if text == "say: die":
            raise EngineDead("out of memory")
        return [(key, Completion(text.upper(), None, "stop", 3, 3, None))]

    def close(self):
        pass

    def facts(self):
        return {"name": "teacher"}


def make_work(args):
    template = load_prompt(args.prompt_file, {"prompt"})

    def work(row):
        content = template.render(prompt=row["prompt"])
        reply = yield Ask([{"role": "user", "content": content}], ask_seed(args.seed, row["id"]))
        return Done({**row, "said": reply.text})

    return work


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A repository with a stage's example configuration, and the current directory in its root."""
    (tmp_path / "stage" / "configs").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    config = "input: data/in.jsonl\noutput: data/out.jsonl\nmodel: tiny\nprompt_file: stage/say.txt\ntop_k: -1\n"
    (tmp_path / "stage" / "configs" / "example.yaml").write_text(config)
    (tmp_path / "stage" / "say.txt").write_text("say: {{ prompt }}\n")
    write_input(tmp_path, "a", "b", "c")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "make_engine", lambda args: Teacher())
    return tmp_path


def write_input(root, *prompts):
    (root / "data" / "in.jsonl").write_text("".join(json.dumps({"id": p, "prompt": p}) + "\n" for p in prompts))


def parse(world, *argv):
    return parse_stage_args(DemoArguments, world / "stage" / "configs" / "example.yaml", argv=list(argv))


def demo(world, *argv, **options):
    return run(parse(world, *argv), make_work, stage="demo", required={"prompt": ""}, **options)


def output(world):
    return {row["id"]: row for row in map(json.loads, (world / "data" / "out.jsonl").read_text().splitlines())}


def test_a_bare_command_takes_the_example_and_the_command_line_overrides(world):
    args = parse(world)
    assert (args.input, args.top_k, args.temperature, args.min_margin) == ("data/in.jsonl", -1, 0.7, 0.0)
    (world / "other.yaml").write_text(
        "model: big\nmin_margin: 1\ntemperature: 1e-1\noverwrite: true\nresponses: [x, y]\n"
    )
    args = parse(world, "--config", "other.yaml", "--min_margin", "2", "--overwrite", "false")
    assert (args.model, args.min_margin, args.temperature, args.overwrite) == ("big", 2.0, 0.1, False)
    assert (args.responses, args.input) == (["x", "y"], None)
    assert parse(world, "--config=other.yaml").overwrite is True


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("temprature: 1", "line 1: unknown key `temprature`, did you mean `temperature`?"),
        ("\nmax_tokens: many", "line 2: argument --max_tokens/--max-tokens: invalid int value: 'many'"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_configuration_names_file_and_key(world, capsys, config, message):
    (world / "wrong.yaml").write_text(config)
    with pytest.raises(SystemExit) as stopped:
        parse(world, "--config", "wrong.yaml")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "wrong.yaml" in said and message in said


def test_help_lists_every_argument_in_a_few_seconds_of_work(world):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, __file__, "--help"], capture_output=True, text=True, env=environment())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5  # nothing heavy is imported for it
    assert done.returncode == 0
    for name in ("--config", "--dry_run", "--tensor_parallel_size", "--min_margin", "(default: 2048)"):
        assert name in " ".join(done.stdout.split())


def test_a_run_writes_rows_and_a_manifest_without_secrets(world, capsys):
    url = "http://me:secret@host:8000/v1?key=secret"
    assert demo(world, "--base_url", url, "--enable_thinking", "false") == 0
    assert output(world) == {p: {"id": p, "prompt": p, "said": f"SAY: {p.upper()}"} for p in "abc"}
    text = (world / "data" / "out.jsonl.manifest.json").read_text()
    manifest = json.loads(text)
    assert "secret" not in text and manifest["made_with"]["base_url"] == "http://host:8000/v1"
    assert (manifest["stage"], manifest["model"], manifest["seed"]) == ("demo", "tiny", 0)
    assert manifest["sampling"] == {"temperature": 0.7, "top_p": 0.8, "top_k": -1, "max_tokens": 2048}
    assert manifest["options"]["min_margin"] == 0.0
    assert manifest["options"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(manifest["inputs"]["input"][0]) == len(manifest["prompts"]["prompt_file"][0]) == 64
    assert "transformers" in manifest["made_with"]["packages"]
    assert "3 rows done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["--seed=1", "--temperature=1", "--min_margin=1", "--model=other", "--max_tries=9"]
)
def test_what_changes_the_result_is_refused_on_a_rerun(world, capsys, argument):
    assert demo(world) == 0
    assert demo(world, argument) == 1
    assert f"{argument[2:].partition('=')[0]}: " in capsys.readouterr().err
    assert demo(world, argument, "--overwrite") == 0


def test_a_changed_prompt_or_input_is_refused_and_speed_options_are_not(world, capsys):
    assert demo(world, "--limit", "1") == 0
    assert demo(world, "--limit", "2", "--max_num_seqs", "3", "--gpu_memory_utilization", "0.5") == 0
    assert list(output(world)) == ["a", "b"]
    (world / "stage" / "say.txt").write_text("tell: {{ prompt }}")
    assert demo(world) == 1
    assert "the content of --prompt_file changed" in capsys.readouterr().err
    (world / "stage" / "say.txt").write_text("say: {{ prompt }}\n")
    write_input(world, "a", "b", "d")
    assert demo(world) == 1
    said = capsys.readouterr().err
    assert "the content of --input changed" in said and "alone into another file" in said


@pytest.mark.parametrize("file", ["model.safetensors", "modeling.py"])
def test_a_model_built_anew_at_the_same_place_is_another_model(world, capsys, file):
    (world / "tiny").mkdir()
    (world / "tiny" / file).write_bytes(b"0" * 100)
    assert demo(world) == 0
    (world / "tiny" / file).write_bytes(b"1" * 100)
    assert demo(world) == 1
    assert "the content of --model changed" in capsys.readouterr().err


def test_a_tilde_is_the_home_directory_in_a_file_as_on_the_command_line(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    (world / "tiny").mkdir()
    (world / "tiny" / "model.safetensors").write_bytes(b"0" * 100)
    (world / "home.yaml").write_text("model: ~/tiny\nresponses: [~/a.jsonl, b.jsonl]\n")
    args = parse(world, "--config", "home.yaml", "--input=~/data/in.jsonl", "--output=o.jsonl")
    assert (args.model, args.input) == (f"{world}/tiny", f"{world}/data/in.jsonl")
    assert args.responses == [f"{world}/a.jsonl", "b.jsonl"]
    assert args.identity("demo", {args.input: "0"})["model_files"] is not None


def test_a_dead_engine_is_exit_code_2_with_the_command_to_go_on(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage/run.py", "--limit", "9", "--overwrite"])
    write_input(world, "a", "die", "c")
    assert demo(world, "--overwrite") == 2
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "python stage/run.py --limit 9 --overwrite --overwrite false" in said
    assert list(output(world)) == ["a"]


def test_a_relative_path_that_is_there_from_the_root_says_so(world, capsys, monkeypatch):
    monkeypatch.chdir(world / "stage")
    assert demo(world) == 1
    assert (
        f"data/in.jsonl does not exist from {world / 'stage'}; run this command from {world}"
        in capsys.readouterr().err
    )


def test_a_missing_input_or_field_names_the_command_that_makes_it(world, capsys):
    assert demo(world, "--input", "data/none.jsonl", input_from="python stage/before.py") == 1
    assert "data/none.jsonl does not exist; to make it, run: python stage/before.py" in capsys.readouterr().err
    needs = {"prompt": "", "rejected": "python stage/before.py"}
    assert run(parse(world), make_work, stage="demo", required=needs) == 1
    said = capsys.readouterr().err
    assert "data/in.jsonl, line 1: field `rejected` is missing; to get it, run: python stage/before.py" in said
    assert not (world / "data" / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "data/in.jsonl"], "would write over an input"),
        (["--output", "data/../data/in.jsonl"], "would write over an input"),
        (["--top_p", "0"], "--top_p 0.0 is out of range"),
        (["--limit", "0"], "--limit 0 is out of range"),
        (["--temperature", "nan"], "--temperature nan is out of range"),
        (["--chat_template_kwargs", "[1]"], "JSON object"),
        (["--prompt_file", "none.txt"], "none.txt"),
        (["--columns", "x"], "ours=theirs"),
        (["--model", ""], "--model is needed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(world, capsys, argv, message):
    assert demo(world, *argv) == 1
    assert message in capsys.readouterr().err
    assert len(list((world / "data").iterdir())) == 1
    assert (world / "data" / "in.jsonl").stat().st_size


def test_remote_code_is_announced(world, capsys):
    assert demo(world, "--trust_remote_code") == 0
    assert "--trust_remote_code runs Python code of tiny" in capsys.readouterr().err


def test_dry_run_counts_rows_and_tokens_and_shows_two_prompts_and_writes_nothing(world, capsys):
    write_input(world, "a" * 40, "b" * 40, "c" * 40)
    with (world / "data" / "in.jsonl").open("a") as file:
        file.write("{broken\n" * 5)
    server = ("--base_url", "http://x/v1", "--model", "no/such-model", "--price_per_million", "1e6", "2e6")
    assert demo(world, "--dry_run", *server, "--max_tokens", "10") == 0
    said = capsys.readouterr().out
    assert "cost: at most 93 at" in said  # 33 x 1 + 30 x 2
    assert "rows: 8 (3 usable, finished ones included; 5 that cannot be used)" in said
    assert said.count("bad row: ") == 3 and "bad rows: 2 more" in said
    assert "prompt tokens: 33, from 3 rows, at 4 characters a token" in said
    assert "completion tokens: at most 30" in said
    assert "say: " + "a" * 40 in said and "say: " + "b" * 40 in said and "c" * 40 not in said
    assert [path.name for path in (world / "data").iterdir()] == ["in.jsonl"]


def test_dry_run_counts_with_the_teachers_own_template(world, capsys, tiny_teacher):
    assert demo(world, "--dry_run", "--model", str(tiny_teacher)) == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    turns = ([{"role": "user", "content": f"say: {p}"}] for p in "abc")
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    texts = [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    expected = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert f"prompt tokens: {expected}, from 3 rows, by the teacher's own tokenizer" in capsys.readouterr().out


def test_the_interval_covers_the_exact_total_about_95_times_in_100(tmp_path):
    """Of a file sorted by length, so that its first rows mislead."""
    draw = random.Random(0)
    sizes = sorted(int(draw.expovariate(1 / 200)) + 1 for _ in range(2000))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n, size in enumerate(sizes):
            file.write(json.dumps({"id": f"r{n}", "prompt": "x" * size}) + "\n" + "{broken\n" * (n % 100 == 50))
    rows = list(read_rows(tmp_path / "rows.jsonl", required={"prompt": ""}))

    def preview(row):  # short rows take two asks, as a row does whose teacher_response is missing
        return [[{"role": "user", "content": row["prompt"]}]] * (2 if len(row["prompt"]) < 100 else 1)

    def count(conversations):
        return [len(messages[0]["content"]) for messages in conversations]

    exact = sum(count([talk for row in rows if isinstance(row, dict) for talk in preview(row)]))
    exact_asks = sum(2 if size < 100 else 1 for size in sizes)
    hits, asks_hits, totals = 0, 0, []
    for seed in range(300):
        found = estimate(rows, preview, count, seed=seed, sample_size=200)
        assert (found.good, found.bad, found.sampled) == (2000, 20, 200)
        (total, half), (asks, asks_half) = found.prompt_tokens, found.asks
        hits += abs(total - exact) <= half
        asks_hits += abs(asks - exact_asks) <= asks_half
        totals.append(total)
    assert 0.91 < hits / 300 < 0.98 and 0.91 < asks_hits / 300 < 0.98
    assert sum(totals) / 300 == pytest.approx(exact, rel=0.01)
    whole = estimate(rows, preview, count, seed=0, sample_size=2000)
    assert (whole.prompt_tokens, whole.asks) == ((exact, 0.0), (exact_asks, 0.0))


def test_dry_run_bounds_the_completions_from_above_and_counts_rows_the_template_refuses(capsys):
    rows = [{"id": str(n), "prompt": "x", "asks": 1 + n % 2} for n in range(40)]

    def preview(row):
        return [[{"role": "user", "content": row["prompt"]}]] * row["asks"]

    found = estimate(rows, preview, lambda talks: [5] * len(talks), seed=0, sample_size=20)
    (asks, half), exact = found.asks, 60
    assert half > 0 and asks + half >= exact
    dry_run(rows, preview, lambda talks: [None] + [5] * (len(talks) - 1), 7, "by hand", 0)
    said = capsys.readouterr().out
    assert "refused by the chat template: 1 of 40 rows" in said and "prompt tokens: 295, from 40 rows" in said
    assert f"completion tokens: at most {59 * 7} (max_tokens 7 each)" in said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_keeps_the_rows(world, signum, code):
    write_input(world, "a", "wait", "c")
    child = subprocess.Popen(
        [sys.executable, __file__], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signum)
    said = child.communicate(timeout=20)[1]
    assert child.returncode == code
    assert f"stopped by {signum.name}" in said and "To go on, run: python" in said and "Traceback" not in said
    assert list(output(world)) == ["a"]


def test_a_prompt_file_is_strict_sandboxed_and_renders_its_values_once(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("Q: {{ prompt }}")
    assert load_prompt(path, {"prompt"}).render(prompt="{{ prompt }} {% if %}") == "Q: {{ prompt }} {% if %}"
    path.write_text("{{ promt }}")
    with pytest.raises(PromptError, match=r"p\.txt uses `promt`; it may use `prompt`"):
        load_prompt(path, {"prompt"})
    path.write_text("a\n{% if %}")
    with pytest.raises(PromptError, match=r"p\.txt, line 2"):
        load_prompt(path, {"prompt"})
    path.write_text("{{ prompt.__class__.__mro__ }}")
    with pytest.raises(PromptError, match=r"p\.txt"):
        load_prompt(path, {"prompt"}).render(prompt="x")
    path.write_text("{{ prompt.missing }}")
    with pytest.raises(PromptError, match="missing"):
        load_prompt(path, {"prompt"}).render(prompt="x")


def test_a_conversation_becomes_text_with_its_roles():
    assert conversation_text([{"role": "user", "content": "hi"}]) == "hi"
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert conversation_text(talk) == "System: s\n\nUser: u"


def test_a_stage_that_joins_files_gives_its_own_rows(world):
    rows = [{"id": "x", "prompt": "x"}]
    assert demo(world, rows=lambda: rows) == 0
    assert list(output(world)) == ["x"]


def test_engines_are_told_apart_by_base_url():
    args = DemoArguments(model="m", chat_template_kwargs='{"a": 1}')
    assert args.template_kwargs == {"enable_thinking": False, "a": 1}
    args = DemoArguments(model="m", base_url="http://x/v1")
    assert args.template_kwargs == {}
    args.enable_thinking = True
    engine = cli.make_engine(args)
    assert (type(engine).__name__, engine.capacity) == ("OpenAIEngine", 64)
    engine.close()
    with pytest.raises(InputError):
        _ = DemoArguments(chat_template_kwargs="{").template_kwargs


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


if __name__ == "__main__":
    cli.make_engine = lambda args: Teacher()
    default = Path("stage/configs/example.yaml")
    sys.exit(run(parse_stage_args(DemoArguments, default), make_work, stage="demo", required={"prompt": ""}))
