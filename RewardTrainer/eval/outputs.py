"""What an evaluation or a comparison leaves in its output directory, each file whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distiller.atomic import write_whole
from RewardTrainer.eval.evaluation import Evaluation, results, score_lines
from RewardTrainer.eval.markdown import build_markdown
from RewardTrainer.eval.report import Comparison, Run, build_report


def write_outputs(output_dir: Path, model: str, evaluations: list[Evaluation], settings: dict) -> None:
    """`report.html`, `results.md`, `scores.jsonl`, `results.json` of one model."""
    write_page(output_dir, [Run(model, evaluations)])
    write_whole(output_dir / "scores.jsonl", score_lines(evaluations))
    write_json(output_dir / "results.json", results(model, evaluations, settings))


def write_page(output_dir: Path, runs: Sequence[Run], comparisons: Sequence[Comparison] = ()) -> None:
    """`report.html` and `results.md`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which JSON may hold and UTF-8 may not, is written as a reference or an escape.
    write_whole(output_dir / "report.html", build_report(runs, comparisons).encode("utf-8", "xmlcharrefreplace"))
    write_whole(output_dir / "results.md", build_markdown(runs, comparisons).encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("ascii"))
