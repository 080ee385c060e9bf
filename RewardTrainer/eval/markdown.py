"""`results.md`: the tables of the report as Markdown, to paste where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

from RewardTrainer.eval.evaluation import average_columns, shown
from RewardTrainer.eval.report import Comparison, Run


def build_markdown(runs: Sequence[Run], comparisons: Sequence[Comparison] = ()) -> str:
    """One section a benchmark: averages by model, accuracy by subset and model, paired comparisons."""
    sections = []
    for name in dict.fromkeys(e.benchmark.name for run in runs for e in run.evaluations):
        found = [(run.model, evaluation) for run in runs if (evaluation := run.on(name))]
        columns = list(dict.fromkeys(c for _, e in found for c in average_columns(e.summary)))
        averages = []
        for model, e in found:
            values, spans = average_columns(e.summary), average_columns(e.intervals)
            averages.append([plain(model), *(_estimate(values.get(c), spans.get(c)) for c in columns)])
        subsets = []
        for subset in dict.fromkeys(s for _, e in found for s in e.summary["subsets"]):
            cells = [e.summary["subsets"].get(subset, {}) for _, e in found]
            spans = [e.intervals["subsets"].get(subset) for _, e in found]
            accuracies = [_estimate(c.get("accuracy"), span) for c, span in zip(cells, spans, strict=True)]
            subsets.append([plain(subset), *accuracies, str(max(c.get("n", 0) for c in cells))])
        sections.append(f"## {plain(name)}\n\n{table(['model', *columns], averages)}")
        sections.append(table(["subset", *(plain(model) for model, _ in found), "n"], subsets))
        tests = [c for c in comparisons if c.benchmark == name]
        if tests:
            rows = [
                [
                    plain(c.first),
                    plain(c.second),
                    str(c.paired.rows),
                    _estimate(c.paired.difference, c.paired.interval),
                    f"{c.paired.p_value:.4f}",
                ]
                for c in tests
            ]
            sections.append(table(["first", "second", "rows", "second - first", "p (permutation)"], rows))
    return "Brackets are 95 % bootstrap intervals.\n\n" + "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are to be `plain`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text that stays inside its cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _estimate(value: float | None, interval: Sequence[float] | None) -> str:
    return shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")
