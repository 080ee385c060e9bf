"""Every teacher stage with teachers of many shapes (see teacher_shapes.py): tokenizers that split digits, write "10"
as one token, merge it with its neighbours or add BOS by themselves; templates with and without a system role, with a
switch for thinking; teachers that think. On real vLLM; the oracle for the probabilities is transformers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from teacher_shapes import DIAGNOSIS, GRADES, REFINED, SHAPES, THINKING, model_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TAGS = ["score_a", "score_b", "score"]
SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 120}
FILES = {name: f"examples/prompts/{name}.txt" for name in ("refine", "strength", "calibrate")}
PAIRS = [
    {
        "id": f"p{n}",
        "prompt": f"Which metal is bridge {n} made of?",
        "chosen": "The metal is iron, I think.",
        "rejected": "The metal is green.",
    }
    for n in range(3)
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which metal?"}]
ASKS = [
    [[{"role": "user", "content": "Which metal? <score>10</score>"}], TAGS],
    [[{"role": "user", "content": "iron " * 40}], TAGS],
    [
        [
            {"role": "user", "content": "Mend the draft."},
            {"role": "assistant", "content": "<refined>The metal is iron.</refined>"},
            {"role": "user", "content": "The draft got 3.5."},
        ],
        TAGS,
    ],
    [WITH_SYSTEM, TAGS],
]


def stage_jobs(name: str, model: Path, folder: Path) -> list[dict]:
    """The commands of all teacher stages for one teacher, greedy, each on what the one before wrote."""
    thinks = SHAPES[name].thinks and "enable_thinking" not in SHAPES[name].template_kwargs
    common = ["--model", str(model), "--max_model_len", "700", "--max_tokens", "120", "--temperature", "0"]
    common += ["--enable_thinking", "true"] if thinks else []
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    files = [word for n in ("refine", "strength") for word in (f"--{n}_prompt_file", FILES[n])]
    mode = ["--score_mode", "expected"]
    refined, tied = str(folder / "refined.jsonl"), folder / "tied.jsonl"
    scores = {"chosen_score": 5, "rejected_score": 5, "grades_by_order": [[5, 5], [5, 5]]}
    tied.write_text("".join(json.dumps(row | scores) + "\n" for row in PAIRS))
    return [
        {"stage": module, "argv": ["--input", str(source), "--output", str(folder / output), *flags, *common]}
        for module, source, output, flags in [
            ("refine.generate_response_vllm", pairs, "responses.jsonl", []),
            ("refine.refine_response_vllm", pairs, "refined.jsonl", ["--prompt_file", FILES["refine"]]),
            (
                "score.cali_score_vllm",
                refined,
                "scored.jsonl",
                ["--prompt_file", FILES["calibrate"], *files, *mode, "--verify", "true", "--min_margin=-9"],
            ),
            ("score.score_orig_vllm", pairs, "strength.jsonl", ["--prompt_file", FILES["strength"], *mode]),
            (
                "score.regrade_ties",
                tied,
                "regraded.jsonl",
                ["--prompt_file", FILES["strength"], *mode, "--turns", "1"],
            ),
        ]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    """A model for each shape."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("teacher_shapes.py")
    subprocess.run([sys.executable, str(script), str(folder / "models")], check=True, env=environment, timeout=1500)
    return {name: folder / "models" / model_of(name) for name in SHAPES}


@pytest.fixture(scope="module")
def runs(folder: Path, models: dict[str, Path]) -> dict[str, dict]:
    """Of each shape: the engine's answers, and the exit codes and words of the stages by their module."""
    jobs, owners = [], []
    for name, shape in SHAPES.items():
        arguments = {"model": str(models[name]), "max_model_len": 700, "chat_template_kwargs": shape.template_kwargs}
        place = folder / name
        place.mkdir()
        own = [{"arguments": arguments, "sampling": SAMPLED, "asks": ASKS}, *stage_jobs(name, models[name], place)]
        jobs += own
        owners += [name] * len(own)
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(jobs))
    driver = Path(__file__).with_name("shapes_driver.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(driver), str(job), str(result)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=3000)
    answers: dict[str, dict] = {name: {} for name in SHAPES}
    for name, one, answer in zip(owners, jobs, json.loads(result.read_text()), strict=True):
        answers[name][one.get("stage", "engine")] = answer
    return answers


def loaded(model: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def brute_force(model, tokenizer, shape, messages: list[dict], choices: dict) -> list[float]:
    """Log-probability of each reading, teacher-forced over whole conversations that are tokenized as one text.

    Counted are the tokens from the first that is not the same in all readings to the first that is again, both told
    by where the tokens lie in the text (an offset from its beginning, then from its end).
    """
    import torch

    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **shape.template_kwargs
    )
    readings = []
    for text in choices["texts"]:
        whole = rendered + choices["prefill"] + text + choices["rest"]
        coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ends = [len(whole) - start for start, _ in coded["offset_mapping"]]
        readings.append((coded["input_ids"], ends))
    shortest = min(len(ids) for ids, _ in readings)
    first = next(n for n in range(shortest) if len({ids[n] for ids, _ in readings}) > 1)
    common = set.intersection(*(set(zip(ids, ends, strict=True)) for ids, ends in readings))
    values = []
    for ids, ends in readings:
        again = max(n for n in range(len(ids)) if (ids[n], ends[n]) not in common) + 1
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(logprobs[n - 1, ids[n]].item() for n in range(first, again + 1)))
    return values


