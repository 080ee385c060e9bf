"""Reward every response of a file of your own, and append the rewards as columns.

    python -m RewardTrainer.eval.score_file --model output/distilrm --input answers.jsonl
    python -m RewardTrainer.eval.score_file --model org/reward-model --input org/dataset:train --output rewarded.jsonl

A row has a `prompt` (a string or chat messages) and responses, in any of these fields; beside each comes its reward:

    response               -> reward
    responses (a list)     -> rewards (a list, in its order)
    chosen, rejected       -> chosen_reward, rejected_reward
    teacher_response       -> teacher_response_reward

or is a whole conversation, `messages` ending with the assistant's turn -> reward. Where there is no `prompt`,
`messages` up to the last user's turn are the prompt of the responses beside them. Other fields pass through untouched,
a row without an `id` gets one, rows keep their order. Reads what the stages read; `--columns ours=theirs,...` renames.
Writes JSONL, by default `<input>.rewarded.jsonl`.

A row that cannot be rewarded (no response, one that is empty or no text, refused by the chat template, malformed) goes
to `<output>.failed.jsonl` with `reason` and `raw`, and is counted. Run the same command again after an interruption
and it goes on where it was. `--overwrite` starts anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from distiller.arguments import check_other_files, parse_stage_args
from distiller.manifest import Manifest, hash_file, made_with, model_fingerprint
from distiller.records import (
    RAW_LIMIT,
    BadRow,
    InputError,
    dump_line,
    parse_columns,
    prompt_messages,
    read_rows,
    response_text,
    survey,
)
from distiller.store import Store
from distiller.streams import patient_streams
from RewardTrainer.eval.engines import load_engine
from RewardTrainer.eval.engines.base import Conversation, Encoded, Engine, score_each_once

AT_ONCE = 256
"""Rows read, rewarded and written at a time: what a kill costs at most."""
SINGLE = {
    "response": "reward",
    "chosen": "chosen_reward",
    "rejected": "rejected_reward",
    "teacher_response": "teacher_response_reward",
}
"""Field with one response -> column of its reward."""


@dataclass
class ScoreFileArguments:
    """Flags of `score_file`."""

    model: str | None = field(default=None, metadata={"help": "Reward model: a directory, or a hub id."})
    input: str | None = field(
        default=None,
        metadata={
            "help": "A file (JSONL, JSON, CSV, Parquet, Arrow), a saved dataset, or a hub dataset owner/name[:split]."
        },
    )
    output: str | None = field(default=None, metadata={"help": "JSONL file; default: <input>.rewarded.jsonl."})
    columns: str | None = field(default=None, metadata={"help": "Our field names for the input's: ours=theirs,..."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows; may grow from run to run."})
    overwrite: bool = field(default=False, metadata={"help": "Begin anew where the output exists."})
    engine: str = field(default="hf", metadata={"help": "hf (transformers) or vllm (its pooling runner)."})
    adapter: str | None = field(default=None, metadata={"help": "Python file with load and score, for other models."})
    max_length: int | None = field(default=None, metadata={"help": "Longest conversation in tokens."})
    tokens_per_batch: int | None = field(default=None, metadata={"help": "hf: rows x longest row of one batch."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPU."})
    attn_implementation: str | None = field(default=None, metadata={"help": "hf: attention of transformers."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs the model is spread over."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "vllm: share of the GPU's memory to take."})

    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        ("input", "output", "limit", "overwrite")
        + ("tokens_per_batch", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization")
    )
    """Those that may differ when a file is gone on with; the input's content counts."""
    ENGINE_FLAGS: ClassVar[tuple[str, ...]] = (
        "engine",
        "adapter",
        "max_length",
        "tokens_per_batch",
        "dtype",
        "attn_implementation",
        "trust_remote_code",
        "tensor_parallel_size",
        "gpu_memory_utilization",
    )


def conversations(row: dict) -> dict[str, list[Conversation]]:
    """{column of the reward: the conversations to reward}, from the fields that a row has.

    Raises:
        InputError: naming the field
    """
    found: dict[str, list[Conversation]] = {}
    fields = [name for name in (*SINGLE, "responses") if row.get(name) is not None]
    asked, prompt_of = row.get("prompt"), "prompt"
    if row.get("messages") is not None:
        if fields and asked is None and _ends_with_user(row["messages"]):
            asked, prompt_of = row["messages"], "messages"  # what the responses beside it answer
        elif "response" in fields:
            raise InputError("fields `messages` and `response` both hold a response; leave one of them out")
        else:
            found["reward"] = [_whole(row["messages"])]
            asked = found["reward"][0][:-1] if asked is None else asked
    elif not fields:
        raise InputError(f"no response: none of the fields {', '.join((*SINGLE, 'responses', 'messages'))}")
    try:
        prompt = prompt_messages(asked) if fields else []
    except InputError as fault:
        raise InputError(f"field `{prompt_of}` {fault}") from fault
    for name in fields:
        if name == "responses":
            if not isinstance(row[name], list) or not row[name]:
                raise InputError("field `responses` must be a list of responses")
            found["rewards"] = [_answer(prompt, value, f"{name}[{i}]") for i, value in enumerate(row[name])]
        else:
            found[SINGLE[name]] = [_answer(prompt, row[name], name)]
    taken = [column for column in found if column in row]
    if taken:
        raise InputError(f"field `{taken[0]}` is there already; rename it with --columns other_name={taken[0]}")
    return found


def _ends_with_user(messages: object) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "user"


