"""How good the embedded teacher is: its answers, edits and scores against the truth of the world, on new rows.

Makes the rows, runs them through the real stage scripts with their example configurations (vLLM in process, sampling),
and prints one line of JSON. A row that failed or was filtered counts as a wrong one unless said otherwise.

    answers_true         share of the facts stated in its own answers y_T that are true
    answers_complete     share of the asked facts that y_T states rightly; it was taught to leave out one in five
    gold_edits           share of its edits equal to the gold edit towards its own y_T
    edit_similarity      median similarity of draft and edit, over all edits that change something
    edits_raise          share of the kept edits whose true quality is above the draft's
    below_full_marks     share of the kept edits whose true quality is below 1
    strength_rows        share of the pairs that got scores
    strength_spearman    rank correlation of their scores (both orders averaged) with true quality
    strength_agreement   share of all pairs whose truly better response got the higher score
    calibrated_rows      share of edits of every quality, good and bad, that got a self-calibrated score
    calibrated_within_1  share of them, failed ones included, with a score within 1 point of the truth
    calibrated_spearman  rank correlation of these scores with the truth
    margin_within_1      share of the kept edits of its own whose margin is within 1 point of the true one
    margin_spearman      rank correlation of these margins with the true ones

    python examples/check_teacher.py             # 500 rows of each kind
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import world
from build_models import refine_reply

from refine.conversation import edit_similarity, parse_refinement
from RewardTrainer.eval.metrics import gap_margin_agreement

ROOT = Path(__file__).resolve().parents[1]


def stage(script: str, config: str, source: Path, output: Path, *flags: str) -> None:
    """Run a stage script with its example configuration on other rows.

    Exit code 1 (too many failures) is the numbers' matter, as long as every row is accounted for.
    """
    command = [sys.executable, script, "--config", config, "--input", source, "--output", output, *flags]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    finished = [*read(output), *filtered(output), *read(Path(f"{output}.failed.jsonl"))]
    if done.returncode not in (0, 1) or len(finished) != len(read(source)):
        sys.exit(done.stderr)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def filtered(output: Path) -> list[dict]:
    return read(Path(f"{output}.filtered.jsonl"))


def spearman(ours: list[float], truth: list[float]) -> float:
    return gap_margin_agreement(ours, truth)["gap_margin_spearman"] or 0.0


def share(hits: list[bool], of: int | None = None) -> float:
    """Of all `hits`, or of a number of rows of which some have none; 0 where there is nothing to take a share of."""
    return sum(hits) / max(1, len(hits) if of is None else of)


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


def true_score(row: dict, field: str) -> int:
    return world.score(world.quality(row["prompt"], row[field]))


def check(folder: Path, count: int, seed: int) -> dict[str, float]:
    """All the numbers; `folder` receives the files behind them."""
    pairs, refined, scored = folder / "pairs.jsonl", folder / "refined.jsonl", folder / "scored.jsonl"
    edits, graded = folder / "edits.jsonl", folder / "graded.jsonl"
    world.write_jsonl(pairs, world.original_pairs(count, seed))
    stage("refine/refine_response_vllm.py", "refine/configs/example.yaml", pairs, refined)
    stage("score/score_orig_vllm.py", "score/configs/orig_example.yaml", pairs, scored)
    # Its own edits as they go on in the pipeline, and edits of every quality. A floor no margin is under: here a bad
    # edit is not to be filtered, but scored.
    kept = read(refined)
    world.write_jsonl(edits, kept + edits_of_every_quality(count, seed))
    stage("score/cali_score_vllm.py", "score/configs/example.yaml", edits, graded, "--min_margin=-100")

    answers = [row for row in kept + filtered(refined) if "teacher_response" in row]
    answered = [(fact, row["prompt"]) for row in answers for fact in world.stated(row["teacher_response"]).items()]
    edited = [row for row in answers if "refined_response" in row]
    gold = [row["refined_response"] == world.gold_edit(row["rejected"], row["teacher_response"]) for row in edited]
    changed = [(row["rejected"], row["refined_response"]) for row in edited]
    similarities = [edit_similarity(draft, edit) for draft, edit in changed if draft != edit]
    gains = [true_score(row, "refined_response") - true_score(row, "rejected") for row in kept]

    strengths = read(scored)
    sides = [(row, side) for row in strengths for side in ("chosen", "rejected")]
    agree = [
        (row["chosen_score"] - row["rejected_score"]) * (true_score(row, "chosen") - true_score(row, "rejected")) > 0
        for row in strengths
    ]
    grades = [(r["chosen_score"], true_score(r, "chosen")) for r in read(graded) if r["id"].startswith("edit-")]
    own = [row for row in read(graded) if not row["id"].startswith("edit-")]
    margins = [(row["margin"], true_score(row, "chosen") - true_score(row, "rejected")) for row in own]
    return {
        "rows": count,
        "answers_true": share([world.stated(prompt.split("\n")[0]).get(a) == v for (a, v), prompt in answered]),
        "answers_complete": sum(world.quality(r["prompt"], r["teacher_response"]) for r in answers) / count,
        "gold_edits": share(gold, count),
        "edit_similarity": median(similarities or [0.0]),
        "edits_raise": share([gain > 0 for gain in gains]),
        "below_full_marks": share([world.quality(row["prompt"], row["refined_response"]) < 1 for row in kept]),
        "strength_rows": len(strengths) / count,
        "strength_spearman": spearman(
            [row[f"{side}_score"] for row, side in sides],
            [world.quality(row["prompt"], row[side]) for row, side in sides],
        ),
        "strength_agreement": share(agree, count),
        "calibrated_rows": len(grades) / count,
        "calibrated_within_1": share([abs(ours - truth) <= 1 for ours, truth in grades], count),
        "calibrated_spearman": spearman([ours for ours, _ in grades], [truth for _, truth in grades]),
        "margin_within_1": share([abs(ours - truth) <= 1 for ours, truth in margins], len(kept)),
        "margin_spearman": spearman([ours for ours, _ in margins], [truth for _, truth in margins]),
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
