"""After stage 1 or 2, without a teacher: drop the pairs that are not worth training on, and say why.

Reads pairs (`prompt`, `chosen`, `rejected`, and what the stages added) and writes those that pass every gate,
unchanged and in their order. Where a row has a `refined_response`, that is its better response, else `chosen` is.
Always dropped: a better response equal to the rejected one, and a pair (prompt and both responses) that came before.
Every other gate is off until its flag is given. They are asked in this order:

    --min_margin X             margin X or less, as in stage 2; without `margin`, chosen_score - rejected_score
    --min_edit_similarity X    the edit kept less of the words
    --max_edit_similarity X    the edit kept more of the words
    --max_length_ratio X       words of the longer response over words of the shorter one
    --judge_agreement          the teacher scored the response that was labelled better below the rejected one
    --benchmarks FILE ...      the prompt has --ngram words in a row in common with a benchmark prompt; case,
                               punctuation and markup do not count. A prompt of fewer words is met by the same one
    --duplicates exact, near   prompt and rejected response, or the prompt alone (--duplicate_key prompt), came before;
                               near: their runs of three words agree by --near_threshold (Jaccard) or more

Of two duplicates the first stays, unless another gate dropped it. A dropped row goes to <output>.filtered.jsonl with
`reason`, the gate, and `reason_value`, what it saw; an unusable line, or one without a field that a gate needs, to
<output>.failed.jsonl. The three files are put in place together at the end. The same command may run again and writes
the same; one that would write something else is refused unless --overwrite is given. Rows are read one by one: in
memory stay their ids and some numbers, with `near` their signatures, and the benchmarks' n-grams.

    # what stage 2 wrote, data/scored.jsonl, to data/train.jsonl: the two gates that are always on, and the spread of
    # margins, edit similarities and lengths, from which to choose the others
    python refine/filter_pairs.py

    # the gates that fit a training set for public benchmarks
    python refine/filter_pairs.py --overwrite --min_margin 0.5 --min_edit_similarity 0.3 --max_length_ratio 2 \\
        --judge_agreement --duplicates near --benchmarks data/rm-bench/total_dataset.json allenai/reward-bench:filtered
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from distiller.arguments import FileArguments, flag
from distiller.cli import check_made, exit_code_of, parse_stage_args
from distiller.fields import Unfit
from distiller.manifest import Manifest, identity_of_input, made_with
from distiller.records import BadRow, InputError, parse_columns, read_rows, survey
from distiller.runner import BAD_ROWS_SHOWN, Progress
from distiller.sources import values
from distiller.whole_files import WholeFiles
from refine import gates
from refine.decontamination import Benchmarks, benchmark_prompts
from refine.gates import Gate, Pair, Statistics

MADE_BY = "python refine/refine_response_vllm.py, then python score/cali_score_vllm.py"
UNBOUNDED = (-math.inf, math.inf)


@dataclass
class FilterArguments(FileArguments):
    """Arguments of the filter."""

    input: str | None = flag(
        "data/scored.jsonl",
        "a file (JSONL, JSON, CSV, Parquet, Arrow), a saved dataset, or a hub dataset `owner/name[:config][:split]`",
    )
    output: str | None = flag(
        "data/train.jsonl", "JSONL file to write; <output>.filtered.jsonl, .failed.jsonl, .manifest.json beside it"
    )
    min_margin: float | None = flag(None, "drop pairs with this margin or a smaller one")
    min_edit_similarity: float | None = flag(None, "drop edits that kept a smaller share of the words")
    max_edit_similarity: float | None = flag(None, "drop edits that kept a greater share of the words")
    max_length_ratio: float | None = flag(None, "drop pairs whose one response has more than so many times the words")
    judge_agreement: bool = flag(False, "drop pairs whose scores contradict the label; a tie does not")
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "files or hub datasets, as for --input, whose prompts must not be trained on"},
    )
    ngram: int = flag(13, "words in a row that make an overlap with a benchmark prompt")
    duplicates: Literal["none", "exact", "near"] = flag("none", "drop duplicates; near ones include exact ones")
    duplicate_key: Literal["prompt+rejected", "prompt"] = flag("prompt+rejected", "what makes two rows duplicates")
    near_threshold: float = flag(0.8, "Jaccard similarity, over runs of three words, that makes near duplicates")

    INPUT_FIELDS: ClassVar[tuple[str, ...]] = ("input", "benchmarks")
    HARMLESS: ClassVar[tuple[str, ...]] = (*INPUT_FIELDS, "output", "overwrite", "max_failure_rate", "root")
    RANGES: ClassVar[Mapping[str, tuple[float, float | None]]] = {
        **FileArguments.RANGES,
        "min_margin": UNBOUNDED,
        "min_edit_similarity": (0, 1),
        "max_edit_similarity": (0, 1),
        "max_length_ratio": (1, None),
        "ngram": (1, None),
        "near_threshold": (0.1, 1),
    }

    @property
    def options(self) -> dict:
        """All that decides what is written, but the input and the benchmarks themselves."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.HARMLESS}


