"""How fast a teacher stage is beside raw vLLM, what the prefix cache gives it, and what its checkpoints cost.

Three figures, all from one engine in this process:

1. Rows a second of the refinement stage from file to file (reading, rendering, asking, parsing, judging, writing every
   row) over those of one `LLM.chat` call on the same conversations, seeds and sampling. Both are run --rounds times in
   turn, each from an empty prefix cache; the figure is the median over rounds. `cpu_ratio` is the same of processor
   seconds of this process: on a CPU, where vLLM runs inside it, that one does not feel other programs.
2. Refinement followed by scoring of the same row (`--then_score`): the share of the scoring prompts' tokens that came
   from the prefix cache, over the share that whole blocks of the conversation so far would allow.
3. Writing: rows a second with every row written and flushed over rows a second without, from the time that writing
   the same rows again takes.

    python benchmarks/teacher_stage.py                                        # the embedded teacher, any machine
    python benchmarks/teacher_stage.py --model Qwen/Qwen3-14B --config refine/configs/paper.yaml \\
        --score_config score/configs/paper.yaml --input data/pairs.jsonl --rows 1000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from distiller.arguments import parse_stage_args
from distiller.cli import make_engine
from distiller.engine import Ask, AskError, Completion
from distiller.manifest import Manifest
from distiller.records import read_rows
from distiller.runner import Work, ask_seed, run_stage
from distiller.store import USAGE_SECONDS, Store
from distiller.templates import load_prompt
from distiller.vllm_engine import VLLMEngine
from refine.conversation import REFINE_VARIABLES, refine_messages
from refine.refine_response_vllm import REFINE, RefineArguments, make_work

FIELDS = {"prompt": "", "chosen": "", "rejected": ""}


@dataclass
class Kept:
    """The engine, for one stage after another: it stays open, and keeps every ask with its answer."""

    engine: VLLMEngine
    asks: dict[int, list[tuple[Ask, Completion | AskError | None]]] = field(default_factory=dict)
    """By key, that is by row: its asks in their order."""

    @property
    def capacity(self) -> int:
        return self.engine.capacity

    def submit(self, key: int, ask: Ask) -> None:
        self.asks.setdefault(key, []).append((ask, None))
        self.engine.submit(key, ask)

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        answers = self.engine.collect()
        for key, answer in answers:
            self.asks[key][-1] = (self.asks[key][-1][0], answer)
        return answers

    def close(self) -> None:
        pass

    def facts(self) -> dict:
        return self.engine.facts()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds, processor seconds of this process)"""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def stage(engine: Kept, work: Work, source: Path, output: Path, total: int) -> None:
    """The stage from file to file."""
    rows = read_rows(source, required=FIELDS, optional=("teacher_response",))
    run_stage(rows, work, lambda: engine, output, Manifest({"stage": "benchmark"}), total=total, overwrite=True)


def chat(engine: VLLMEngine, conversations: list[list[dict]], seeds: list[int], args: RefineArguments) -> list[str]:
    """The replies of one raw `LLM.chat` call."""
    from vllm import SamplingParams

    drawn = {"temperature": args.temperature, "top_p": args.top_p, "top_k": max(args.top_k, 0)}
    parameters = [SamplingParams(**drawn, max_tokens=args.max_tokens, seed=seed) for seed in seeds]
    outputs = engine.llm.chat(
        conversations, parameters, use_tqdm=False, chat_template_kwargs=args.template_kwargs or None
    )
    return [output.outputs[0].text for output in outputs]


