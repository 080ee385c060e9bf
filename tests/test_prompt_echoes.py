"""A weak teacher fills the reply's form with the prompt's own words: no such reply is taken for an answer."""

import re
from pathlib import Path

import pytest
from stage_driver import drive, reply

from distiller.runner import Done, Failed, Filtered, ParseError
from distiller.templates import load_prompt
from refine import refine_response_vllm
from refine.conversation import REFINE_VARIABLES, read_refinement
from RewardTrainer.eval.judge.asks import PAIRWISE_VARIABLES, POINTWISE_VARIABLES
from RewardTrainer.eval.judge.replies import POINTWISE, READERS
from score.conversation import (
    CALIBRATE_TAGS,
    CALIBRATE_VARIABLES,
    STRENGTH_TAGS,
    STRENGTH_VARIABLES,
    parse_grades,
)

ROOT = Path(__file__).resolve().parents[1]
CLASSIC = """Mend the draft.
{{ rejected }}
Reply with exactly these two blocks:
<diagnosis>
What is wrong with the draft, and what mends it.
</diagnosis>
<refined>
The full text of the edited response.
</refined>
"""
REJECTED = "The moon is 300 km away. It has no air."
EDITED = "The moon is 384,000 km away. It has no air."


def readers():
    """(name, the prompt's own words, what reads a reply to it) for every prompt that is shipped."""
    path = ROOT / "refine/prompts/refine.txt"
    own = load_prompt(path, REFINE_VARIABLES).instructions
    yield "refine", own, lambda text, own=own: read_refinement(reply(text), own, (REJECTED,))
    for name, variables, tags in (
        ("strength", STRENGTH_VARIABLES, STRENGTH_TAGS),
        ("calibrate", CALIBRATE_VARIABLES, CALIBRATE_TAGS),
    ):
        own = load_prompt(ROOT / f"score/prompts/{name}.txt", variables).instructions
        yield name, own, lambda text, tags=tags: parse_grades(text, tags)
    for form, read in READERS.items():
        path = ROOT / f"RewardTrainer/eval/judge/prompts/{form}.txt"
        variables = POINTWISE_VARIABLES if form == POINTWISE else PAIRWISE_VARIABLES
        both = {} if form == POINTWISE else {"responses": [{"letter": "A", "text": ""}, {"letter": "B", "text": ""}]}
        own = load_prompt(path, variables).render(**dict.fromkeys(variables, "") | both)
        yield form, own, lambda text, read=read: read(text, 2)


SHIPPED = list(readers())


def test_every_shipped_prompt_is_tried():
    found = [
        path for path in ROOT.rglob("prompts/*.txt") if "examples" not in path.parts and ".venv" not in path.parts
    ]
    assert sorted(path.stem for path in found) == sorted(name for name, *_ in SHIPPED)


@pytest.mark.parametrize(("own", "read"), [case[1:] for case in SHIPPED], ids=[case[0] for case in SHIPPED])
def test_a_reply_of_the_prompts_own_words_answers_nothing(own, read):
    tags = list(re.finditer(r"<[a-z_]+>", own))
    assert tags
    for echo in (own, own[-400:], *(own[tag.start() :] for tag in tags), own[tags[0].start() : tags[-1].end() + 80]):
        with pytest.raises(ParseError):
            read(echo)
    paragraphs = [part for part in own.split("\n\n") if len(part.split()) > 6]
    wrapped = {tag[0] for tag in tags}
    for part in paragraphs:
        text = "".join(f"{tag}{part}{tag.replace('<', '</')}" for tag in sorted(wrapped))
        with pytest.raises(ParseError):
            read(text)


