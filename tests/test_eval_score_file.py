"""`score_file`: every response of the user's own file gets a reward beside it."""

import json
import subprocess
import sys

import pytest
from eval_fixtures import build_model, build_tokenizer, save_reward_model, write_jsonl

from distiller.arguments import parse_stage_args
from distiller.records import InputError
from RewardTrainer.eval.engines.hf import Scorer
from RewardTrainer.eval.run_eval_rm import DEFAULT_CONFIG, EvalArguments
from RewardTrainer.eval.score_file import ScoreFileArguments, conversations, default_output, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("score_file") / "rm")


def rewards(prompt: str, answers: list[str]) -> list[float]:
    tokenizer = build_tokenizer()
    scorer = Scorer(build_model(tokenizer), tokenizer)
    row = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers]
    return [reward for _, _, reward in sorted(scorer.score(scorer.encode([row])))]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_form_of_response_gets_its_column_and_other_fields_stay(model, tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "tin"}]
    rows = [
        {"id": "a", "prompt": "q", "response": "tin", "note": {"kept": [1, None]}},
        {"id": "b", "prompt": "q", "chosen": "tin", "rejected": [{"role": "assistant", "content": "red"}]},
        {"id": "c", "prompt": talk[:1], "responses": ["red", "tin", "tin red"]},
        {"id": "d", "messages": talk},
        {"id": "e", "prompt": "q", "teacher_response": "red", "response": "tin"},
    ]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    assert run(ScoreFileArguments(model=str(model), input=str(path))) == {"written": 5, "failed": 0, "cut": 0}
    tin, red, both = rewards("q", ["tin", "red", "tin red"])
    assert len({tin, red, both}) == 3
    expected = [
        {"reward": tin},
        {"chosen_reward": tin, "rejected_reward": red},
        {"rewards": [red, tin, both]},
        {"reward": tin},
        {"teacher_response_reward": red, "reward": tin},
    ]
    written = read(tmp_path / "mine.rewarded.jsonl")
    assert [{k: v for k, v in row.items() if k not in new} for row, new in zip(written, expected, strict=True)] == rows
    for row, new in zip(written, expected, strict=True):
        assert {name: row[name] for name in new} == {
            name: pytest.approx(value, abs=1e-5) for name, value in new.items()
        }


def test_rows_that_cannot_be_rewarded_are_kept_apart_with_their_reason_and_the_rest_is_in_order(model, tmp_path):
    hostile = [
        {"id": "0", "prompt": "q", "response": ""},
        {"id": "1", "prompt": "q"},
        {"id": "2", "prompt": None, "response": "tin"},
        {"id": "3", "prompt": "q", "responses": ["tin", None]},
        {"id": "4", "prompt": "q", "response": 5},
        {"id": "5", "messages": [{"role": "user", "content": "q"}]},
        {"id": "6", "prompt": "q", "response": "tin", "reward": 1.0},
        "{broken",
        {"id": "good0", "prompt": "q", "response": "again"},
    ]
    rows = [
        item for n, bad in enumerate(hostile) for item in ({"id": f"good{n}", "prompt": "q", "response": "x"}, bad)
    ]
    path, output = write_jsonl(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    counts = run(ScoreFileArguments(model=str(model), input=str(path), output=str(output)))
    assert counts == {"written": 9, "failed": 9, "cut": 0}
    assert [row["id"] for row in read(output)] == [f"good{n}" for n in range(9)]
    failed = {row["id"]: row["reason"] for row in read(tmp_path / "out.jsonl.failed.jsonl")}
    lines = {row["id"]: row["line"] for row in read(tmp_path / "out.jsonl.failed.jsonl") if "line" in row}
    assert lines == {"line-16": 16, "good0#18": 18}
    for name, words in {
        "0": "`response` is empty",
        "1": "no response",
        "2": "`prompt`",
        "3": "`responses[1]`",
        "4": "`response` must be",
        "5": "`messages`",
        "6": "`reward` is there already",
        "line-16": "not valid JSON",
        "good0#18": "field `id` came before",
    }.items():
        assert words in failed[name]


def test_a_response_of_50000_characters_is_rewarded_and_counted_as_cut(model, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "q", "response": "tin \x00" * 10_000}])
    assert run(ScoreFileArguments(model=str(model), input=str(path))) == {"written": 1, "failed": 0, "cut": 1}