def make_gates(args: FilterArguments, benchmarks: Benchmarks) -> list[Gate]:
    """The gates that are on, cheap ones first; those that compare with earlier rows come last."""
    with_rejected = args.duplicate_key == "prompt+rejected"
    on = [gates.equal_responses()]
    if args.min_margin is not None:
        on.append(gates.min_margin(args.min_margin))
    if args.min_edit_similarity is not None:
        on.append(gates.min_edit_similarity(args.min_edit_similarity))
    if args.max_edit_similarity is not None:
        on.append(gates.max_edit_similarity(args.max_edit_similarity))
    if args.max_length_ratio is not None:
        on.append(gates.max_length_ratio(args.max_length_ratio))
    if args.judge_agreement:
        on.append(gates.judge_agreement())
    if args.benchmarks:
        on.append(gates.benchmark_overlap(benchmarks))
    on.append(gates.repeated_pairs())
    if args.duplicates != "none":
        on.append(gates.exact_duplicates(with_rejected))
    if args.duplicates == "near":
        on.append(gates.near_duplicates(with_rejected, args.near_threshold))
    return on


def read_benchmarks(files: Sequence[str], ngram: int) -> Benchmarks:
    """Raises InputError for a row without a prompt: a benchmark read in part would look clean."""
    benchmarks = Benchmarks(ngram)
    for file in files:
        before = benchmarks.prompts
        for number, value in values(file):
            try:
                prompts = benchmark_prompts(value)
            except InputError as fault:
                raise InputError(f"--benchmarks: {file}, row {number}: {fault}") from fault
            for turns in prompts:
                benchmarks.add(turns, f"{file}, row {number}")
        if benchmarks.prompts == before:
            raise InputError(f"--benchmarks: {file} has no rows")
    return benchmarks


def filter_pairs(args: FilterArguments) -> int:
    """Read, filter, write, report; returns the exit code. Raises InputError and OSError."""
    args.validate()
    check_made([args.input], MADE_BY)
    benchmarks = read_benchmarks(args.benchmarks, args.ngram)
    on = make_gates(args, benchmarks)

    def check(row: dict) -> Unfit | None:
        return gates.unusable(row) or next(filter(None, (gate.lack(row) for gate in on)), None)

    rows = read_rows(
        args.input,
        parse_columns(args.columns),
        args.limit,
        required={"prompt": "", "chosen": "", "rejected": ""},
        optional=("refined_response", "margin", "edit_similarity", *gates.SCORES),
        check=check,
    )
    total, digest = survey(args.input)
    next(iter(rows), None)  # a file that does not fit is refused before anything is written
    before = identity_of_input(args.input)
    identity = {
        "stage": "filter",
        "inputs": {"input": [digest], "benchmarks": [survey(file)[1] for file in args.benchmarks]},
        "options": args.options,
        "input_manifest": before or None,
    }
    statistics, removed = Statistics(), Counter()
    with closing(WholeFiles(args.output, Manifest(identity, made_with()), overwrite=args.overwrite)) as files:
        with Progress(min(total, args.limit or total), files, 5.0):
            for row in rows:
                if isinstance(row, BadRow):
                    if files.counts["failed"] < BAD_ROWS_SHOWN:
                        print(f"bad row: {row}", file=sys.stderr)
                    files.write("failed", row.as_failed())
                    continue
                pair = Pair(row)
                statistics.add(pair)
                removal = gates.first_removal(on, pair)
                if removal is None:
                    files.write("done", row)
                else:
                    gate, value = removal
                    removed[gate.reason] += 1
                    files.write("filtered", {**row, "reason": gate.reason, "reason_value": value})
        files.publish()
    print(report(args, files, on, removed, statistics, benchmarks), file=sys.stderr)
    return int(failure_rate(files) > args.max_failure_rate)


def failure_rate(files: WholeFiles) -> float:
    return files.counts["failed"] / files.counts.total()


def report(
    args: FilterArguments,
    files: WholeFiles,
    on: Sequence[Gate],
    removed: Mapping[str, int],
    statistics: Statistics,
    benchmarks: Benchmarks,
) -> str:
    """What was looked at, what each gate removed of it, and where everything is."""
    left = files.counts.total() - files.counts["failed"]
    lines = [f"{'looked at':42}{'pairs':>9}{'least':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'most':>9}"]
    for name, (count, numbers) in statistics.spread().items():
        lines.append(f"{name:42}{count:9}" + "".join(f"{number:9.4g}" for number in numbers))
    agrees, ties, contradicts = statistics.judged()
    if agrees + ties + contradicts:
        lines.append(f"judge and label: {agrees} agree, {ties} ties, {contradicts} contradict")
    if benchmarks.prompts:
        lines.append(
            f"benchmarks: {benchmarks.prompts} prompts, {len(benchmarks.places)} different n-grams or short prompts"
        )
    lines += ["", f"{'gate':42}{'removed':>9}{'left':>9}", f"{'':51}{left:9}"]
    for gate in on:
        left -= removed[gate.reason]
        lines.append(f"{gate.reason:42}{removed[gate.reason]:9}{left:9}")
    lines.append("")
    lines += [f"{files.counts[kind]} rows {kind}: {path}" for kind, path in files.paths.items() if files.counts[kind]]
    if not files.counts["done"]:
        lines.append(f"warning: no row is left: {args.output} is empty, the next command has nothing to read")
    if files.counts["failed"] / files.counts.total() > args.max_failure_rate:
        lines.append(
            f"{files.counts['failed'] / files.counts.total():.1%} of the rows failed, over --max_failure_rate"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(FilterArguments, None, __doc__, argv)
    return exit_code_of(lambda: filter_pairs(args), lambda: "To do it over, run the same command again")


if __name__ == "__main__":
    sys.exit(main())
