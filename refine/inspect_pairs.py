"""One HTML page to read refined or scored pairs on: what the teacher changed, why, and by how much it says it helped.

    # data/scored.jsonl -> data/scored.html
    python refine/inspect_pairs.py

    # the pairs before they are scored, or those a stage left out
    python refine/inspect_pairs.py --input data/refined.jsonl
    python refine/inspect_pairs.py --input data/scored.jsonl.filtered.jsonl

The page shows the rejected and the refined response side by side with the words that differ marked, the prompt, the
diagnosis, the teacher's own answer, the original chosen response, scores and margin. It searches all texts, sorts by
margin or edit similarity, draws histograms whose bars can be pressed to see the pairs of a bar alone, and counts by
reason the rows of <input>.filtered.jsonl and <input>.failed.jsonl. Rows that are no pair are shown as they stand.

It is one file that needs no network, and its own policy forbids any. Nothing in a row can act on it: rows lie in it as
JSON, become text and never markup, and characters that hide or reorder others are shown by name.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from distiller.fields import Unfit, content_text
from distiller.records import RAW_LIMIT, BadRow, InputError, read_rows
from distiller.store import count_reason
from distiller.streams import patient_streams
from refine.conversation import words

PARTS = Path(__file__).parent / "inspector"
SCRIPTS = ("text.js", "diff.js", "histogram.js", "page.js")
ROWS_A_SCRIPT = 500
"""Rows in one element of the page: a browser limits the length of a string, not the number of elements."""
REFINE_COMMAND = "python refine/refine_response_vllm.py"
REFINED = {"refined": "refined_response", "original_chosen": "chosen", "original_score": "chosen_score"}
SCORED = {
    "refined": "chosen",
    "refined_score": "chosen_score",
    "original_chosen": "original_chosen",
    "original_score": "original_chosen_score",
}
"""Where a row has what the page shows, before and after the scoring put the refined response in the place of
`chosen`."""


@patient_streams()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="data/scored.jsonl", help="refined or scored rows (default: %(default)s)")
    parser.add_argument("--output", help="the page (default: the input's name with .html)")
    parser.add_argument("--limit", type=int, help="only the first rows of the input")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is out of range (from 1)")
    source = Path(args.input)
    output = Path(args.output) if args.output else source.with_suffix(".html")
    try:
        print(f"{output}: {write_page(source, output, args.limit)}")
    except (InputError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


def write_page(source: Path, output: Path, limit: int | None = None) -> str:
    """Write the page, whole or not at all; returns its counts in words. Raises InputError and OSError."""
    if not source.is_file():
        raise InputError(f"{source} does not exist from {Path.cwd()}; to make refined rows, run: {REFINE_COMMAND}")
    if output.exists() and output.samefile(source):
        raise InputError(f"--output {output} would write over the input")
    if output.exists():
        with output.open("rb") as file:
            if file.read(9).lower() not in (b"<!doctype", b""):
                raise InputError(f"--output {output} is there and is no page: name another one")
    head, tail = page_ends()
    bad: Counter[str] = Counter()
    good = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(head)
            source_rows = shown_rows(source, limit)
            while rows := list(islice(source_rows, ROWS_A_SCRIPT)):
                for row in rows:
                    if "refined" in row:
                        good += 1
                    else:
                        count_reason(bad, row["reason"])
                file.write(data_script(rows))
            if bad and not good:
                raise InputError(f"{source} has no refined or scored row: {bad.most_common(1)[0][0]}")
            groups = [
                left_out("Filtered", Path(f"{source}.filtered.jsonl")),
                left_out("Failed", Path(f"{source}.failed.jsonl")),
                {"name": "Unusable", "count": bad.total(), "reasons": bad.most_common()},
            ]
            name = f"{source} (first {limit} rows)" if limit else str(source)
            file.write(data_script({"file": name, "left_out": groups}))
            file.write(tail)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return ", ".join([f"{good} pairs", *(f"{group['count']} {group['name'].lower()}" for group in groups)])


def shown_rows(source: Path, limit: int | None = None) -> Iterator[dict]:
    """Every row of the file as the page takes it, in the file's order, numbered from 1. Raises InputError for a file
    that cannot be read at all; an empty one, all of whose rows were left out, has no rows."""
    if not source.stat().st_size:
        return
    for number, row in enumerate(read_rows(source, limit=limit), 1):
        if isinstance(row, BadRow):
            yield {"n": number, "id": row.id, "reason": row.reason, "raw": row.raw, "line": row.line}
            continue
        try:
            yield {"n": number, "id": row["id"], **pair_of(row)}
        except InputError as fault:
            raw = json.dumps(row, ensure_ascii=False)[:RAW_LIMIT]
            yield {"n": number, "id": row["id"], "reason": str(fault), "raw": raw}


def pair_of(row: dict) -> dict:
    """What the page shows of a refined or scored row; fields the row does not have are left out.

    More lenient than the stages: an empty response or a lone surrogate is there to be seen. Raises InputError.
    """
    if row.get("refined_response") is not None:
        places = REFINED
    elif row.get("original_chosen") is not None:
        places = SCORED
    else:
        raise InputError(f"neither `refined_response` nor `original_chosen`; to refine, run: {REFINE_COMMAND}")
    pair: dict = {"prompt": messages_of(row)}
    for name in ("rejected", "refined", "original_chosen", "teacher_response", "diagnosis", "reason"):
        pair[name] = text_of(row, places.get(name, name), needed=name in ("rejected", "refined"))
    for name in ("margin", "edit_similarity", "rejected_score", "refined_score", "original_score"):
        pair[name] = number_of(row, places.get(name, name))
    pair["words"] = [len(words(pair[name])) for name in ("rejected", "refined")]
    return {name: value for name, value in pair.items() if value is not None}


def messages_of(row: dict) -> list[dict]:
    prompt = row.get("prompt")
    if prompt is None:
        raise InputError("field `prompt` is missing")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise InputError("field `prompt` is neither a string nor a list of messages")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt):
        raise InputError("field `prompt` has a message whose role is not a string")
    return [{"role": message["role"], "content": _content_of(message, "prompt")} for message in prompt]


def text_of(row: dict, name: str, needed: bool = False) -> str | None:
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):  # TRL's conversational form
        value = _content_of(value[0], name)
    if value is None and needed:
        raise InputError(f"field `{name}` is missing")
    if value is not None and not isinstance(value, str):
        raise InputError(f"field `{name}` is neither a string nor one message")
    return value


def _content_of(message: dict, name: str) -> str:
    try:
        return content_text(message.get("content"))
    except Unfit as fault:
        raise fault.within(name) from fault


def number_of(row: dict, name: str) -> float | None:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"field `{name}` must be a number, not {type(value).__name__}")
    if value is not None and not -sys.float_info.max <= value <= sys.float_info.max:
        raise InputError(f"field `{name}` is too large")  # an integer may be, in JSON
    return value


def left_out(name: str, path: Path) -> dict:
    """The rows of a filtered or failed file counted by reason, numbers in a reason written N."""
    if not path.exists():
        return {"name": name, "count": 0, "reasons": [], "note": f"there is no {path.name}"}
    reasons: Counter[str] = Counter()
    try:
        for row in read_rows(path) if path.stat().st_size else ():
            count_reason(reasons, f"unreadable line: {row.reason}" if isinstance(row, BadRow) else row.get("reason"))
    except InputError as fault:
        return {"name": name, "count": 0, "reasons": [], "note": str(fault)}
    return {"name": name, "count": reasons.total(), "reasons": reasons.most_common()}


# ------------------------------------------------------------------------------------------------------------ the page


def page_ends() -> tuple[str, str]:
    """What stands before and after the data. The policy names the page's style and script by their hashes: no other
    runs, and nothing is loaded."""
    page, style = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "style.css"))
    script = '"use strict";\n' + "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    head, _, tail = page.replace("{{policy}}", html.escape(policy, quote=True)).partition("{{data}}")
    return head.replace("{{style}}", style), tail.replace("{{script}}", script)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def data_script(value: object) -> str:
    """A JSON value in a script element that no browser runs. Without `<` nothing in it can end the element; a lone
    surrogate, which UTF-8 does not have, is written as the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return f'<script type="application/json">{text}</script>\n'


if __name__ == "__main__":
    sys.exit(main())
