"""Evaluate a generative LLM as a judge: ask it about every pair of some benchmarks, write verdicts and tables.

    bash scripts/eval_judge.sh                    # the embedded teacher on the embedded benchmark
    bash scripts/eval_judge.sh --config configs/eval/judge_paper.yaml --benchmarks judgebench-gpt,llmbar
    bash scripts/eval_judge.sh --config configs/eval/judge_paper.yaml --base_url http://localhost:8000/v1

Four forms of prompt (--prompt_form), each in a file of RewardTrainer/eval/judge/prompts/ that can be edited or
replaced (--prompt_file): pairwise_scores, pairwise_verdict, pairwise_verdict_reasoned, pointwise_score. Pairs are
shown in both orders (--orders official: in those of the benchmark's official judge, which for RewardBench is one drawn
order, for RewardBench 2 all four responses at once).

It is a teacher stage like the others: it resumes, counts tokens, knows --dry_run, --retry_failed, --max_tokens_total
and --limit (rows of each benchmark). Written to the output directory:

    judgements.jsonl   the stage's own file, one line an ask; .failed.jsonl holds the asks without a readable reply
    verdicts.jsonl     one line a verdict: benchmark, id, subset, order, verdict (null: unreadable), raw
    scores.jsonl       with pointwise_score, one line a response: benchmark, id, subset, response, score, raw
    results.json       as of a reward model, with "judge" (how it was asked) and "judges" (what its verdicts say of it)
    results.md         the tables as Markdown
    report.html        the tables, and pairs it judged wrong in every order; opens offline

`python -m RewardTrainer.eval.rescore` makes the tables again from verdicts.jsonl or scores.jsonl.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from distiller.atomic import write_whole
from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.engine import Completion
from distiller.records import InputError
from distiller.runner import Done, Failed, RowWork, Work, ask_until, text_of
from distiller.templates import load_prompt
from RewardTrainer.eval.base import Benchmark, Item
from RewardTrainer.eval.benchmarks import load_benchmarks
from RewardTrainer.eval.evaluation import accuracy_table
from RewardTrainer.eval.judge.asks import (
    PAIRWISE_VARIABLES,
    POINTWISE_VARIABLES,
    ask_rows,
    check_prompt,
    render,
)
from RewardTrainer.eval.judge.outcome import Outcome, outcome_of, stage_rows, write_outcomes
from RewardTrainer.eval.judge.page import build_markdown, build_page, title_of, value_of
from RewardTrainer.eval.judge.replies import POINTWISE, READERS

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "eval" / "judge_example.yaml"
PROMPTS = Path(__file__).resolve().parent / "judge" / "prompts"
MESSAGES_SHOWN = 5


@dataclass
class JudgeArguments(StageArguments):
    """Flags of `eval_judge.sh`; a YAML file given with --config uses the same names."""

    input: str | None = field(default=None, init=False)
    columns: str | None = field(default=None, init=False)
    output: str | None = field(default=None, init=False)

    benchmarks: str = flag(
        "example", "comma-separated benchmark names and preference data (file, directory, hub dataset)"
    )
    data_dir: str | None = flag(None, "directory with benchmark files, one folder <name>/ for each benchmark")
    output_dir: str | None = flag(None, "default: ../output/eval/<model name>-<prompt form>")
    prompt_form: Literal["pairwise_scores", "pairwise_verdict", "pairwise_verdict_reasoned", "pointwise_score"] = flag(
        "pairwise_verdict_reasoned", "what is asked, and how the reply is read"
    )
    prompt_file: str | None = flag(
        None, "Jinja2 file with the prompt; knows prompt and responses (or response_a, response_b), pointwise response"
    )
    orders: Literal["official", "both"] = flag(
        "official", "both: show a pair in both orders also where the official judge sees one"
    )
    limit: int | None = flag(None, "only the first rows of each benchmark; may grow from run to run")
    temperature: float = flag(0.0, "sampling temperature; 0 is greedy")
    top_p: float = flag(1.0, "nucleus sampling")
    top_k: int = flag(-1, "sample from the k most likely tokens; -1 for all")
    max_tries: int = flag(
        1, "how often a reply that cannot be read is asked for; over 1 only with a temperature over 0"
    )
    digests: dict = field(default_factory=dict, init=False)
    """Benchmark -> hash of its content; with that part of the identity."""

    NEEDED = ("output", "model")
    INPUT_FIELDS = ()
    NOT_IDENTITY = StageArguments.NOT_IDENTITY | {"benchmarks", "data_dir", "output_dir"}

    def validate(self) -> None:
        self.prompt_file = self.prompt_file or str(PROMPTS / f"{self.prompt_form}.txt")
        if self.model:
            name = Path(self.model).resolve().name if Path(self.model).is_dir() else Path(self.model).name
            self.output_dir = self.output_dir or f"../output/eval/{name}-{self.prompt_form}"
            self.output = str(Path(self.output_dir) / "judgements.jsonl")
        super().validate()
        if self.max_tries > 1 and self.temperature == 0:
            raise InputError(f"--max_tries {self.max_tries}: at --temperature 0 every try gives the same reply; use 1")

    @property
    def asked_with(self) -> dict:
        """For results and report."""
        kwargs = self.template_kwargs
        return {
            "prompt_form": self.prompt_form,
            "prompt_file": Path(self.prompt_file).name,
            "orders": self.orders,
            "seed": self.seed,
            **{name: getattr(self.sampling, name) for name in ("temperature", "top_p", "top_k", "max_tokens")},
            **({"chat_template_kwargs": kwargs} if kwargs else {}),
        }


class Judging:
    """One run: the benchmarks, what is asked about them, and what comes of it."""

    def __init__(self, args: JudgeArguments):
        self.args = args
        self.outcomes: list[Outcome] = []

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """Raises InputError."""
        return load_benchmarks(self.args.benchmarks, Path(self.args.data_dir) if self.args.data_dir else None)

    def items(self, benchmark: Benchmark) -> list[Item]:
        return benchmark.items[: self.args.limit]

    def asks(self, benchmark: Benchmark) -> list[dict]:
        args = self.args
        return ask_rows(benchmark.name, self.items(benchmark), args.prompt_form, args.orders, args.seed)

    def rows(self) -> list[dict]:
        """The stage's rows. Raises InputError where nothing is to be asked."""
        self.args.digests = {benchmark.name: benchmark.digest for benchmark in self.benchmarks}
        rows = [row for benchmark in self.benchmarks for row in self.asks(benchmark)]
        if not rows:
            reasons = "\n  ".join(m for benchmark in self.benchmarks for m in benchmark.skipped[:MESSAGES_SHOWN])
            raise InputError(f"--benchmarks {self.args.benchmarks}: no row can be judged\n  {reasons}".rstrip())
        return rows

    def make_work(self, args: JudgeArguments) -> Work:
        """The stage's work on one ask. Raises PromptError or InputError."""
        form, read = args.prompt_form, READERS[args.prompt_form]
        template = load_prompt(args.prompt_file, POINTWISE_VARIABLES if form == POINTWISE else PAIRWISE_VARIABLES)
        check_prompt(template, form, self.benchmarks)
        items = {(b.name, *item.key): item for b in self.benchmarks for item in b.items}

        def judge(row: dict) -> RowWork:
            item = items[row["benchmark"], row["subset"], row["item"]]
            shown = [item.responses[index] for index in row["order"]]
            messages = [{"role": "user", "content": render(template, form, item.prompt, shown)}]

            def parse(reply: Completion) -> dict:
                return {**read(text_of(reply), len(shown)), "raw": reply.text}

            said = yield from ask_until(messages, parse, seed=args.seed, row_id=row["id"], max_tries=args.max_tries)
            return said if isinstance(said, Failed) else Done({**row, **said})

        return judge

    def report(self) -> str:
        """Write the results of all that is on disk; returns what there is to say about them."""
        args = self.args
        done, failed = stage_rows(args.output)
        self.outcomes = [
            outcome_of(b, self.items(b), self.asks(b), done, failed, args.prompt_form) for b in self.benchmarks
        ]
        directory = Path(args.output_dir)
        names = write_outcomes(directory, args.prompt_form, args.model, args.asked_with, self.outcomes)
        page = build_page(args.model, args.asked_with, self.outcomes)
        write_whole(directory / "report.html", page.encode("utf-8", "xmlcharrefreplace"))
        tables = build_markdown(args.model, args.asked_with, self.outcomes)
        write_whole(directory / "results.md", tables.encode("utf-8", "backslashreplace"))
        said = [line for outcome in self.outcomes for line in remarks(outcome)]
        return "\n".join([*said, f"written: {directory}/{', '.join([*names, 'results.md', 'report.html'])}"])


