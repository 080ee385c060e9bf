"""`report.html`: one file that opens offline and can be mailed; one model, or several side by side.

Nothing is loaded from anywhere. Every text that comes from a model or a data file is escaped, and the page's own
policy allows no script but the one that sorts its tables, by that script's hash.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from RewardTrainer.eval.confidence import Paired, accuracy_by_length, calibration
from RewardTrainer.eval.evaluation import Evaluation, average_columns, pair_gaps, shown, title
from RewardTrainer.eval.figures import bar_chart, calibration_curve, histogram, scatter

PAGE = Path(__file__).parent / "page"
MISTAKES = 5
LONGEST_TEXT = 3000
"""Characters of a text that the page shows."""
MOST_POINTS = 3000
"""Points of a scatter plot."""


@dataclass(frozen=True)
class Run:
    """A model and its benchmarks."""

    model: str
    evaluations: list[Evaluation]

    def on(self, benchmark: str) -> Evaluation | None:
        """Its evaluation on a benchmark, None where it has none."""
        return next((e for e in self.evaluations if e.benchmark.name == benchmark), None)


@dataclass(frozen=True)
class Comparison:
    """Two models on one benchmark."""

    benchmark: str
    first: str
    second: str
    paired: Paired


Cell = tuple[str, object]
"""(HTML of a table cell, value it is sorted by; None sorts last)"""


def build_report(runs: Sequence[Run], comparisons: Sequence[Comparison] = ()) -> str:
    """The whole page.

    Args:
        runs: the models, in the order to show
        comparisons: paired tests, if any
    """
    heading = f"Reward model evaluation: {escape(', '.join(run.model for run in runs))}"
    names = list(dict.fromkeys(e.benchmark.name for run in runs for e in run.evaluations))
    body = "\n".join(_section(name, runs, [c for c in comparisons if c.benchmark == name]) for name in names)
    script = (PAGE / "sort.js").read_text(encoding="utf-8")
    fingerprint = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{fingerprint}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{heading}</title>\n<style>\n{(PAGE / 'style.css').read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<h1>{heading}</h1>\n"
        "<p>Brackets are 95 % bootstrap intervals. A click on a heading sorts its table.</p>\n"
        f"{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _section(name: str, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    found = [(run.model, evaluation) for run in runs if (evaluation := run.on(name))]
    parts = [
        f"<h2>{escape(name)}</h2>",
        f"<p>Rows from {escape(found[0][1].benchmark.source)}.</p>",
        _averages_table(found),
        _subsets_table(found),
    ]
    if comparisons:
        parts += ["<h3>Paired comparison</h3>", _comparison_table(comparisons)]
    for model, evaluation in found:
        label = f" of {escape(model)}" if len(found) > 1 else ""
        parts += [
            f"<h3>Rewards{label}</h3>",
            _figures(evaluation),
            f"<h3>Most confident mistakes{label}</h3>",
            _mistakes(evaluation),
            f"<h3>Counts{label}</h3>",
            _counts(evaluation),
        ]
    return "\n".join(parts)


def _averages_table(found: Sequence[tuple[str, Evaluation]]) -> str:
    names = list(dict.fromkeys(column for _, e in found for column in average_columns(e.summary)))
    rows = []
    for model, evaluation in found:
        values = average_columns(evaluation.summary)
        spans = average_columns(evaluation.intervals)
        rows.append([_text(model), *(_estimate(values.get(name), spans.get(name)) for name in names)])
    return _table(["Model", *names], rows)


def _subsets_table(found: Sequence[tuple[str, Evaluation]]) -> str:
    """Accuracy by subset: of one model with the metric's further columns, of several in a column each."""
    subsets = list(dict.fromkeys(subset for _, e in found for subset in e.summary["subsets"]))
    single = len(found) == 1
    further = [column for column in found[0][1].benchmark.by_scores.columns if column != "accuracy"] if single else []
    rows = []
    for subset in subsets:
        cells = [evaluation.summary["subsets"].get(subset, {}) for _, evaluation in found]
        spans = [evaluation.intervals["subsets"].get(subset) for _, evaluation in found]
        accuracies = [_estimate(cell.get("accuracy"), span) for cell, span in zip(cells, spans, strict=True)]
        sizes = list(dict.fromkeys(cell.get("n", 0) for cell in cells))  # one, unless models lost different rows
        others = [_estimate(cells[0].get(column), None) for column in further]
        rows.append([_text(subset), *accuracies, *others, (", ".join(map(str, sizes)), sizes[0])])
    names = ["Accuracy"] if single else [model for model, _ in found]
    return _table(["Subset", *names, *map(title, further), "n"], rows)


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        paired = comparison.paired
        p_value = f"{paired.p_value:.4f}"
        rows.append(
            [
                _text(comparison.first),
                _text(comparison.second),
                (str(paired.rows), paired.rows),
                *(_estimate(overall, None) for overall in paired.overall),
                _estimate(paired.difference, paired.interval),
                (p_value, paired.p_value),
            ]
        )
    header = ["First", "Second", "Rows", "Overall, first", "Overall, second", "Second less first", "p (permutation)"]
    return _table(header, rows)


