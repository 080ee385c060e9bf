"""What becomes of a real LLM's replies under the shipped prompts, and of its rewards: rates of every outcome.

    python benchmarks/real_teacher.py --model HuggingFaceTB/SmolLM2-135M-Instruct        # 10 minutes on 2 cores
    python benchmarks/real_teacher.py --model path/of/any/instruct/model --pairs pairs.jsonl --rows 100 --train 0

Twelve short pairs written for this (`real_pairs.jsonl`), or yours, go through the commands with the paper's prompts,
sampling and so on: refinement; scoring with --verify; the strength of the original pairs; the judge with two forms of
prompt; then, unless `--train 0`, training with the same model as student and teacher for so many steps, and evaluation
of it. A small model's answers are poor: what counts is that each row ends where it belongs, and that no poor reply
passes for a sound one. Every command's output is kept in --work_dir. Last line: one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = ("reasons", "usage")  # of what is printed by itself
KINDS = {"done": "", "filtered": ".filtered.jsonl", "failed": ".failed.jsonl"}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def outcomes(output: Path) -> dict:
    """How many rows of a stage were done, filtered and failed, and why."""
    rows = {kind: rows_of(Path(f"{output}{ending}")) for kind, ending in KINDS.items()}
    reasons = {kind: Counter(row["reason"][:60] for row in rows[kind]) for kind in ("filtered", "failed")}
    return {kind: len(found) for kind, found in rows.items()} | {"reasons": reasons}


def usage(output: Path) -> dict:
    manifest = Path(f"{output}.manifest.json")
    return json.loads(manifest.read_text(encoding="utf-8")).get("usage", {}) if manifest.exists() else {}


class Commands:
    def __init__(self, args: argparse.Namespace, work: Path):
        self.work = work
        self.common = ["--model", args.model, "--max_tokens", args.max_tokens, "--max_model_len", args.max_model_len]
        self.common += ["--seed", args.seed]

    def run(self, name: str, *command: object) -> int:
        """Its exit code; its output is in a file."""
        words = [str(word) for word in command]
        print("$", *words, flush=True)
        with (self.work / f"{name}.log").open("w", encoding="utf-8") as log:
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode
        if code:
            print("".join((self.work / f"{name}.log").read_text(encoding="utf-8").splitlines(True)[-5:]), flush=True)
        return code

    def stage(self, name: str, script: str, source: str, *flags: object) -> dict:
        """source: the file in `work` that it reads."""
        output = self.work / f"{name}.jsonl"
        files = ("--input", self.work / source, "--output", output, "--max_failure_rate", 1)
        code = self.run(name, sys.executable, script, *self.common, *files, *flags)
        return {"exit_code": code, **outcomes(output), "usage": usage(output)}

    def judge(self, form: str, *flags: object) -> dict:
        output = self.work / form
        script = ROOT / "RewardTrainer/scripts/eval_judge.sh"
        config = ROOT / "RewardTrainer/configs/eval/judge_paper.yaml"
        code = self.run(
            form, "bash", script, "--config", config, *self.common, "--prompt_form", form, "--max_failure_rate", 1,
            "--benchmarks", self.work / "pairs.jsonl", "--output_dir", output, *flags,
        )  # fmt: skip
        found = {"exit_code": code, **outcomes(output / "judgements.jsonl")}
        by_row: dict[str, list] = {}
        for verdict in rows_of(output / "verdicts.jsonl"):
            # A verdict is a letter in the order shown; index 0 is the chosen response.
            letter = verdict["verdict"]
            said = letter if letter in (None, "tie") else verdict["order"]["AB".index(letter)]
            by_row.setdefault(str(verdict["id"]), []).append(said)
        both = [said for said in by_row.values() if len(said) == 2 and None not in said]
        return found | {"read_in_both_orders": len(both), "agree": sum(a == b for a, b in both)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local directory or hub name")
    parser.add_argument("--pairs", type=Path, default=ROOT / "benchmarks/real_pairs.jsonl")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--max_model_len", type=int, default=4096)
    parser.add_argument("--train", type=int, default=3, help="steps of training; 0: neither training nor evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path)
    args = parser.parse_args()
    if Path(args.model).is_dir():  # the scripts run elsewhere
        args.model = str(Path(args.model).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        lines = args.pairs.read_text(encoding="utf-8").splitlines()[: args.rows]
        (work / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        found = measure(args, Commands(args, work), work, len(lines))
    print()
    for name, result in found.items():
        reasons = result.get("reasons", {})
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items() if key not in HIDDEN))
        for kind, counted in reasons.items():
            for reason, count in counted.most_common():
                print(f"    {kind}: {count} x {reason}")
    print(json.dumps({"benchmark": "real_teacher", "model": args.model, "rows": len(lines), "ratios": {}, **found}))


def measure(args: argparse.Namespace, commands: Commands, work: Path, rows: int) -> dict[str, dict]:
    found = {
        "refine": commands.stage(
            "refine", "refine/refine_response_vllm.py", "pairs.jsonl", "--config", "refine/configs/paper.yaml"
        )
    }
    if found["refine"]["done"]:
        flags = ("--config", "score/configs/paper.yaml", "--verify", "true")
        found["score"] = commands.stage("score", "score/cali_score_vllm.py", "refine.jsonl", *flags)
        found["score"]["verified"] = sum(row["verified"] for row in rows_of(work / "score.jsonl"))
    found["strength"] = commands.stage(
        "strength", "score/score_orig_vllm.py", "pairs.jsonl", "--config", "score/configs/orig_paper.yaml"
    )
    for form in ("pairwise_scores", "pairwise_verdict"):
        found[form] = commands.judge(form)
    if args.train:
        # Where no row went all the way there are pairs enough all the same: of scores that are not the teacher's.
        train_file = work / "train.jsonl"
        with train_file.open("w", encoding="utf-8") as file:
            for i, row in enumerate(rows_of(work / "pairs.jsonl")):
                row |= {"teacher_response": row["chosen"], "chosen_score": 8.0, "rejected_score": 7.5 - 6 * i / rows}
                file.write(json.dumps(row | {"margin": row["chosen_score"] - row["rejected_score"]}) + "\n")
        script = ROOT / "RewardTrainer/scripts/train_distilrm.sh"
        code = commands.run(
            "train", "bash", script, "--config", "configs/train/paper.yaml", "--model_name_or_path", args.model,
            "--teacher_model", args.model, "--teacher_dtype", "float32", "--train_file", train_file, "--output_dir",
            work / "reward_model", "--max_steps", args.train, "--logging_steps", 1, "--save_strategy", "no",
            "--eval_ratio", 0, "--per_device_train_batch_size", 4, "--bf16", "false", "--head", "linear",
        )  # fmt: skip
        logs = work / "reward_model/trainer_state.json"
        history = json.loads(logs.read_text(encoding="utf-8"))["log_history"] if logs.exists() else []
        losses = [log["loss"] for log in history if "loss" in log]
        found["train"] = {"exit_code": code, "losses": [round(loss, 4) for loss in losses]}
        code = commands.run(
            "eval", "bash", ROOT / "RewardTrainer/scripts/eval_rm.sh", "--model", work / "reward_model",
            "--benchmarks", work / "pairs.jsonl", "--output_dir", work / "evaluated",
        )  # fmt: skip
        results = work / "evaluated/results.json"
        found["eval"] = {"exit_code": code}
        if results.exists():
            (subsets,) = [part["subsets"] for part in json.loads(results.read_text())["benchmarks"].values()]
            found["eval"]["accuracy"] = {name: part["accuracy"] for name, part in subsets.items()}
    return found


if __name__ == "__main__":
    main()