def with_answers(engine: VLLMEngine, args: RefineArguments, source: Path, path: Path, count: int) -> list[dict]:
    """The first rows of the source, written to a file with a teacher_response each, which also warms the engine up."""
    rows = [row for row in read_rows(source, limit=count, required=FIELDS) if isinstance(row, dict)]
    prompts = [row["prompt"] for row in rows]
    messages = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    answers = chat(engine, messages, [ask_seed(args.seed, row["id"]) for row in rows], args)
    rows = [{**row, "teacher_response": answer} for row, answer in zip(rows, answers, strict=True) if answer.strip()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def compare_with_chat(engine: VLLMEngine, args: RefineArguments, rows: list[dict], source: Path, rounds: int) -> dict:
    """Figure 1."""
    template = load_prompt(args.prompt_file, REFINE_VARIABLES)
    conversations = [refine_messages(template, row, row["teacher_response"]) for row in rows]
    seeds = [ask_seed(args.seed, row["id"], REFINE) for row in rows]
    work, output = make_work(args), source.with_name("refined.jsonl")
    raw, ours, asked = [], [], 0
    for turn in range(rounds):
        kept = Kept(engine)
        runs = [
            (raw, lambda: chat(engine, conversations, seeds, args)),
            (ours, lambda kept=kept: stage(kept, work, source, output, len(rows))),
        ]
        for times, run in runs if turn % 2 else runs[::-1]:
            engine.llm.reset_prefix_cache()
            times.append(timed(run))
        asked = sum(map(len, kept.asks.values()))
    wall, cpu = (statistics.median(a[i] / b[i] for a, b in zip(raw, ours, strict=True)) for i in (0, 1))
    rates = {name: round(len(rows) / min(t[0] for t in times), 2) for name, times in (("raw", raw), ("stage", ours))}
    return {"ratio": wall, "cpu_ratio": cpu, "rows_per_second": rates, "asks": asked}


def cached_share(engine: VLLMEngine, args: RefineArguments, rows: list[dict], source: Path) -> dict:
    """Figure 2."""
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    engine.llm.reset_prefix_cache()
    kept = Kept(engine)
    stage(kept, make_work(args), source, source.with_name("scored.jsonl"), len(rows))
    prompt = cached = allowed = 0
    for asks in kept.asks.values():
        (begun, reply), (ask, answer) = asks[0], asks[-1]  # the refinement, and the score of its edit
        if len(asks) < 2 or len(ask.messages) < 3 or not isinstance(answer, Completion):
            continue
        before = tokens(engine, begun.messages, reply.text)
        scored = tokens(engine, ask.messages)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, scored, strict=False)))
        prompt += answer.prompt_tokens
        cached += answer.cached_tokens or 0
        allowed += min(shared, answer.prompt_tokens - 1) // block * block  # the last token is always computed
    shares = {"cached": round(cached / max(1, prompt), 4), "whole_blocks": round(allowed / max(1, prompt), 4)}
    return {"ratio": cached / max(1, allowed), "shares": shares, "block": block}


def tokens(engine: VLLMEngine, messages: list[dict], reply: str = "") -> list[int]:
    """Of the rendered conversation, with the reply that followed."""
    text = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **engine.template_kwargs
    )
    return engine.tokenizer.encode(text + reply, add_special_tokens=False)


def write_seconds(output: Path) -> tuple[float, float]:
    """(seconds to write all rows of a finished output again, seconds to save the manifest once)."""
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    store = Store(output.with_name("again.jsonl"), Manifest({"stage": "benchmark"}), overwrite=True)
    writing = timed(lambda: [store.write("done", row) for row in rows])[0]
    saving = timed(store.save_usage)[0]
    store.close()
    return writing, saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="that of the configuration unless given")
    parser.add_argument("--config", default="refine/configs/example.yaml", help="configuration of the refinement")
    parser.add_argument("--score_config", default="score/configs/example.yaml", help="configuration of the scoring")
    parser.add_argument("--input", help="preference pairs; those of the configuration unless given")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    flags = ["--config", given.config, "--max_tries", "1"]  # a second try would be more asks than the raw call has
    flags += [word for name in ("model", "input") if (value := getattr(given, name)) for word in (f"--{name}", value)]
    root = Path(__file__).parents[1]
    args = parse_stage_args(RefineArguments, root / "refine/configs/example.yaml", argv=flags)
    both = parse_stage_args(
        RefineArguments,
        root / "refine/configs/example.yaml",
        argv=[*flags, "--then_score", "--score_config", given.score_config],
    )
    for one in (args, both):
        one.validate()

    load = os.getloadavg()[0]
    engine = make_engine(args)
    with tempfile.TemporaryDirectory(prefix="teacher_stage_") as directory:
        source = Path(directory) / "pairs.jsonl"
        rows = with_answers(engine, args, Path(args.input), source, given.rows)
        speed = compare_with_chat(engine, args, rows, source, given.rounds)
        cache = cached_share(engine, both, rows, source)
        writing, saving = write_seconds(Path(directory) / "refined.jsonl")
    engine.close()
    seconds = len(rows) / speed["rows_per_second"]["stage"]
    share = writing / seconds + saving / USAGE_SECONDS
    ratios = {
        "stage_over_raw_chat": round(speed["ratio"], 4),
        "cached_over_whole_blocks": round(cache["ratio"], 4),
        "written_over_unwritten": round(1 - share, 5),
    }
    more = {
        "model": args.model,
        "rows": len(rows),
        "rounds": given.rounds,
        "cpu_ratio": round(speed["cpu_ratio"], 4),
        "rows_per_second": speed["rows_per_second"],
        "scoring_prompt_tokens": cache["shares"],
        "block_size": cache["block"],
        "microseconds_to_write_a_row": round(1e6 * writing / len(rows), 1),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
    }
    print(json.dumps({"benchmark": "teacher_stage", "ratios": ratios, **more}))


if __name__ == "__main__":
    main()
