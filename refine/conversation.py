"""The refinement conversation: how the teacher is asked, how its reply is read, and which edits are worth keeping.

Pure functions, no engine and no files. The teacher replies in two tagged blocks, `<diagnosis>..</diagnosis>` and then
`<refined>..</refined>`, and both may themselves contain these tags: a response about XML, a response that tries to end
the block early, a diagnosis that quotes either. `parse_refinement` therefore looks for the outermost blocks; its
docstring has the rules.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from distiller.engine import Completion
from distiller.records import prompt_messages, response_text
from distiller.runner import ParseError
from distiller.templates import PromptTemplate, conversation_text

REFINE_PROMPT = os.path.relpath(Path(__file__).parent / "prompts/refine.txt")
REFINE_VARIABLES = ("prompt", "rejected", "teacher_response")

TAGS = ("<diagnosis>", "</diagnosis>", "<refined>", "</refined>")
_TAG = re.compile("|".join(TAGS))
_ANY_CASE_TAG = re.compile(r"< {0,2}/? {0,2}(?:diagnosis|refined) {0,2}/?>", re.IGNORECASE)
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uffef\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
ECHO_WORDS = 5  # in a row that a block and the instructions would hardly share by chance
LONGEST_ANNOUNCEMENT = 160  # characters
_EDITED = frozenset(
    "corrected edit edited edits improved mended modified refined repaired revised revision rewritten updated".split()
)
_REPLY = frozenset("answer reply response".split())
_ANNOUNCING = frozenset(
    """a an as below certainly change changes complete course draft final following follows for full go have here
    here's i i've in is it its made minimal my now of okay ok result smallest sure text that the this to version whole
    with you your""".split()
).union(_EDITED, _REPLY)
"""What an announcement of the edit is made of, and hardly a response's first sentence."""
_OPENERS = {"</diagnosis>": "<diagnosis>", "</refined>": "<refined>"}

DIFFLIB_LIMIT = 500_000
"""Most pairs of equal words that difflib is given: about 5,000 words of prose (0.1 s), or one second of the most
repetitive text."""


def refine_messages(template: PromptTemplate, row: dict, teacher_response: str) -> list[dict]:
    """The conversation that asks for a refinement; `score/` continues it. Raises PromptError."""
    text = template.render(
        prompt=conversation_text(prompt_messages(row["prompt"])),
        rejected=response_text(row["rejected"]),
        teacher_response=teacher_response,
    )
    return [{"role": "user", "content": text}]


def render_reply(diagnosis: str, refined: str) -> str:
    """The teacher's reply rebuilt from a record: the inverse of `parse_refinement`."""
    return f"<diagnosis>{_pad(diagnosis)}</diagnosis>\n<refined>{_pad(refined)}</refined>"


def _pad(text: str) -> str:
    """Shield a newline at either end from `_unpad`."""
    return ("\n" if text.startswith(("\n", "\r\n")) else "") + text + ("\n" if text.endswith("\n") else "")


def _unpad(text: str) -> str:
    """Take off the one line break by which a tag may stand on a line of its own; everything else is content."""
    text = text.removeprefix("\r\n") if text.startswith("\r\n") else text.removeprefix("\n")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def parse_refinement(reply: str) -> tuple[str, str]:
    """(diagnosis, refined response) of a reply, each verbatim but for one line break at either end.

    The rules, for replies whose blocks contain the tags themselves:

    1. The diagnosis opens at the first `<diagnosis>`, the refined response closes at the last `</refined>`. What
       stands before and after is ignored. Where something stands before, which may speak of the tags, the diagnosis
       opens at the first one that leaves it well nested.
    2. Between them lies the boundary: a `</diagnosis>` whose next tag is `<refined>`. Where there is only one, that is
       it, and either block may hold any other tags, closed or not.
    3. Where there are several (a block quotes the whole format), the first one that leaves both blocks well nested is
       meant; at most one reading of a reply can be. So a response that holds
       `<diagnosis>a</diagnosis><refined>b</refined>` comes back whole.
    4. If none does, the only boundary with nothing but white space in it is taken. If there is no such one or more
       than one, the reply is ambiguous: better asked again than guessed.

    Raises ParseError: a tag is missing, the reply is ambiguous, or a block is empty.
    """
    tags = list(_TAG.finditer(reply))
    openers = [tag.end() for tag in tags if tag[0] == "<diagnosis>"]
    start = next(iter(openers), None)
    if start is None:
        raise ParseError("no <diagnosis> in the reply")
    end = next((tag.start() for tag in reversed(tags) if tag[0] == "</refined>"), None)
    if end is None:
        raise ParseError("no </refined> in the reply")
    inner = [tag for tag in tags if tag.start() >= start and tag.end() <= end]
    boundaries = [
        (left, right) for left, right in pairwise(inner) if left[0] == "</diagnosis>" and right[0] == "<refined>"
    ]
    if not boundaries:
        raise ParseError("no </diagnosis> followed by <refined> between <diagnosis> and </refined>")
    left, right = _pick_boundary(reply, start, end, boundaries)
    if not reply.lstrip().startswith("<diagnosis>"):  # what comes before may speak of the tags
        inside = (
            opener for opener in openers if opener <= left.start() and _well_nested(reply[opener : left.start()])
        )
        start = next(inside, start)
    diagnosis, refined = _unpad(reply[start : left.start()]), _unpad(reply[right.end() : end])
    if not diagnosis.strip():
        raise ParseError("the diagnosis is empty")
    if not refined.strip():
        raise ParseError("the refined response is empty")
    return diagnosis, refined