def remarks(outcome: Outcome) -> list[str]:
    """What was left out of a benchmark's numbers, and what was unreadable."""
    counts, name = outcome.counts, outcome.benchmark.name
    lines = [f"skipped: {message}" for message in counts["skipped_rows"][:MESSAGES_SHOWN]]
    lines += [f"refused: {message}" for message in counts["refused_asks"][:MESSAGES_SHOWN]]
    for count, what in (
        (counts["skipped"], f"of {counts['rows']} rows cannot be read"),
        (counts["unreadable"], f"of {counts['answered']} replies cannot be read"),
        (counts["refused"], f"of {counts['asks']} asks were refused; their rows cannot count"),
        (counts["not_run"], f"of {counts['asks']} asks are left to run"),
        (counts["rows_without_ask"], "rows need ratings (--prompt_form pointwise_score) and were not asked about"),
    ):
        if count:
            lines.append(f"{name}: {count} {what}")
    shorts = counts["short_subsets"].items()
    return lines + [f"{name}: {subset} has {rows} rows; averages are over what is there" for subset, rows in shorts]


def table(outcome: Outcome) -> str:
    """The benchmark's table and what its verdicts say about the judge, as plain text."""
    counts = outcome.counts
    head = accuracy_table(outcome.benchmark.name, outcome.summary, f"{counts['counted']} of {counts['rows']} rows")
    width = max(map(len, outcome.statistics))
    about = [f"  {title_of(name):<{width}}  {value_of(value):>7}" for name, value in outcome.statistics.items()]
    return "\n".join([head, "  judge:", *about])


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(JudgeArguments, DEFAULT_CONFIG, __doc__, argv)
    judging = Judging(args)
    code = run(args, judging.make_work, stage="eval_judge", rows=judging.rows, report=judging.report)
    if judging.outcomes:
        print("\n\n".join(map(table, judging.outcomes)))
    return code


if __name__ == "__main__":
    sys.exit(main())
