"""`report.html` and `results.md` of a judge. The page is one file, no script, nothing loaded from anywhere. Every text
that comes from a model or a data file is escaped, and the page's own policy forbids scripts and remote content
besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from RewardTrainer.eval.base import TIE, Item
from RewardTrainer.eval.evaluation import average_columns, shown
from RewardTrainer.eval.judge.bias import Judged
from RewardTrainer.eval.judge.outcome import Outcome
from RewardTrainer.eval.markdown import plain, table

MISTAKES = 5
LONGEST_TEXT = 1500
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 1rem }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 0.5rem; margin: 0.2rem 0 0.6rem }
summary { cursor: pointer }
""".strip()


def build_page(model: str, judge: Mapping, outcomes: Sequence[Outcome]) -> str:
    """The whole page.

    Args:
        model: name of the judge
        judge: how it was asked
        outcomes: its benchmarks, in the order to show
    """
    title = f"Judge evaluation: {escape(model)}"
    asked = _table(["Asked with", ""], [[title_of(name), str(value)] for name, value in judge.items()])
    body = "\n".join(_section(outcome) for outcome in outcomes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{asked}\n"
        f"<p>Brackets are 95 % bootstrap intervals.</p>\n{body}\n"
        "</body>\n</html>\n"
    )


def build_markdown(model: str, judge: Mapping, outcomes: Sequence[Outcome]) -> str:
    """`results.md`: every table of the page as Markdown. Arguments as `build_page`."""
    asked = ["Asked with", ""], [[title_of(name), str(value)] for name, value in judge.items()]
    parts = [f"# Judge evaluation: {plain(model)}", _markdown_table(*asked), "Brackets are 95 % bootstrap intervals."]
    for outcome in outcomes:
        averages, subsets, statistics, counts = _tables(outcome)
        parts += [f"## {plain(outcome.benchmark.name)}", _markdown_table(*averages), _markdown_table(*subsets)]
        parts += ["### The judge", _markdown_table(*statistics), "### Counts", _markdown_table(*counts)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return table([plain(cell) for cell in header], [[plain(cell) for cell in row] for row in rows])


def _tables(outcome: Outcome) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of averages, subsets, what the verdicts say about the judge, and counts."""
    columns, spans = average_columns(outcome.summary), average_columns(outcome.intervals)
    subsets, subset_spans = outcome.summary["subsets"], outcome.intervals["subsets"]
    further = [name for name in next(iter(subsets.values()), {}) if name not in ("accuracy", "n")]
    rows = [
        [
            name,
            _estimate(row["accuracy"], subset_spans.get(name)),
            *(shown(row[column]) for column in further),
            str(row["n"]),
        ]
        for name, row in subsets.items()
    ]
    counts = [[title_of(name), str(value)] for name, value in outcome.counts.items() if isinstance(value, int)]
    return [
        (list(columns), [[_estimate(value, spans.get(name)) for name, value in columns.items()]]),
        (["Subset", "Accuracy", *map(title_of, further), "n"], rows),
        (["", ""], [[title_of(name), value_of(value)] for name, value in outcome.statistics.items()]),
        (["", ""], counts),
    ]


def _section(outcome: Outcome) -> str:
    averages, subsets, statistics, counts = (_table(*content) for content in _tables(outcome))
    parts = [
        f"<h2>{escape(outcome.benchmark.name)}</h2>",
        f"<p>Rows from {escape(outcome.benchmark.source)}.</p>",
        averages,
        subsets,
        "<h3>The judge</h3>",
        statistics,
    ]
    if any(outcome.judged):
        parts += ["<h3>Wrong in every order</h3>", _mistakes(outcome)]
    parts += ["<h3>Counts</h3>", counts]
    for name in ("skipped_rows", "refused_asks"):
        if outcome.counts[name]:
            messages = escape("\n".join(outcome.counts[name]))
            parts.append(f"<details><summary>{title_of(name)}</summary><pre>{messages}</pre></details>")
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _estimate(value: float | None, interval: Sequence[float] | None) -> str:
    return shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")


def title_of(name: str) -> str:
    """`both_right` -> Both right."""
    return name[:1].upper() + name[1:].replace("_", " ")


def value_of(value: float | int | None) -> str:
    """A count as it is, a share with three decimals, a dash where there is none."""
    return str(value) if isinstance(value, int) else shown(value)


def _mistakes(outcome: Outcome) -> str:
    """Rows with every one of their verdicts on a pair for the wrong response: the label may be wrong, or the judge."""
    wrong = [
        (item, pair)
        for item, row in zip(outcome.items, outcome.judged, strict=True)
        if (pair := _always_wrong(item, row))
    ]
    return "\n".join(_mistake(item, pair) for item, pair in wrong[:MISTAKES]) or "<p>None.</p>"


def _always_wrong(item: Item, row: Sequence[Judged]) -> list[Judged]:
    """The verdicts on the first pair that all name the wrong response; empty where there is none."""
    pairs: dict[frozenset[int], list[Judged]] = {}
    for each in row:
        pairs.setdefault(frozenset(each.verdict.order), []).append(each)
    for pair in pairs.values():
        winners = {each.verdict.winner for each in pair}
        if not winners & {None, TIE, *item.chosen}:
            return pair
    return []


def _mistake(item: Item, pair: Sequence[Judged]) -> str:
    prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in item.prompt)
    texts = [("Prompt", prompt)]
    for index in sorted(pair[0].verdict.order):
        label = "chosen" if index in item.chosen else "rejected"
        texts.append((f"Response {index} ({label})", item.responses[index]))
    texts += [(f"Reply, shown in the order {list(each.verdict.order)}", each.raw) for each in pair]
    blocks = "".join(f"<b>{escape(label)}</b><pre>{escape(_clip(text))}</pre>" for label, text in texts)
    return f"<details><summary>{escape(item.id)} ({escape(item.subset)})</summary>{blocks}</details>"


def _clip(text: str) -> str:
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} ... [{rest} more characters]"