def _text(text: str) -> Cell:
    return escape(text), text


def _estimate(value: float | None, interval: Sequence[float] | None) -> Cell:
    spread = f" <small>[{shown(interval[0])}, {shown(interval[1])}]</small>" if interval else ""
    return shown(value) + spread, value


def _table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th><button type="button">{escape(cell)}</button></th>' for cell in header)
    body = "\n".join(
        "<tr>"
        + "".join(f'<td data-value="{"" if key is None else escape(str(key))}">{cell}</td>' for cell, key in row)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="sortable">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _figures(evaluation: Evaluation) -> str:
    chosen, rejected = [], []
    for item, row in zip(evaluation.items, evaluation.scores, strict=True):
        for index, score in enumerate(row):
            (chosen if index in item.chosen else rejected).append(score)
    gaps = pair_gaps(evaluation.items, evaluation.scores)
    lengths = [
        (len(item.responses[right]), len(item.responses[wrong]))
        for item in evaluation.items
        for right, wrong in item.pairs()
    ]
    points, error = calibration(gaps)
    figures = [
        (histogram(chosen, rejected), "Rewards of chosen and rejected responses."),
        (
            calibration_curve(points),
            "How often the preferred response of a pair is the right one, against the probability that its reward "
            f"gap claims (Bradley-Terry). Expected calibration error {shown(error)}.",
        ),
        (
            bar_chart(accuracy_by_length(lengths, gaps), "length of the right response against the wrong", "accuracy"),
            "Share of pairs with the right response ahead, by its length in characters (number of pairs).",
        ),
    ]
    margins = [item.margin for item in evaluation.items for _ in item.pairs()]
    with_margin = [(margin, gap) for margin, gap in zip(margins, gaps, strict=True) if margin is not None]
    if with_margin:
        step = -(-len(with_margin) // MOST_POINTS)  # rounded up
        drawn = with_margin[::step]
        text = f"Reward gap of a pair against its margin ({len(drawn)} of {len(with_margin)} pairs)."
        figures.append((scatter(drawn, "margin", "reward gap"), text))
    page = "\n".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in figures)
    return f'<div class="figures">\n{page}\n</div>'


def _mistakes(evaluation: Evaluation) -> str:
    """The pairs with the most negative gap, at most one for each row."""
    worst = []
    for item, row in zip(evaluation.items, evaluation.scores, strict=True):
        gap, right, wrong = min((row[right] - row[wrong], right, wrong) for right, wrong in item.pairs())
        if gap < 0:
            worst.append((gap, item, right, wrong))
    if not worst:
        return "<p>None.</p>"
    shown_rows = []
    for gap, item, right, wrong in sorted(worst, key=lambda row: row[0])[:MISTAKES]:
        prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in item.prompt)
        texts = (("Prompt", prompt), ("Chosen", item.responses[right]), ("Rejected", item.responses[wrong]))
        blocks = "".join(f"<b>{label}</b><pre>{escape(_clip(text))}</pre>" for label, text in texts)
        heading = f"{escape(item.id)} ({escape(item.subset)}): gap {shown(gap)}, responses {right} and {wrong}"
        shown_rows.append(f"<details><summary>{heading}</summary>{blocks}</details>")
    return "\n".join(shown_rows)


def _counts(evaluation: Evaluation) -> str:
    counts = evaluation.counts
    rows = [[_text(name.replace("_", " ")), (str(n), n)] for name, n in counts.items() if isinstance(n, int)]
    rows += [[_text(f"rows of {name}"), _text(count)] for name, count in counts["short_subsets"].items()]
    parts = [_table(["What", "Number"], rows)]
    if counts["skipped_rows"]:
        messages = "\n".join(counts["skipped_rows"])
        parts.append(f"<details><summary>Skipped rows</summary><pre>{escape(messages)}</pre></details>")
    return "\n".join(parts)


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... [{len(text) - LONGEST_TEXT} more]"
