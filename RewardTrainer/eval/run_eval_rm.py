"""Evaluate a reward model: reward every response of some benchmarks, write accuracies, scores and a report.

    bash scripts/eval_rm.sh                    # what train_distilrm.sh made, on the embedded benchmark
    bash scripts/eval_rm.sh --model org/reward-model --benchmarks rm-bench,../data/test_pairs.jsonl --data_dir D
    bash scripts/eval_rm.sh --config my.yaml --engine vllm --max_length 2048 --dtype float32

Reads any sequence-classification reward model with one label, safetensors weights and a chat template (a directory or
a hub id; models of another kind through --adapter), and benchmarks by name or preference data by path. Writes to the
output directory, over what an earlier run left there:

    results.json   model, benchmarks: {name: {subsets, averages, overall, intervals}}, counts, settings
    scores.jsonl   one line for each response: benchmark, id, subset, response (its index in the row), score
    report.html    tables with intervals, reward distributions, calibration, lengths, worst mistakes; opens offline
    results.md     the tables as Markdown

and prints the accuracies. `--compare` puts finished evaluations side by side instead, with paired tests of the first
against the others; it loads no model:

    bash scripts/eval_rm.sh --compare ../output/eval/a ../output/eval/b --output_dir ../output/eval/a-and-b

A row that cannot be scored (malformed, repeated id, refused by the chat template) is left out, named on stderr and
counted in results.json. A conversation longer than --max_length loses the left end of its prompt, never the end of its
response, and is counted. A run that was interrupted goes on where it was when the same command is given again.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from distiller.arguments import parse_stage_args
from distiller.manifest import hash_file, made_with, model_fingerprint
from distiller.records import InputError
from distiller.streams import patient_streams
from RewardTrainer.eval.base import Benchmark
from RewardTrainer.eval.benchmarks import load_benchmarks
from RewardTrainer.eval.compare import run_comparison
from RewardTrainer.eval.engines import load_engine
from RewardTrainer.eval.evaluation import (
    Evaluation,
    accuracy_table,
    make_evaluation,
    score_benchmark,
)
from RewardTrainer.eval.launch import count_processes, end_with_parent, run_processes, shard_of_this_process
from RewardTrainer.eval.outputs import write_outputs
from RewardTrainer.eval.parts import Parts

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "eval" / "example.yaml"
MESSAGES_SHOWN = 20


@dataclass
class EvalArguments:
    """Flags of `eval_rm.sh`; a YAML file given with --config uses the same names."""

    model: str = field(default="../output/distilrm", metadata={"help": "Reward model: a directory, or a hub id."})
    compare: list[str] | None = field(
        default=None, metadata={"help": "Output directories of finished evaluations to put side by side."}
    )
    benchmarks: str = field(
        default="example",
        metadata={"help": "Comma-separated benchmark names and preference data (file, directory, hub dataset)."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Directory with benchmark files, one folder <name>/ for each benchmark."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: ../output/eval/<model name>."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens; default: all the model takes."}
    )
    engine: str = field(default="hf", metadata={"help": "hf (transformers) or vllm (its pooling runner)."})
    adapter: str | None = field(
        default=None, metadata={"help": "Python file with load and score, for other models; see engines/adapter.py."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Processes that share the rows; default: one a GPU, or 1."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "hf: most tokens of one batch, padding included (a longer conversation is a batch of its own); "
            "default: 16384 on a GPU, 2048 on a CPU. Changes speed and memory, not scores."
        },
    )
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPU, else float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers (eager, sdpa, ...); default: the model's own."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs the model is spread over."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "vllm: share of the GPU's memory to take."})
    overwrite: bool = field(
        default=False, metadata={"help": "Begin anew where an evaluation with other settings was not finished."}
    )

    ENGINE_FLAGS: ClassVar[tuple[str, ...]] = (
        "engine",
        "adapter",
        "dtype",
        "max_length",
        "tokens_per_batch",
        "attn_implementation",
        "trust_remote_code",
        "tensor_parallel_size",
        "gpu_memory_utilization",
    )
    """Those that `load_engine` takes."""
    SPEED_FLAGS: ClassVar[frozenset[str]] = frozenset(
        {"tokens_per_batch", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization"}
    )
    """Those of them that decide how fast, not what comes out."""


def default_output_dir(model: str) -> Path:
    """`../output/eval/<model name>`; a trainer checkpoint is named after its run too, for they all are
    `checkpoint-N`."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    return Path("../output/eval") / name


def run(arguments: EvalArguments) -> list[Evaluation]:
    """Evaluate and write the files. In a child process: only score its share of the rows, and return [].

    Raises:
        InputError: a request or input that cannot be used
    """
    shard = shard_of_this_process()
    if shard:
        end_with_parent()
    data_dir = Path(arguments.data_dir) if arguments.data_dir else None
    benchmarks = load_benchmarks(arguments.benchmarks, data_dir)  # before the model: a typo shows at once
    output_dir = Path(arguments.output_dir) if arguments.output_dir else default_output_dir(arguments.model)
    with closing(Parts(output_dir / "parts")) as parts:
        if shard:
            _score_share(arguments, benchmarks, parts, shard)
            return []
        gpus_each = arguments.tensor_parallel_size if arguments.engine == "vllm" else 1
        processes = count_processes(arguments.num_processes, gpus_each)
        if processes > 1:
            parts.begin(_identity(arguments, benchmarks), arguments.overwrite)
            run_processes("RewardTrainer.eval.run_eval_rm", arguments, processes, gpus_each)
        else:
            _score_share(arguments, benchmarks, parts)
        evaluations = [make_evaluation(benchmark, parts.finished(benchmark.name)) for benchmark in benchmarks]
        for evaluation in evaluations:
            _report_counts(evaluation, f"{arguments.max_length} tokens" if arguments.max_length else "the model takes")
        write_outputs(output_dir, arguments.model, evaluations, _settings(arguments, benchmarks))
        parts.remove()
    print(f"written: {output_dir}/results.json, results.md, scores.jsonl, report.html\n", file=sys.stderr)
    return evaluations