@pytest.mark.parametrize(
    ("diagnosis", "refined"),
    [
        ("The distance is wrong.", "The full text of the edited response."),
        ("The distance is wrong.", f"The full text of the edited response. {EDITED}"),
        ("The distance is wrong.", f"The full text of the edited response:\n{EDITED}"),
        ("What is wrong with the draft, and what mends it.", EDITED),
        ("The distance is wrong.", "..."),
        ("…", EDITED),
        ("The distance is wrong.", f"The full text of the refined response is:\n{EDITED}"),
        ("The distance is wrong.", f"Here is the edited response: {EDITED}"),
        ("The distance is wrong.", f"**Edited Response:**\n\n{EDITED}"),
        ("The distance is wrong.", f"Sure! Here's a revised version of the response:\n{EDITED}"),
        ("The distance is wrong.", f"Refined answer\n{EDITED}"),
        ("The distance is wrong.", f"Sure, here's the response as edited:\n\n{EDITED}"),
        ("The distance is wrong.", f"The corrected response is a complete one that is ready to be sent: {EDITED}"),
        ("The distance is wrong.", f"Here is the full text of the edited response.\n\n{EDITED}"),
        ("The distance is wrong.", f"Below is the revised response.\n\n{EDITED}"),
        ("The distance is wrong.", f"I have edited the response as follows:\n{EDITED}"),
        ("The distance is wrong.", f"The response, edited:\n{EDITED}"),
        ("The distance is wrong.", f"Here\u2019s the text with the smallest edit:\n{EDITED}"),
        ("The distance is wrong.", f"**Refined:** {EDITED}"),
        ("The distance is wrong.", f"My edit:\n{EDITED}"),
        ("The distance is wrong.", f"### Edited\n{EDITED}"),
        ("The draft is bad. Say what is wrong with the draft, and what mends it.", f"So. {EDITED}"),
    ],
)
def test_a_teacher_that_echoes_is_asked_again_and_then_fails_with_that_reason(tmp_path, diagnosis, refined):
    prompt = tmp_path / "refine.txt"
    prompt.write_text(CLASSIC)
    args = refine_response_vllm.RefineArguments(prompt_file=str(prompt), max_tries=2)
    work = refine_response_vllm.make_work(args)
    row = {"id": "0", "prompt": "How far is the moon?", "chosen": "384,000 km.", "rejected": REJECTED}
    row["teacher_response"] = "It is 384,400 km away."
    echo = f"<diagnosis>{diagnosis}</diagnosis>\n<refined>{refined}</refined>"
    sound = f"<diagnosis>The distance is wrong.</diagnosis>\n<refined>{EDITED}</refined>"
    outcome, asks = drive(work, row, [echo, sound])
    assert isinstance(outcome, Done) and outcome.row["refined_response"] == EDITED
    assert asks[0].messages == asks[1].messages and asks[0].seed != asks[1].seed
    outcome, _ = drive(work, row, [echo, echo])
    assert isinstance(outcome, Failed) and outcome.raw == echo
    assert any(why in outcome.reason for why in ("repeats the instructions", "announcing itself", "has no words"))


@pytest.mark.parametrize(
    ("rejected", "refined"),
    [
        # What the response itself begins with, or happens to share with the prompt, is content.
        ("Here is the revised version: helo world", "Here is the revised version: hello world"),
        ("The full text of the edited response.", "The full text of the edited response was lost."),
        ("Yes.", "No."),
        ("The draft is wrong.", "What is wrong with it? Nothing."),
        ("I edited the response time of the server: 3 ms", "The edited server answers in 3 s: slowly"),
        ("The old version of the API renames three:", "The updated version of the API (2.1) renames three:"),
        ("The response worsened in 60 % of the patients:", "The response improved in 60 % of the patients:"),
        ("Here is your sentence:\nHe go.", "Here is the corrected version of your sentence:\nHe goes."),
        ("It is 41.\nBye.", "The corrected answer is 42.\nBye."),
        ("The 1958 text was old.\nIt fell.", "The revised text of the 1958 constitution was adopted.\nIt fell."),
        ("A version of bubble sort:", "An improved version of bubble sort:"),
        ("It is a text.", "It is an edited text by Kafka: short."),
        ("Sure! 41.", "Sure! The answer is 42."),
        ("The answer: 41", "The answer: 42"),
        ("I have a draft of the text here. It is long.", "I have a draft of the text here. It is short."),
    ],
)
def test_an_edit_that_only_looks_like_an_echo_is_kept(tmp_path, rejected, refined):
    prompt = tmp_path / "refine.txt"
    prompt.write_text(CLASSIC)
    args = refine_response_vllm.RefineArguments(prompt_file=str(prompt), max_tries=1, min_edit_similarity=0)
    row = {"id": "0", "prompt": "?", "chosen": "x", "rejected": rejected, "teacher_response": "y"}
    answer = f"<diagnosis>One word.</diagnosis><refined>{refined}</refined>"
    outcome, _ = drive(refine_response_vllm.make_work(args), row, [answer])
    assert isinstance(outcome, Done) and not isinstance(outcome, Filtered), outcome
    assert outcome.row["refined_response"] == refined


@pytest.mark.parametrize(
    "diagnosis",
    [
        "The response as a whole is unusable: it explains how to pick a lock. Refuse, and say why.",
        "The flawed response is worse: it says 41 where 6 x 7 is 42.",
        "**Why the flawed response is worse:**\n- It says 41.",
        "The flawed response is right where the two differ. The tone is off.",
        "What is missing or wrong:\n- the unit",
        "The smallest edit that makes it clearly better: say 42.",
    ],
)
def test_a_diagnosis_may_take_up_the_terms_of_the_prompt(diagnosis):
    own = load_prompt(ROOT / "refine/prompts/refine.txt", REFINE_VARIABLES).instructions
    answer = reply(f"<diagnosis>{diagnosis}</diagnosis><refined>{EDITED}</refined>")
    assert read_refinement(answer, own, (REJECTED,)) == (diagnosis, EDITED)


def test_what_the_teachers_own_answer_does_is_no_fault_of_its_edit():
    both = "Here is the corrected response:"
    answer = reply(f"<diagnosis>No heading.</diagnosis><refined>{both} {EDITED}</refined>")
    with pytest.raises(ParseError, match="announcing itself"):
        read_refinement(answer, CLASSIC, (REJECTED, "It is far."))
    assert read_refinement(answer, CLASSIC, (REJECTED, f"{both} It is far."))