def read_refinement(reply: Completion, instructions: str = "", known: Sequence[str] = ()) -> tuple[str, str] | None:
    """`parse_refinement`, or None for a reply that max_tokens cut.

    instructions: the prompt without what it is filled with. known: the responses that it is filled with; what one of
    them does is no fault of the edit's. Raises ParseError, for a reply that repeats the instructions, or whose second
    block begins by announcing itself, too: a weak teacher may fill the blocks with the words that describe them.
    """
    if reply.finish_reason == "length":
        return None
    diagnosis, refined = parse_refinement(reply.text)
    for name, text in (("diagnosis", diagnosis), ("refined response", refined)):
        if not text.strip(" .\u2026\n\r\t"):
            raise ParseError(f"the {name} has no words")
    if is_echo(diagnosis, instructions):
        raise ParseError("the diagnosis repeats the instructions")
    if begins_with_echo(refined, instructions) and not any(begins_with_echo(text, instructions) for text in known):
        raise ParseError("the refined response repeats the instructions")
    if announces_itself(refined) and not any(map(announces_itself, known)):
        raise ParseError("the refined response begins by announcing itself")
    return diagnosis, refined


def announces_itself(text: str) -> bool:
    """Whether a text begins by saying that it is an edit, in English: with words of `_ANNOUNCING` alone, one that says
    edited among them, up to a sign ("Sure! Here is the revised version:"), or up to the word for a response, with any
    words after it up to a colon or the line's end ("The corrected response, ready to be sent:")."""
    for part in re.finditer(r"([^:.!\n]*)([:.!\n]|$)", text.replace("\u2019", "'").casefold().lstrip(" *_#>\n\r\t")):
        words = re.findall(r"[\w']+", part[1])
        unknown = next((place for place, word in enumerate(words) if word not in _ANNOUNCING), len(words))
        told = words[:unknown]
        if not told:
            return False
        if unknown < len(words):
            told = told[: 1 + max((place for place, word in enumerate(told) if word in _REPLY), default=-1)]
            return part[2] in (":", "\n") and len(part[1]) <= LONGEST_ANNOUNCEMENT and not _EDITED.isdisjoint(told)
        if not _EDITED.isdisjoint(words):
            return len(words) > 1 or part[2] in (":", "\n")
    return False


def is_echo(text: str, instructions: str) -> bool:
    """Whether a text is words of the instructions: it stands in them, with `ECHO_WORDS` words at least, or twice as
    many in a row of it do; or it is what they have between the tags of the reply. A diagnosis may well take up their
    terms, and a single line of it repeat one of their sentences."""
    told, runs, blocks = _told(instructions)
    plain = _plain(text)
    return plain in blocks or (len(plain.split()) >= ECHO_WORDS and plain in told) or not runs.isdisjoint(_runs(plain))


def begins_with_echo(text: str, instructions: str) -> bool:
    """`is_echo` of the whole text, of its first line or of its first sentence."""
    line = text.strip().partition("\n")[0]
    return any(is_echo(part, instructions) for part in (text, line, re.split("[.:!?]", line, maxsplit=1)[0]))