def _score_share(
    arguments: EvalArguments, benchmarks: list[Benchmark], parts: Parts, shard: tuple[int, int] | None = None
) -> None:
    """Load the model and score all rows, or in a child those of its shard."""
    engine = load_engine(arguments.model, **{name: getattr(arguments, name) for name in arguments.ENGINE_FLAGS})
    if not shard:
        parts.begin(_identity(arguments, benchmarks), arguments.overwrite)
    number, processes = shard or (0, 1)
    parts.open(number)
    for benchmark in benchmarks:
        start = time.monotonic()
        score_benchmark(benchmark, engine, parts, (number, processes), bar=number == 0)
        if not shard:
            print(f"{benchmark.name}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def _identity(arguments: EvalArguments, benchmarks: list[Benchmark]) -> dict:
    """All that decides the scores."""
    decisive = [name for name in arguments.ENGINE_FLAGS if name not in arguments.SPEED_FLAGS]
    return {
        "model": arguments.model,
        "model_files": model_fingerprint(arguments.model),
        **{name: getattr(arguments, name) for name in decisive},
        "dtype": _dtype(arguments),
        "adapter_file": hash_file(arguments.adapter) if arguments.adapter else None,
        "rows": {benchmark.name: benchmark.digest for benchmark in benchmarks},
    }


def _settings(arguments: EvalArguments, benchmarks: list[Benchmark]) -> dict:
    decisive = [name for name in arguments.ENGINE_FLAGS if name not in arguments.SPEED_FLAGS]
    used = {name: getattr(arguments, name) for name in decisive} | {"dtype": _dtype(arguments)}
    rows = {benchmark.name: benchmark.digest for benchmark in benchmarks}
    return {"data_dir": arguments.data_dir, **used, "rows": rows, **made_with()}


def _dtype(arguments: EvalArguments) -> str:
    """What `--dtype auto` comes to on this machine: rewards of two precisions do not mix."""
    if arguments.adapter or arguments.engine != "hf":
        return arguments.dtype
    import torch

    from RewardTrainer.eval.engines.loading import resolve_dtype

    return resolve_dtype(arguments.dtype, torch.cuda.is_available())


def _report_counts(evaluation: Evaluation, limit: str) -> None:
    counts, name = evaluation.counts, evaluation.benchmark.name
    for message in counts["skipped_rows"][:MESSAGES_SHOWN]:
        print(f"skipped: {message}", file=sys.stderr)
    if counts["skipped"]:
        print(f"{name}: {counts['skipped']} of {counts['rows']} rows skipped", file=sys.stderr)
    if counts["truncated"]:
        print(
            f"{name}: {counts['truncated']} conversations longer than {limit} lost the left end of their prompt; in "
            f"{counts['responses_cut']} of them the response lost its beginning too",
            file=sys.stderr,
        )
    if counts["empty_responses"]:
        print(f"{name}: {counts['empty_responses']} responses are empty, and were rewarded as such", file=sys.stderr)
    if counts["tied_pairs"]:
        print(f"{name}: {counts['tied_pairs']} of {counts['pairs']} pairs tied", file=sys.stderr)
    if counts["counted"] < counts["scored"]:
        print(f"{name}: {counts['scored'] - counts['counted']} rows cannot count without another row", file=sys.stderr)
    for subset, rows in counts["short_subsets"].items():
        print(f"{name}: {subset} has {rows} rows; averages are over what is there", file=sys.stderr)


def _check_comparison(arguments: EvalArguments, argv: list[str]) -> None:
    """Raises InputError where a flag that a comparison would ignore is given."""
    known = {"compare", "data_dir", "output_dir", "num_processes"}  # the last is NUM_PROCESSES, for any command
    typed = {word.partition("=")[0] for word in argv}
    ignored = [f"--{name.name}" for name in fields(arguments) if name.name not in known and f"--{name.name}" in typed]
    if ignored:
        raise InputError(
            f"--compare puts finished evaluations side by side as they are, and has no use for {', '.join(ignored)}; "
            "leave that out, or evaluate again with it"
        )


@patient_streams()
def main() -> None:
    arguments = parse_stage_args(EvalArguments, DEFAULT_CONFIG, __doc__)
    try:
        if arguments.compare:
            _check_comparison(arguments, sys.argv[1:])
            data_dir = Path(arguments.data_dir) if arguments.data_dir else None
            output_dir = Path(arguments.output_dir) if arguments.output_dir else None
            print(run_comparison([Path(name) for name in arguments.compare], data_dir, output_dir))
            return
        evaluations = run(arguments)
    except InputError as fault:
        sys.exit(f"error: {fault}")
    tables = []
    for evaluation in evaluations:
        counts = evaluation.counts
        rows = f"{counts['counted']} of {counts['rows']} rows, {counts['pairs']} pairs"
        tables.append(accuracy_table(evaluation.benchmark.name, evaluation.summary, rows))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
