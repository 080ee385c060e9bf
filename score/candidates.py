"""Initial pairs from the answers of several models: joining their files by prompt id and drawing two answers a prompt.

Holds the candidates in memory, a few kB a prompt.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

from distiller.records import RAW_LIMIT, BadRow, dump_line, prompt_messages, read_rows, response_text

OWN_FIELDS = ("response", "model", "chosen", "rejected", "chosen_score", "rejected_score")
"""Fields of a candidate's row that are its own, or that the pair writes anew; every other one goes on to the pair."""


def join_candidates(
    files: Iterable[str], columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[dict | BadRow]:
    """One row a prompt id, in the order of first appearance: the fields of its first file and `candidates`, a list of
    `{"response", "model"}` in the order of the files.

    A line that cannot be used costs its prompt one candidate; it becomes a row of its own (a BadRow) only where its
    prompt has no candidate left, so that every id is accounted for once. So is a prompt that differs from file to file
    under one id. `limit` takes the first prompts. Raises InputError for a file that is missing, empty or wholly unfit.
    """
    prompts: dict[str, dict] = {}
    differing: dict[str, BadRow] = {}  # by prompt id
    unusable: dict[str, BadRow] = {}  # by the id of the line
    lost = 0
    required = {"prompt": "", "response": "python refine/generate_response_vllm.py"}
    for file in files:
        for row in read_rows(file, columns, required=required):
            if isinstance(row, BadRow):
                lost += 1
                # `line-7` is the reader's name for a line without an id, and says nothing across files.
                identifier = f"{file}:{row.id}" if row.id.startswith("line-") else row.id
                unusable.setdefault(identifier, replace(row, id=identifier))
                continue
            first = prompts.setdefault(row["id"], _shared_fields(row) | {"candidates": []})
            if prompt_messages(first["prompt"]) != prompt_messages(row["prompt"]):
                reason, remedy = "this id has another prompt in another file", "give every prompt an id of its own"
                raw = dump_line(row).decode()[:RAW_LIMIT]
                differing[row["id"]] = BadRow(row["id"], file, 0, reason, remedy, raw)  # 0: the line is not known
                continue
            first["candidates"].append({"response": response_text(row["response"]), "model": row.get("model")})
    if lost:
        print(f"warning: {lost} lines of the candidate files cannot be used", file=sys.stderr)
    rows = [differing.get(identifier, row) for identifier, row in prompts.items()]
    rows += [row for identifier, row in unusable.items() if identifier not in prompts]
    return rows[:limit]


def _shared_fields(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in OWN_FIELDS}


def draw_two(candidates: list[dict], seed: int, row_id: str) -> list[dict]:
    """Two different answers in random order, or fewer where there are not two. Depends on the seed, the id and the
    answers alone."""
    different = {candidate["response"].strip(): candidate for candidate in reversed(candidates)}
    answers = [different[text] for text in sorted(different)]
    return random.Random(f"{seed} {row_id}").sample(answers, min(2, len(answers)))
