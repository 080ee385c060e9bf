"""What a training leaves beside its model: statistics of the data, model card, plots, event files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from train_fixtures import pair_rows, tiny_model, tiny_tokenizer, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from RewardTrainer.train import run_reward_train
from RewardTrainer.train.data import encode_pairs, load_mixture
from RewardTrainer.train.data_stats import data_statistics, text_table
from RewardTrainer.train.losses import LOSSES
from RewardTrainer.train.plots import calibration, curves, draw_curves

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def train(root: Path, output: Path, rows: list[dict], *extra: str) -> Path:
    """A short run of the command in this process, on a random model."""
    if not (root / "student").exists():
        tiny_model(root / "student")
    write_rows(root / "pairs.jsonl", rows)
    run_reward_train.main(
        [
            *("--config", str(Path(run_reward_train.CONFIGS) / "example_bt.yaml"), "--output_dir", str(output)),
            *("--model_name_or_path", str(root / "student"), "--train_file", str(root / "pairs.jsonl")),
            *("--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", *extra),
        ]
    )
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outcome")


@pytest.fixture(scope="module")
def rated(root) -> Path:
    """A run on two weighted files with margins, a third of the first held out."""
    write_rows(root / "more.jsonl", pair_rows(20, seed=8))
    files = ("--train_file", f"{root / 'pairs.jsonl'},{root / 'more.jsonl'}", "--train_file_weights", "2,0.5")
    return train(
        root, root / "rated", pair_rows(40), "--loss_type", "margin_regression", "--eval_ratio", "0.3", *files
    )


def test_statistics_count_what_an_epoch_sees(tmp_path):
    rows = pair_rows(12)
    rows[3]["chosen"] = "red " * 200  # over-long
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", pair_rows(6, seed=1))
    mixture = load_mixture([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], weights=[2, 0.5])
    tokenizer = tiny_tokenizer()
    pairs, _ = encode_pairs(mixture.train, tokenizer, generative="teacher_response", max_length=150)
    first, second, both = data_statistics(mixture.files, pairs)
    counts = ("file", "read", "rows", "pairs", "dropped")
    assert [first[name] for name in counts] == ["a.jsonl", 12, 24, 22, 2]
    assert [second[name] for name in counts] == ["b.jsonl", 6, 3, 3, 0]
    assert [both[name] for name in counts] == ["all", 18, 27, 25, 2]

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    used = [row for i, row in enumerate(rows) if i != 3]
    prompts = [length(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n") for row in used]
    answers = {
        name: [length(f"<|im_start|>assistant\n{row[name]}<|im_end|>\n") for row in used]
        for name in ("chosen", "rejected")
    }
    answers["generated"] = [length(row["teacher_response"]) + 1 for row in used]
    for name, lengths in {"prompt": prompts, **answers}.items():
        twice = sorted(lengths * 2)
        stated = first["lengths"][name]
        assert (stated["mean"], stated["max"]) == (pytest.approx(sum(twice) / 22), twice[-1]), name
        assert stated["median"] == (twice[10] + twice[11]) / 2
        assert stated["p95"] == pytest.approx(twice[19] + 0.95 * (twice[20] - twice[19]), abs=1)
    header = length("<|im_start|>assistant\n")
    expected = 2 * (3 * sum(prompts) + sum(map(sum, answers.values())) + header * len(used))
    assert first["tokens"] == expected and both["tokens"] == first["tokens"] + second["tokens"]
    lines = text_table([first, second, both]).splitlines()
    assert len(lines) == 5 and f"{expected:,}" in lines[2] and lines[4].startswith("all")


def test_prompt_that_was_cut_is_counted_as_it_is_trained_on():
    rows = pair_rows(3)
    rows[0]["prompt"] = "red " * 100
    whole, _ = encode_pairs(rows, tiny_tokenizer())
    cut, counts = encode_pairs(rows, tiny_tokenizer(), max_length=80, overlong="truncate_prompt")
    assert counts["truncated"] == 1
    assert whole[0]["prompt_tokens"] - cut[0]["prompt_tokens"] == cut[0]["truncated"] > 0
    for one, other in zip(whole, cut, strict=True):  # the answer stays whole
        assert (
            len(one["chosen_input_ids"]) - one["prompt_tokens"]
            == len(other["chosen_input_ids"]) - other["prompt_tokens"]
        )


def test_metrics_and_card_have_the_numbers_of_the_run(rated, root):
    metrics = json.loads((rated / "metrics.json").read_text())
    assert [(e["file"], e["weight"]) for e in metrics["data"]] == [
        ("pairs.jsonl", 2),
        ("more.jsonl", 0.5),
        ("all", None),
    ]
    assert metrics["data"][-1]["pairs"] == metrics["counts"]["train"]["pairs"]
    assert metrics["calibration"]["slope"] == metrics["after"]["eval_gap_margin_slope"]
    assert metrics["calibration"]["spearman"] == metrics["after"]["eval_gap_margin_spearman"]
    assert sum(one["pairs"] for one in metrics["calibration"]["deciles"]) == metrics["counts"]["eval"]["pairs"]
    card = (rated / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-classification")
    assert head["base_model"] == "student" and "reward-model" in head["tags"] and "datasets" not in head
    for number in ("eval_accuracy", "eval_gap_margin_pearson"):
        cells = " | ".join(f"{metrics[when][number]:.4g}" for when in ("before", "after"))
        assert f"| {number.removeprefix('eval_')} | {cells} |" in card
    assert f"slope {metrics['calibration']['slope']:.4g}" in card
    assert metrics["speed"]["step_seconds"] > 0 and "mfu" not in metrics["speed"]  # a CPU has no peak that is known
    assert f"a CPU: {metrics['speed']['step_seconds']:.4g} s a step" in card
    assert f"{metrics['speed']['tokens_per_second']:.0f} tokens a second" in card
    assert "| `loss_type` | margin_regression |" in card and "| `learning_rate` | 0.00025 |" in card
    assert "| pairs.jsonl | 2 | 40 |" in card
    for text in (card, (rated / "metrics.json").read_text()):
        assert str(root) not in text and "/" not in head["base_model"]


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_code_of_the_card_runs_and_gives_the_rewards_of_the_model(rated, place):
    block = re.search(r"```python\n(.*?)```", (rated / "README.md").read_text(), re.DOTALL).group(1)
    if place:
        block = block.replace('path = "."', f"path = {str(rated)!r}")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=rated if place is None else rated.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(rated)
    model = AutoModelForSequenceClassification.from_pretrained(rated).eval()
    turns = (("user", "Which metal melts at 30 degrees Celsius?"), ("assistant", "Gallium."))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert len(printed) == 2
    assert printed[0] == pytest.approx(model(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-4)


def test_plots_are_pictures_beside_the_model(rated):
    for name in ("calibration.png", "curves.png"):
        assert (rated / name).read_bytes().startswith(PNG) and (rated / name).stat().st_size > 5000


def test_run_without_margins_and_held_out_rows_has_a_card_and_no_calibration(root, tmp_path):
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in pair_rows(12)]
    output = train(root, tmp_path / "bare", rows, "--eval_ratio", "0")
    assert "No pairs were held out" in (output / "README.md").read_text()
    assert not (output / "calibration.png").exists() and (output / "curves.png").exists()
    output = train(root, tmp_path / "held", rows, "--eval_ratio", "0.3")
    assert not (output / "calibration.png").exists()
    assert "## Held-out pairs" in (output / "README.md").read_text()
    assert json.loads((output / "metrics.json").read_text())["calibration"] is None


def test_deciles_part_the_pairs_by_margin_and_keep_equal_margins_together():
    generator = np.random.default_rng(0)
    margin = generator.permutation(np.arange(100.0))
    numbers = calibration(0.5 * margin - 3, margin)
    assert [one["pairs"] for one in numbers["deciles"]] == [10] * 10
    assert [one["margin"] for one in numbers["deciles"]] == [10 * i + 4.5 for i in range(10)]
    assert [one["gap"] for one in numbers["deciles"]] == pytest.approx([5 * i - 0.75 for i in range(10)])
    assert [numbers[name] for name in ("slope", "pearson", "spearman")] == pytest.approx([0.5, 1, 1])
    few = np.array([1.0] * 30 + [2.0] * 60 + [9.0] * 10)
    gap = generator.normal(size=100)
    groups = calibration(gap, few)["deciles"]
    assert [(one["margin"], one["pairs"]) for one in groups] == [(1, 30), (2, 60), (9, 10)]
    assert [one["gap_std"] for one in groups] == pytest.approx([gap[few == value].std() for value in (1, 2, 9)])
    assert calibration(gap, np.ones(100)) is None and calibration(gap, None) is None


def test_curves_have_every_logged_point_and_nothing_else(tmp_path):
    history = [
        {"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.5},
        {"step": 1, "loss": 1.5, "loss_reward": 1.5, "accuracy": 0.5, "learning_rate": 0.1},
        {"step": 2, "loss": 1.0, "loss_reward": 1.0, "accuracy": 0.75, "learning_rate": 0.05},
        {"step": 2, "eval_loss": 1.25, "eval_accuracy": 0.75},
        {"step": 2, "train_loss": 1.25},
    ]
    panels = curves(history)
    assert list(panels) == ["loss", "accuracy", "learning rate"]
    assert panels["loss"] == {
        "loss": [(1, 1.5), (2, 1.0)],
        "loss_reward": [(1, 1.5), (2, 1.0)],
        "eval_loss": [(0, 2.0), (2, 1.25)],
    }
    assert not draw_curves(tmp_path / "none.png", [{"step": 2, "train_loss": 1.0}])
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_gets_the_terms_of_the_loss(root, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(root, tmp_path / "run", pair_rows(24), "--report_to", "tensorboard", "--eval_ratio", "0.3")
    # The last evaluation, after the end of training, has a file of its own in the same directory.
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    for tag, name in (("train/loss_reward", "loss_reward"), ("train/gap", "gap"), ("train/accuracy", "accuracy")):
        logged = [log[name] for log in history if name in log]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(logged, rel=1e-5) and len(logged) == 4
    assert len(events.Scalars("eval/gap_margin_spearman")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_on_the_embedded_world_through_the_script(loss_type, tmp_path):
    rows = [json.loads(line) for line in (EXAMPLES / "data/pairs.jsonl").read_text().splitlines()[:40]]
    generator = np.random.default_rng(0)
    for row in rows:
        scores = generator.integers(1, 11, size=2).tolist()
        row |= {"chosen_score": max(scores), "rejected_score": min(scores), "teacher_response": row["chosen"]}
    data, output = write_rows(tmp_path / "scored.jsonl", rows), tmp_path / "out"
    command = ["bash", str(run_reward_train.CONFIGS.parents[1] / "scripts/train_rm.sh"), "--loss_type", loss_type]
    command += ["--train_file", str(data), "--output_dir", str(output), "--max_steps", "3", "--save_strategy", "no"]
    command += ["--logging_steps", "1", "--teacher_model", str(EXAMPLES / "teacher")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    terms = {name for log in history for name in log if name.startswith("loss_")}
    expected = {"grm": {"loss_sft"}, "distilrm": {"loss_sft", "loss_kl"}}.get(loss_type, set())
    assert terms == {"loss_reward"} | expected
    assert all(np.isfinite(log["loss"]) for log in history if "loss" in log)
    assert f"`{loss_type}`" in (output / "README.md").read_text()
    assert AutoModelForSequenceClassification.from_pretrained(output).config.num_labels == 1