def test_it_goes_on_where_it_was_and_refuses_to_mix_models(model, tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl", [{"id": str(n), "prompt": "q", "response": "x" * n} for n in range(1, 9)]
    )
    given = {"model": str(model), "input": str(path), "output": str(tmp_path / "out.jsonl")}
    run(ScoreFileArguments(**given, limit=3))
    assert len(read(tmp_path / "out.jsonl")) == 3
    first = (tmp_path / "out.jsonl").read_text()
    run(ScoreFileArguments(**given))
    whole = (tmp_path / "out.jsonl").read_text()
    assert whole.startswith(first) and [row["id"] for row in read(tmp_path / "out.jsonl")] == [*"12345678"]
    other = save_reward_model(tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="begun with other settings"):
        run(ScoreFileArguments(**{**given, "model": str(other)}))
    run(ScoreFileArguments(**{**given, "model": str(other)}, overwrite=True))
    assert len(read(tmp_path / "out.jsonl")) == 8 and (tmp_path / "out.jsonl").read_text() != whole


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "RewardTrainer.eval.score_file", "--model", "../nothing", "--input"]
    done = subprocess.run([*command, str(tmp_path / "no.jsonl")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'no.jsonl'} does not exist")
    assert "Traceback" not in done.stderr


def test_a_file_of_which_no_row_can_be_rewarded_fails_the_command(model, tmp_path):
    source = write_jsonl(tmp_path / "columns.jsonl", [{"instruction": "q", "better": "a"}])
    command = [sys.executable, "-m", "RewardTrainer.eval.score_file", "--model", str(model), "--input", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: no row could be rewarded")


@pytest.mark.parametrize("command", ["score_file", "best_of_n"])
def test_a_flag_that_is_not_there_ends_the_command_in_one_line(command):
    arguments = [sys.executable, "-m", f"RewardTrainer.eval.{command}", "--model", "m", "--imput", "i.jsonl"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "did you mean --input?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "messages", [[], "text", [{"role": "assistant", "content": "x"}], [{"role": "user", "content": "x"}, 5]]
)
def test_messages_of_another_form_are_refused(messages):
    with pytest.raises(InputError, match="`messages`"):
        conversations({"messages": messages})


def test_no_response_beside_messages_is_passed_over():
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "tin"}
    red = [ask, {"role": "assistant", "content": "red"}]
    assert conversations({"messages": [ask], "response": "red"}) == {"reward": [red]}
    assert conversations({"messages": [ask], "responses": ["red"]}) == {"rewards": [red]}
    pair = {"prompt": "q", "chosen": "tin", "rejected": "red"}
    assert conversations({"messages": [ask, answer], **pair}) == {
        "reward": [[ask, answer]],
        "chosen_reward": [[ask, answer]],
        "rejected_reward": [red],
    }
    assert conversations({"messages": [ask, answer], "teacher_response": "red"}) == {
        "reward": [[ask, answer]],
        "teacher_response_reward": [red],
    }
    for prompt in ({}, {"prompt": "q"}):
        with pytest.raises(InputError, match="`messages` and `response` both hold a response"):
            conversations({"messages": [ask, answer], "response": "red", **prompt})


def test_the_default_output_lies_beside_the_input(tmp_path):
    path = write_jsonl(tmp_path / "a.b.json", [])
    assert default_output(str(path)) == str(tmp_path / "a.b.rewarded.jsonl")
    assert default_output("org/data:train") == "data.rewarded.jsonl"


def test_equal_texts_have_one_reward_wherever_they_stand_in_the_file(tmp_path):
    adapter = tmp_path / "rounding.py"  # its rewards depend on the place in a batch, as any engine's last digits do
    adapter.write_text(
        "def load(model, device):\n    pass\n"
        "def score(loaded, conversations):\n"
        "    return [len(c[-1]['content']) + 1e-6 * place for place, c in enumerate(conversations)]\n"
    )
    rows = [{"id": str(n), "prompt": "p", "response": "same" if n % 97 == 0 else "x" * (n + 9)} for n in range(600)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    run(ScoreFileArguments(model="m", adapter=str(adapter), input=str(tmp_path / "in.jsonl"), output=f"{tmp_path}/o"))
    assert len({row["reward"] for row in read(tmp_path / "o") if row["response"] == "same"}) == 1


def test_a_file_in_the_home_directory_is_found_behind_a_comma(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--benchmarks", "example, ~/pairs.jsonl", "--model=~/rm"]
    args = parse_stage_args(EvalArguments, DEFAULT_CONFIG, argv=given)
    assert (args.benchmarks, args.model) == (f"example, {tmp_path}/pairs.jsonl", f"{tmp_path}/rm")