def _whole(messages: object) -> Conversation:
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], dict):
        raise InputError("field `messages` must be a list of at least two messages")
    try:
        prompt = prompt_messages(messages[:-1])
    except InputError as fault:
        raise InputError(f"field `messages` {fault}") from fault
    if messages[-1].get("role") != "assistant":
        raise InputError("field `messages` must end with a message of the assistant")
    return _answer(prompt, [messages[-1]], "messages")


def _answer(prompt: Conversation, response: object, name: str) -> Conversation:
    try:
        return [*prompt, {"role": "assistant", "content": response_text(response)}]
    except InputError as fault:
        raise InputError(f"field `{name}` {fault}") from fault


def reward_rows(
    rows: list[dict], engine: Engine, known: dict[bytes, float] | None = None
) -> Iterator[tuple[dict, dict | str, int]]:
    """(row, its new columns or why it has none, conversations that were cut) for each row, in order. `known` is that
    of `score_each_once`."""
    asked: list[tuple[dict, dict[str, list[Conversation]] | str]] = []
    for row in rows:
        try:
            asked.append((row, conversations(row)))
        except InputError as fault:
            asked.append((row, str(fault)))
    flat = [
        [talk for part in parts.values() for talk in part] if isinstance(parts, dict) else [] for _, parts in asked
    ]
    encoded = engine.encode(flat)
    usable: list[list[Encoded]] = [row if isinstance(row, list) else [] for row in encoded]
    rewards = {(row, number): reward for row, number, reward in score_each_once(engine, usable, known)}
    for index, ((row, parts), result) in enumerate(zip(asked, encoded, strict=True)):
        if isinstance(parts, str) or isinstance(result, InputError):
            yield row, parts if isinstance(parts, str) else str(result), 0
            continue
        values = (rewards[index, number] for number in range(len(result)))
        columns = {name: [next(values) for _ in part] for name, part in parts.items()}
        single = {name: part if name == "rewards" else part[0] for name, part in columns.items()}
        yield row, single, sum(bool(part.truncated) for part in result)


def run(arguments: ScoreFileArguments) -> dict[str, int]:
    """Reward the file. Returns counts: rows written, failed, and responses cut in this run.

    Raises:
        InputError: a request or input that cannot be used
    """
    for name in ("model", "input"):
        if not getattr(arguments, name):
            raise InputError(f"--{name} is needed")
    output = arguments.output or default_output(arguments.input)
    check_other_files(output, arguments.input)
    rows = read_rows(arguments.input, parse_columns(arguments.columns), arguments.limit)
    names = [each.name for each in fields(arguments) if each.name not in arguments.HARMLESS]
    identity = {name: getattr(arguments, name) for name in names}
    identity |= {"model_files": model_fingerprint(arguments.model), "input": survey(arguments.input)[1]}
    identity["adapter_file"] = hash_file(arguments.adapter) if arguments.adapter else None
    iterator = iter(rows)
    first = list(islice(iterator, AT_ONCE))  # a file that does not fit is refused before the model loads
    engine = load_engine(arguments.model, **{name: getattr(arguments, name) for name in arguments.ENGINE_FLAGS})
    store = Store(output, Manifest(identity, made_with()), overwrite=arguments.overwrite)
    cut, known = 0, {}
    with tqdm(desc=output, unit="row", file=sys.stderr) as progress:
        while first:
            todo = [row for row in first if (row.id if isinstance(row, BadRow) else row["id"]) not in store]
            cut += _reward_and_write(todo, engine, store, known)
            progress.update(len(first))
            first = list(islice(iterator, AT_ONCE))
    counts = {"written": store.counts["done"], "failed": store.counts["failed"], "cut": cut}
    reasons = store.reasons["failed"].most_common(5)
    waiting = bool(store.waiting)
    store.close()
    print(f"{output}: {counts['written']} rows, {counts['failed']} failed", file=sys.stderr)
    for reason, count in reasons:
        print(f"  {count} times: {reason}", file=sys.stderr)
    if waiting:
        raise InputError(f"not one row could be rewarded: {output} is the earlier one, as it was")
    if cut:
        print(f"{cut} conversations were too long and lost the left end of their prompt", file=sys.stderr)
    return counts


def _reward_and_write(rows: list[dict | BadRow], engine: Engine, store: Store, known: dict[bytes, float]) -> int:
    """Rows, good or bad, into the store, in their order. Returns how many conversations were cut."""
    good = reward_rows([row for row in rows if isinstance(row, dict)], engine, known)
    cut = 0
    for row in rows:
        if isinstance(row, BadRow):
            store.write("failed", row.as_failed())
            continue
        row, result, truncated = next(good)
        cut += truncated
        if isinstance(result, str):
            raw = dump_line(row).decode("utf-8")[:RAW_LIMIT]
            store.write("failed", {"id": row["id"], "reason": result, "raw": raw})
        else:
            store.write("done", {**row, **result})
    return cut


def default_output(source: str) -> str:
    """`answers.jsonl` -> `answers.rewarded.jsonl`; a hub dataset goes to `name.rewarded.jsonl` here."""
    path = Path(source)
    if path.is_file():
        return str(path.with_name(f"{path.stem}.rewarded.jsonl"))
    return f"{path.name.partition(':')[0]}.rewarded.jsonl"


@patient_streams()
def main() -> None:
    arguments = parse_stage_args(ScoreFileArguments, None, __doc__)
    try:
        counts = run(arguments)
    except InputError as fault:
        sys.exit(f"error: {fault}")
    if not counts["written"]:
        sys.exit("error: no row could be rewarded; do other columns hold its prompt and responses? (--columns)")


if __name__ == "__main__":
    main()
