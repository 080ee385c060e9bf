"""How good the embedded teacher is: its edits and scores against the truth of the world, on rows it has never seen.

Makes new rows, runs them through the real stage scripts (vLLM in process), and prints one line of JSON:

    gold_edits           share of its edits equal to the gold edit towards its own answer y_T
    edit_similarity      median of the edits' similarity with what they edit
    below_full_marks     share of the kept edits whose true quality is below 1
    strength_spearman    rank correlation of pair scores (both orders averaged) with true quality
    calibrated_within_1  share of self-calibrated scores within 1 point of the truth, on edits of every quality
    calibrated_spearman  their rank correlation with the truth

    python examples/check_teacher.py             # 500 rows
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

import world
from build_models import refine_reply

from refine.conversation import parse_refinement
from RewardTrainer.eval.metrics import gap_margin_agreement

ROOT = Path(__file__).resolve().parents[1]


def stage(script: str, config: str, source: Path, output: Path, *flags: str) -> None:
    """Run a stage with its example configuration on other rows; exit code 1 (failures) is the numbers' matter."""
    command = [sys.executable, script, "--config", config, "--input", source, "--output", output, *flags]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not output.exists():
        sys.exit(done.stderr)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spearman(ours: list[float], truth: list[float]) -> float:
    return gap_margin_agreement(ours, truth)["gap_margin_spearman"] or 0.0


def edits_of_every_quality(count: int, seed: int) -> list[dict]:
    """Refined rows whose edit is any edit, good or bad, and whose rejected response has its true score."""
    rng = random.Random(f"edits-{seed}")
    rows = []
    for index in range(count):
        item = world.Item(rng, world.TRAIN_VALUES, world.TRAIN_THINGS)
        style = rng.randrange(3)
        draft = world.render(item.facts(rng, rng.randint(1, len(item.asked))), style)
        edit = world.render(item.facts(rng, rng.randint(0, len(item.asked))), style)
        diagnosis, refined = parse_refinement(refine_reply(draft, edit))
        rows.append(
            {
                "id": f"edit-{index}",
                "prompt": item.prompt,
                "chosen": world.render(item.truth, style),
                "rejected": draft,
                "rejected_score": world.score(world.quality(item.prompt, draft)),
                "teacher_response": item.teacher_answer(rng),
                "diagnosis": diagnosis,
                "refined_response": refined,
            }
        )
    return rows


def check(folder: Path, count: int, seed: int) -> dict[str, float]:
    """All the numbers; `folder` receives the files behind them."""
    pairs, refined, scored = folder / "pairs.jsonl", folder / "refined.jsonl", folder / "scored.jsonl"
    edits, graded = folder / "edits.jsonl", folder / "graded.jsonl"
    world.write_jsonl(pairs, world.original_pairs(count, seed))
    world.write_jsonl(edits, edits_of_every_quality(count, seed))
    stage("refine/refine_response_vllm.py", "refine/configs/example.yaml", pairs, refined)
    stage("score/score_orig_vllm.py", "score/configs/orig_example.yaml", pairs, scored)
    # A floor no margin is under: here a bad edit is not to be filtered, but scored.
    stage("score/cali_score_vllm.py", "score/configs/example.yaml", edits, graded, "--min_margin=-100")

    kept = read(refined)
    edited = kept + [row for row in read(Path(f"{refined}.filtered.jsonl")) if "refined_response" in row]
    gold = [row["refined_response"] == world.gold_edit(row["rejected"], row["teacher_response"]) for row in edited]
    sides = ("chosen", "rejected")
    strengths = [(row[f"{side}_score"], row["prompt"], row[side]) for row in read(scored) for side in sides]
    grades = [(row["chosen_score"], world.score(world.quality(row["prompt"], row["chosen"]))) for row in read(graded)]
    return {
        "rows": count,
        # A row without an edit, or without a score, counts as a wrong one.
        "gold_edits": sum(gold) / count,
        "edit_similarity": median(row["edit_similarity"] for row in kept),
        "below_full_marks": mean(world.quality(row["prompt"], row["refined_response"]) < 1 for row in kept),
        "strength_rows": len(strengths) / (2 * count),
        "strength_spearman": spearman([s for s, _, _ in strengths], [world.quality(p, r) for _, p, r in strengths]),
        "calibrated_within_1": sum(abs(ours - truth) <= 1 for ours, truth in grades) / count,
        "calibrated_spearman": spearman([ours for ours, _ in grades], [truth for _, truth in grades]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500, help="number of rows of each kind")
    parser.add_argument("--seed", type=int, default=987, help="seed of the rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(check(Path(folder), args.rows, args.seed)))


if __name__ == "__main__":
    main()