def digits_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_shapes_are_what_they_are_called(models):
    from transformers import AutoTokenizer

    text = "<score>10</score>"
    pieces = {name: digits_of(AutoTokenizer.from_pretrained(model), text) for name, model in models.items()}
    assert [p for p in pieces["split digits"] if p in ("1", "0", "10")] == ["1", "0"]
    assert "10" in pieces["whole ten"]
    assert any("10" in piece and piece != "10" for piece in pieces["merged, thinking opened"])
    tokenizer = AutoTokenizer.from_pretrained(models["sentencepiece"])
    assert tokenizer("iron")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.apply_chat_template(WITH_SYSTEM[1:], tokenize=False).startswith(tokenizer.bos_token)
    assert digits_of(tokenizer, "iron")[0].startswith("▁")


@pytest.mark.parametrize("name", SHAPES)
def test_every_grade_is_weighed_as_by_brute_force(runs, models, name):
    tokenizer, model = loaded(models[name])
    masses = []
    for (messages, _), answer in zip(ASKS[:3], runs[name]["engine"], strict=False):
        assert set(answer["weighed"]) == set(TAGS)
        for weighed in answer["weighed"].values():
            expected = brute_force(model, tokenizer, SHAPES[name], messages, weighed["choices"])
            assert weighed["logprobs"] == pytest.approx(expected, abs=1e-4)
            probabilities = [math.exp(value) for value in expected]
            masses.append(sum(probabilities))
            assert probabilities[9] > probabilities[4] / 2  # 10 is drawn oftener than 5, whatever its tokens
    assert min(masses) > 0.5 and max(masses) < 1 + 1e-4  # what is no grade at all has the rest


@pytest.mark.parametrize("name", SHAPES)
def test_thinking_is_kept_apart_and_the_reply_can_be_gone_on_from(runs, name):
    for answer in runs[name]["engine"][:3]:
        assert answer["text"].lstrip().startswith("<diagnosis>") and "think>" not in answer["text"]
        assert answer["reasoning"] == (THINKING if SHAPES[name].thinks else None)
        assert answer["prefix"].strip() == SHAPES[name].thinks.strip()
        for weighed in answer["weighed"].values():
            assert weighed["choices"]["prefill"].startswith(answer["prefix"])


def test_a_system_message_is_used_or_refused_and_never_left_out(runs):
    answers = {name: runs[name]["engine"][3] for name in SHAPES}
    assert "text" in answers["split digits"] and "text" in answers["sentencepiece"]
    assert "System role not supported" in answers["whole ten"]["error"]
    assert "leaves the system message out" in answers["merged, thinking opened"]["error"]
    for name in ("whole ten", "merged, thinking opened"):
        assert "first user message" in answers[name]["error"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", SHAPES)
def test_every_stage_writes_every_row_and_no_thinking(runs, folder, name):
    for stage, answer in runs[name].items():
        assert stage == "engine" or answer["code"] == 0, (stage, answer["said"])
    outputs = {
        output: rows(folder / name / f"{output}.jsonl")
        for output in ("responses", "refined", "scored", "strength", "regraded")
    }
    for output, written in outputs.items():
        assert sorted(row["id"] for row in written) == ["p0", "p1", "p2"], output
        assert THINKING not in json.dumps(written) and "think>" not in json.dumps(written)
    assert all(row["response"].startswith("<diagnosis>") for row in outputs["responses"])
    for row in outputs["refined"]:
        assert (row["diagnosis"], row["refined_response"]) == (DIAGNOSIS, REFINED)
    for row in outputs["scored"]:
        assert row["chosen"] == REFINED and isinstance(row["verified"], bool)
        assert row["verified"] == (sum(a - b for a, b in row["verify_grades_by_order"]) > 0)
    assert "asked blind" in runs[name]["score.cali_score_vllm"]["said"]


@pytest.mark.parametrize("name", SHAPES)
def test_the_score_of_a_finished_row_is_the_expected_one_by_brute_force(runs, models, folder, name):
    """From a greedy reply that transformers makes itself, to the scores in the file."""
    import torch

    from distiller.chat import thinking_marks
    from distiller.engine import Completion
    from distiller.templates import load_prompt
    from score.conversation import STRENGTH_VARIABLES, grade_choices, strength_messages

    tokenizer, model = loaded(models[name])
    shape = SHAPES[name]
    template = load_prompt(ROOT / FILES["strength"], STRENGTH_VARIABLES)
    row = {row["id"]: row for row in rows(folder / name / "strength.jsonl")}["p1"]
    pair = (PAIRS[1]["chosen"], PAIRS[1]["rejected"])
    by_order = []
    for order in (pair, pair[::-1]):
        messages = strength_messages(template, PAIRS[1]["prompt"], *order)
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **shape.template_kwargs
        )
        prompt = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(input_ids=prompt, max_new_tokens=120, do_sample=False)[0, prompt.shape[1] :]
        said = tokenizer.decode(output, skip_special_tokens=True)
        text, _ = thinking_marks().split(said, "<think>" if rendered.rstrip().endswith("<think>") else "")
        reply = Completion(text, None, "stop", 1, 1, None, prefix=said[: len(said) - len(text)])
        means = []
        for tag in ("score_a", "score_b"):
            choices = grade_choices(reply, tag)
            readings = {"prefill": choices.prefill, "texts": choices.texts, "rest": choices.rest}
            weights = [math.exp(value) for value in brute_force(model, tokenizer, shape, messages, readings)]
            means.append(sum(score * weight for score, weight in enumerate(weights, 1)) / sum(weights))
        by_order.append(means if order == pair else means[::-1])
    for ours, brute in zip(row["grades_by_order"], by_order, strict=True):
        assert ours == pytest.approx(brute, abs=2e-3)
    assert row["chosen_score"] == pytest.approx((by_order[0][0] + by_order[1][0]) / 2, abs=2e-3)
    assert row["chosen_score"] == pytest.approx(sum(GRADES) / len(GRADES), abs=1.0)
