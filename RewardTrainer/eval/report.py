"""`report.html`: one file, no script, nothing loaded from anywhere, so that it opens offline and can be mailed.

Every text that comes from a model or a data file is escaped; the page's own policy forbids scripts and remote content
besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from RewardTrainer.eval.evaluation import Evaluation, average_columns, shown

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 48, 34, 12  # plots, in pixels
CHOSEN, REJECTED = "#2166ac", "#d6604d"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 1rem }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 0.5rem; margin: 0.2rem 0 0.6rem }
summary { cursor: pointer }
svg { display: block; max-width: 100% } svg text { font-size: 11px; fill: #444 }
""".strip()


def build_report(model: str, evaluations: Sequence[Evaluation]) -> str:
    """The whole page.

    Args:
        model: name of the evaluated model
        evaluations: its benchmarks, in the order to show
    """
    title = f"Reward model evaluation: {escape(model)}"
    body = "\n".join(_section(evaluation) for evaluation in evaluations)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(evaluation: Evaluation) -> str:
    counts = evaluation.counts
    columns = average_columns(evaluation.summary)
    subsets = [[name, shown(row["accuracy"]), str(row["n"])] for name, row in evaluation.summary["subsets"].items()]
    fates = [[name.replace("_", " "), str(value)] for name, value in counts.items() if isinstance(value, int)]
    parts = [
        f"<h2>{escape(evaluation.benchmark.name)}</h2>",
        f"<p>Rows from {escape(evaluation.benchmark.source)}. A pair is right when the chosen reward is strictly "
        "greater.</p>",
        _table(list(columns), [[shown(value) for value in columns.values()]]),
        _table(["Subset", "Accuracy", "n"], subsets),
        "<h3>Rewards</h3>",
        _reward_histogram(evaluation),
    ]
    points = [
        (item.margin, row[right] - row[wrong])
        for item, row in zip(evaluation.items, evaluation.scores, strict=True)
        for right, wrong in item.pairs()
        if item.margin is not None
    ]
    if points:
        parts += ["<h3>Reward gap against margin</h3>", scatter(points, "margin", "reward gap")]
    parts += ["<h3>Most confident mistakes</h3>", _mistakes(evaluation), "<h3>Counts</h3>", _table(["", ""], fates)]
    if counts["skipped_rows"]:
        messages = "\n".join(counts["skipped_rows"])
        parts.append(f"<details><summary>Skipped rows</summary><pre>{escape(messages)}</pre></details>")
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _reward_histogram(evaluation: Evaluation) -> str:
    chosen, rejected = [], []
    for item, row in zip(evaluation.items, evaluation.scores, strict=True):
        for index, score in enumerate(row):
            (chosen if index in item.chosen else rejected).append(score)
    return histogram(chosen, rejected)


def histogram(chosen: Sequence[float], rejected: Sequence[float], bins: int = 30) -> str:
    """Rewards of chosen and rejected responses over common bins, as inline SVG; share of each kind upwards."""
    low, high = _range([*chosen, *rejected])
    shares = []
    for values in (chosen, rejected):
        heights = [0.0] * bins
        for value in values:
            heights[min(int((value - low) / (high - low) * bins), bins - 1)] += 1 / len(values)
        shares.append(heights)
    top = max(max(heights) for heights in shares)
    width = (WIDTH - LEFT) / bins
    bars = []
    for heights, colour in zip(shares, (CHOSEN, REJECTED), strict=True):
        for index, share in enumerate(heights):
            height = share / top * (HEIGHT - BOTTOM - TOP)
            if share:
                bars.append(
                    f'<rect x="{LEFT + index * width:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}" fill="{colour}" fill-opacity="0.55"/>'
                )
    legend = "".join(
        f'<rect x="{LEFT + 8 + offset}" y="{TOP}" width="10" height="10" fill="{colour}" fill-opacity="0.55"/>'
        f'<text x="{LEFT + 22 + offset}" y="{TOP + 9}">{label}</text>'
        for offset, colour, label in ((0, CHOSEN, "chosen"), (70, REJECTED, "rejected"))
    )
    return _plot(
        "Histogram of chosen and rejected rewards", "".join(bars) + legend, (low, high), (0, top), "reward", "share"
    )


def scatter(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """Points as inline SVG."""
    (x_low, x_high), (y_low, y_high) = _range([x for x, _ in points]), _range([y for _, y in points])
    dots = "".join(
        f'<circle cx="{LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT):.1f}" '
        f'cy="{TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP):.1f}" r="2.5" fill="{CHOSEN}" '
        f'fill-opacity="0.5"/>'
        for x, y in points
    )
    return _plot(f"{y_label} against {x_label}", dots, (x_low, x_high), (y_low, y_high), x_label, y_label)


def _plot(
    title: str, marks: str, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str
) -> str:
    floor = HEIGHT - BOTTOM
    labels = [
        (LEFT, floor + 14, "start", f"{x_range[0]:.3g}"),
        (WIDTH, floor + 14, "end", f"{x_range[1]:.3g}"),
        ((LEFT + WIDTH) / 2, floor + 28, "middle", x_label),
        (LEFT - 4, floor, "end", f"{y_range[0]:.3g}"),
        (LEFT - 4, TOP + 8, "end", f"{y_range[1]:.3g}"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(t)}</text>' for x, y, anchor, t in labels)
    middle = (TOP + floor) / 2
    upright = (
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    axes = f'<path d="M{LEFT} {TOP}V{floor}H{WIDTH}" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH + 8} {HEIGHT}" width="{WIDTH + 8}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">'
        f"{marks}{axes}{texts}{upright}</svg>"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value; a single value gets room on both sides."""
    low, high = min(values), max(values)
    if low == high:
        room = max(abs(low), 1.0) * 0.5
        return low - room, high + room
    return low, high


def _mistakes(evaluation: Evaluation, limit: int = 5, longest_text: int = 1500) -> str:
    """The pairs with the most negative gap, at most one for each row."""
    worst = []
    for item, row in zip(evaluation.items, evaluation.scores, strict=True):
        gap, right, wrong = min((row[right] - row[wrong], right, wrong) for right, wrong in item.pairs())
        if gap < 0:
            worst.append((gap, item, right, wrong))
    if not worst:
        return "<p>None.</p>"
    shown_rows = []
    for gap, item, right, wrong in sorted(worst, key=lambda row: row[0])[:limit]:
        prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in item.prompt)
        texts = (("Prompt", prompt), ("Chosen", item.responses[right]), ("Rejected", item.responses[wrong]))
        blocks = "".join(f"<b>{label}</b><pre>{escape(_clip(text, longest_text))}</pre>" for label, text in texts)
        heading = f"{escape(item.id)} ({escape(item.subset)}): gap {shown(gap)}, responses {right} and {wrong}"
        shown_rows.append(f"<details><summary>{heading}</summary>{blocks}</details>")
    return "\n".join(shown_rows)


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ... [{len(text) - longest} more characters]"