@lru_cache(maxsize=4)
def _told(instructions: str) -> tuple[str, set[tuple[str, ...]], tuple[str, ...]]:
    """The instructions' words, all runs of them, and what stands between the tags in them."""
    try:
        blocks = parse_refinement(instructions)
    except ParseError:
        blocks = ()
    return _plain(instructions), _runs(_plain(instructions)), tuple(map(_plain, blocks))


def _runs(text: str) -> set[tuple[str, ...]]:
    """All 2 * `ECHO_WORDS` words in a row."""
    found = re.findall(r"\w+", text)
    return set(zip(*(found[start:] for start in range(2 * ECHO_WORDS)), strict=False))


def _plain(text: str) -> str:
    """Its words and signs, whatever is between them, without case and without a sign at its ends."""
    return " ".join(text.casefold().split()).strip(" .:;,*_#-")


def read_answer(reply: Completion) -> str | None:
    """The teacher's own answer, verbatim; None for one that max_tokens cut. Raises ParseError for an empty one."""
    if reply.finish_reason == "length":
        return None
    if not reply.text.strip():
        raise ParseError("the response is empty")
    return reply.text


def _pick_boundary(reply: str, start: int, end: int, boundaries: list[tuple[re.Match, re.Match]]):
    """Rules 2 to 4 of `parse_refinement`."""
    if len(boundaries) == 1:
        return boundaries[0]
    for left, right in boundaries:
        if _well_nested(reply[start : left.start()]) and _well_nested(reply[right.end() : end]):
            return left, right
    bare = [(left, right) for left, right in boundaries if not reply[left.end() : right.start()].strip()]
    if len(bare) == 1:
        return bare[0]
    raise ParseError(f"ambiguous reply: {len(boundaries)} places where </diagnosis> is followed by <refined>")


def _well_nested(text: str) -> bool:
    """Whether every tag in the text is closed, and in the right order."""
    open_tags: list[str] = []
    for tag in _TAG.findall(text):
        if tag not in _OPENERS:
            open_tags.append(tag)
        elif not open_tags or open_tags.pop() != _OPENERS[tag]:
            return False
    return not open_tags


# ------------------------------------------------------------------------------------------------------------- judging


def words(text: str) -> list[str]:
    """What white space separates; in scripts that write none between words (Chinese, Japanese, Thai, ...) each
    character is a word."""
    return _WORD.findall(text)


def edit_similarity(before: str, after: str) -> float:
    """How much of a text survived an edit, in [0, 1]: difflib's ratio 2M/T, where M of the T words of both texts
    match.

    White space itself is not compared. difflib is cubic on text that repeats itself (2,000 words in a loop took 15 s),
    so over `DIFFLIB_LIMIT` pairs of equal words M is the longest common subsequence instead, which is never less and
    takes milliseconds.
    """
    ours, others = words(before), words(after)
    if not ours and not others:
        return 1.0
    counts, other_counts = Counter(ours), Counter(others)
    if sum(count * other_counts[word] for word, count in counts.items()) <= DIFFLIB_LIMIT:
        return SequenceMatcher(None, ours, others, autojunk=False).ratio()
    return 2 * _common_subsequence(ours, others) / (len(ours) + len(others))


def _common_subsequence(words: list[str], others: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table held in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    full = (1 << len(words)) - 1
    row = full  # a 0 bit where the table steps up by one
    for word in others:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(words) - row.bit_count()


def foreign_tags(refined: str, rejected: str) -> list[str]:
    """Tags of the reply form that stand in the refined response more often than in the rejected one: left-overs of the
    form."""
    surplus = Counter(_ANY_CASE_TAG.findall(refined)) - Counter(_ANY_CASE_TAG.findall(rejected))
    return sorted(surplus)


def useless_because(
    rejected: str, refined: str, teacher_response: str, similarity: float, min_edit_similarity: float
) -> str | None:
    """Why a well-formed refinement teaches nothing; None when it is worth keeping. White space at the ends is not a
    difference."""
    if refined.strip() == rejected.strip():
        return "refined equals rejected"
    if refined.strip() == teacher_response.strip():
        return "refined equals teacher_response"
    if foreign_tags(refined, rejected):
        return "tags left in the refined response"
    if similarity < min_edit_similarity:
        return "edit_similarity under min_edit_similarity"
    return None
