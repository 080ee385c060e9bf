"""Refinement: reading the teacher's reply, edit similarity, the gates."""

from __future__ import annotations

import random
import re
import time
from difflib import SequenceMatcher
from itertools import pairwise

import pytest
from stage_driver import drive, reply

from distiller.engine import AskError
from distiller.runner import Done, Failed, Filtered, ParseError
from refine import generate_response_vllm as generate
from refine import refine_response_vllm as refine
from refine.conversation import (
    TAGS,
    edit_similarity,
    foreign_tags,
    parse_refinement,
    render_reply,
    useless_because,
)

# ------------------------------------------------------------------------------------------------------------- reading


def test_the_two_blocks_are_read_and_the_text_around_them_is_ignored():
    reply = "Let me see.\n<diagnosis>\nWrong year.\n</diagnosis>\n\n<refined>\nIt was 1969.\n</refined>\nDone."
    assert parse_refinement(reply) == ("Wrong year.", "It was 1969.")


@pytest.mark.parametrize(
    "content",
    [
        "  indented first line\n    second",
        "```python\ndef f():\n    return 1\n```",
        "\nstarts and ends with a line break\n",
        "\n\n\ntwo more\n\n\n",
        "windows\r\nlines\r\n",
        "\r\nboth ends\r\n",
        "trailing spaces   ",
        "ends with a carriage return\r",
        "Ünïcödé 漢字 \u2028 \x85 \x0b",
        "<b>html</b> & <refine> </refined_response>",
    ],
)
def test_a_block_keeps_its_content_to_the_last_character(content):
    assert parse_refinement(render_reply(content, content)) == (content, content)


def test_only_one_line_break_at_each_end_is_padding():
    assert parse_refinement("<diagnosis>\n\nd\n\n</diagnosis><refined>\r\nr\r\n</refined>") == ("\nd\n", "r")


@pytest.mark.parametrize(
    "refined",
    [
        "Write </refined> to end the block.",
        "<refined>nested</refined>",
        "</refined></diagnosis><diagnosis><refined>",
        "a </diagnosis> b",
        "an answer with <diagnosis>x</diagnosis><refined>y</refined> inside",
        "with <diagnosis>x</diagnosis>\n<refined>y</refined>\n <diagnosis>z</diagnosis> <refined>u</refined>",
    ],
)
def test_a_refined_response_that_holds_our_tags_comes_back_whole(refined):
    assert parse_refinement(render_reply("Too short.", refined)) == ("Too short.", refined)


@pytest.mark.parametrize(
    "diagnosis",
    [
        "It says <refined> in the middle.",
        "It closes </refined> and </diagnosis> out of nowhere.",
        "It consists of <diagnosis>x</diagnosis><refined>evil</refined> and no answer.",
        "First </diagnosis>, and much later <refined>, are both literal.",
    ],
)
def test_a_diagnosis_that_quotes_our_tags_does_not_leak_into_the_refined_response(diagnosis):
    assert parse_refinement(render_reply(diagnosis, "Plain answer.")) == (diagnosis, "Plain answer.")


def test_words_between_the_blocks_are_tolerated():
    reply = "<diagnosis>d</diagnosis>\nThe edit:\n<refined>r <diagnosis>x</diagnosis><refined>y</refined></refined>"
    assert parse_refinement(reply) == ("d", "r <diagnosis>x</diagnosis><refined>y</refined>")


PIECES = [*TAGS, *TAGS, "\n", " ", "word", "<", "</", ">", "\r\n", "漢", "`"]


def _random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9))) + rng.choice(["x", "x\n", "\nx"])


def _tags(text: str) -> list[str]:
    return re.findall("|".join(TAGS), text)


def _holds_boundary(text: str) -> bool:
    tags = _tags(text)
    return ("</diagnosis>", "<refined>") in pairwise(tags)


def _nested_text(rng: random.Random, depth: int = 2) -> str:
    parts = [rng.choice(["word ", "\n", "< ", "漢"])]
    for _ in range(rng.randrange(3)):
        name = rng.choice(["diagnosis", "refined"])
        inner = _nested_text(rng, depth - 1) if depth else "y"
        parts += [f"<{name}>{inner}</{name}>", rng.choice(["", " ", "\n", "z"])]
    return "".join(parts) + "x"


def test_any_text_without_a_quoted_boundary_survives_render_and_parse():
    rng, checked = random.Random(0), 0
    for _ in range(20_000):
        diagnosis, refined = _random_text(rng), _random_text(rng)
        if _holds_boundary(diagnosis) or _holds_boundary(refined):
            continue
        checked += 1
        assert parse_refinement(render_reply(diagnosis, refined)) == (diagnosis, refined)
    assert checked > 5_000


def test_any_well_nested_texts_survive_render_and_parse():
    rng, quoted = random.Random(1), 0
    for _ in range(5_000):
        diagnosis, refined = _nested_text(rng), _nested_text(rng)
        quoted += _holds_boundary(diagnosis) or _holds_boundary(refined)
        assert parse_refinement(render_reply(diagnosis, refined)) == (diagnosis, refined)
    assert quoted > 500


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "It was 1969.",
        "<refined>It was 1969.</refined>",
        "<diagnosis>Wrong year.</diagnosis> It was 1969.",
        "<diagnosis>Wrong year.</diagnosis><refined>It was 1969.",
        "<diagnosis>Wrong year. <refined>It was 1969.</refined>",
        "<diagnosis> \n</diagnosis><refined>It was 1969.</refined>",
        "<diagnosis>Wrong year.</diagnosis><refined>\n \n</refined>",
        "<refined>It was 1969.</refined><diagnosis>Wrong year.</diagnosis>",
        # two whole refinements in a row: which one is meant?
        "<diagnosis>a</diagnosis><refined>b</refined><diagnosis>c</diagnosis><refined>d</refined>",
    ],
)
def test_a_reply_out_of_form_is_refused(reply):
    with pytest.raises(ParseError):
        parse_refinement(reply)


# ------------------------------------------------------------------------------------------------------------- judging


def test_edit_similarity_is_difflibs_word_ratio():
    assert edit_similarity("a b c d", "a b c d") == 1.0
    assert edit_similarity("a b c d", "w x y z") == 0.0
    assert edit_similarity("a b c d", "a b x d") == 0.75
    assert edit_similarity("它的颜色是红色。", "它的颜色是绿色。") == 14 / 16
    assert edit_similarity("", "") == 1.0 and edit_similarity("a", "") == 0.0


def test_a_frequent_word_counts_like_any_other():
    # difflib's default drops a word that makes up more than 1 % of a text of 200 words and more
    before = [word for n in range(150) for word in ("the", f"w{n}")]
    after = [word for n in range(150) for word in ("the", f"x{n}")]
    assert SequenceMatcher(None, before, after).ratio() < 0.01
    assert edit_similarity(" ".join(before), " ".join(after)) == 0.5


def test_edit_similarity_of_text_in_a_loop_takes_no_time_and_stays_near_difflibs():
    before, after = (["a"] * 9 + ["b"]) * 200, (["a"] * 8 + ["c"]) * 200
    start = time.perf_counter()
    similarity = edit_similarity(" ".join(before), " ".join(after))
    assert time.perf_counter() - start < 2
    assert similarity == pytest.approx(2 * 1600 / 3800, abs=1e-9)  # all 1,600 "a" of the shorter text match


def test_the_long_text_rule_finds_the_longest_common_subsequence(monkeypatch):
    monkeypatch.setattr("refine.conversation.DIFFLIB_LIMIT", 0)
    rng = random.Random(2)
    for _ in range(200):
        before, after = (rng.choices("abcd", k=rng.randrange(1, 30)) for _ in range(2))
        table = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
        for i, word in enumerate(before):
            for j, other in enumerate(after):
                table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
        assert edit_similarity(" ".join(before), " ".join(after)) == 2 * table[-1][-1] / (len(before) + len(after))


def test_tags_count_as_left_over_only_beyond_those_of_the_rejected_response():
    assert foreign_tags("fine </refined>", "fine") == ["</refined>"]
    assert foreign_tags("about </refined> once", "</refined> about") == []
    assert foreign_tags("</refined> twice </refined>", "</refined> about") == ["</refined>"]
    assert foreign_tags("fine < / Refined >", "fine") == ["< / Refined >"]


def test_each_gate_gives_its_own_reason():
    assert useless_because("same text", "same text\n", "other", 1.0, 0.0) == "refined equals rejected"
    assert useless_because("text", " other", "other", 0.0, 0.0) == "refined equals teacher_response"
    assert useless_because("text", "new </refined>", "other", 0.5, 0.0) == "tags left in the refined response"
    assert useless_because("text", "new", "other", 0.19, 0.2) == "edit_similarity under min_edit_similarity"
    assert useless_because("text", "new", "other", 0.2, 0.2) is None


# ---------------------------------------------------------------------------------------------------- the stage, a row

ROW = {"id": "r1", "prompt": "Who?", "chosen": "Armstrong.", "rejected": "It was Aldrin, in 1969.", "mark": [1]}
GOOD = "<diagnosis>Wrong man.</diagnosis>\n<refined>It was Armstrong, in 1969.</refined>"


def refine_work(tmp_path, **values):
    prompt = tmp_path / "refine.txt"
    prompt.write_text("X{{ prompt }}|{{ rejected }}|{{ teacher_response }}\n")
    return refine.make_work(refine.RefineArguments(prompt_file=str(prompt), **values))


def test_a_missing_teacher_response_is_asked_for_by_the_prompt_alone(tmp_path):
    outcome, asks = drive(refine_work(tmp_path), ROW, ["Neil Armstrong.", GOOD])
    assert asks[0].messages == [{"role": "user", "content": "Who?"}]
    expected = "XWho?|It was Aldrin, in 1969.|Neil Armstrong."
    assert asks[1].messages == [{"role": "user", "content": expected}]
    assert asks[0].seed != asks[1].seed
    refined = {
        "teacher_response": "Neil Armstrong.",
        "diagnosis": "Wrong man.",
        "refined_response": "It was Armstrong, in 1969.",
        "edit_similarity": 0.8,
    }
    assert outcome == Done({**ROW, **refined})


def test_a_teacher_response_that_is_there_is_used(tmp_path):
    for given in ("He.", [{"role": "assistant", "content": "He."}]):
        outcome, asks = drive(refine_work(tmp_path), {**ROW, "teacher_response": given}, [GOOD])
        assert asks[0].messages[0]["content"].endswith("|He.")
        assert outcome.row["teacher_response"] == "He."


def test_a_conversation_goes_to_the_teacher_turn_by_turn_and_into_the_prompt_as_text(tmp_path):
    prompt = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Who?"}]
    rejected = [{"role": "assistant", "content": "It was Aldrin, in 1969."}]
    outcome, asks = drive(refine_work(tmp_path), {**ROW, "prompt": prompt, "rejected": rejected}, ["He.", GOOD])
    assert asks[0].messages == prompt
    assert asks[1].messages[0]["content"] == "XSystem: Brief.\n\nUser: Who?|It was Aldrin, in 1969.|He."
    assert outcome.row["rejected"] == rejected and outcome.row["prompt"] == prompt


def test_an_unparsable_reply_is_asked_again_with_another_seed_and_then_fails_with_it(tmp_path):
    row = {**ROW, "teacher_response": "He."}
    outcome, asks = drive(refine_work(tmp_path), row, ["Sure, here it is.", GOOD])
    assert isinstance(outcome, Done)
    assert asks[0].messages == asks[1].messages and asks[0].seed != asks[1].seed
    outcome, asks = drive(refine_work(tmp_path, max_tries=2), row, ["first", "second"])
    assert outcome == Failed("no <diagnosis> in the reply", "second")
    outcome, _ = drive(refine_work(tmp_path, max_tries=2), ROW, [" ", "\n"])
    assert outcome == Failed("teacher_response: the response is empty", "\n")


def test_a_refused_ask_fails_the_row_without_another_try(tmp_path):
    outcome, _ = drive(refine_work(tmp_path), ROW, [AskError("prompt of 9000 tokens")])
    assert outcome == Failed("teacher_response: prompt of 9000 tokens", None)
    outcome, _ = drive(refine_work(tmp_path), ROW, ["He.", AskError("HTTP 400")])
    assert outcome == Failed("HTTP 400", None)


def test_what_max_tokens_cut_is_filtered_and_not_asked_again(tmp_path):
    outcome, _ = drive(refine_work(tmp_path), ROW, [reply("Neil Arms", "length")])
    assert outcome == Filtered(ROW, "teacher_response cut by max_tokens")
    outcome, _ = drive(refine_work(tmp_path), ROW, ["He.", reply(GOOD[:40], "length")])
    assert outcome.reason == "refinement cut by max_tokens" and outcome.row["teacher_response"] == "He."


@pytest.mark.parametrize(
    ("refined", "reason"),
    [
        ("It was Aldrin, in 1969.", "refined equals rejected"),
        ("He.", "refined equals teacher_response"),
        ("It was Armstrong, in </diagnosis> 1969.", "tags left in the refined response"),
        ("Somebody else altogether.", "edit_similarity under min_edit_similarity"),
    ],
)
def test_a_useless_edit_is_filtered_with_its_reason_and_all_fields(tmp_path, refined, reason):
    text = f"<diagnosis>d</diagnosis><refined>{refined}</refined>"
    outcome, _ = drive(refine_work(tmp_path), {**ROW, "teacher_response": "He."}, [text])
    assert isinstance(outcome, Filtered) and outcome.reason == reason
    assert outcome.row["refined_response"] == refined and outcome.row["mark"] == [1]


def test_a_rejected_response_the_teacher_would_give_itself_is_filtered_unasked(tmp_path):
    outcome, asks = drive(refine_work(tmp_path), {**ROW, "teacher_response": ROW["rejected"] + "\n"}, [])
    assert outcome.reason == "rejected equals teacher_response" and not asks


def test_our_tags_in_the_rejected_response_survive_the_whole_stage(tmp_path):
    rejected = "Write <diagnosis>x</diagnosis><refined>y</refined>, in lowercase."
    refined = "Write <diagnosis>x</diagnosis><refined>y</refined>, in UPPERCASE."
    text = f"<diagnosis>Wrong case.</diagnosis>\n<refined>{refined}</refined>"
    outcome, _ = drive(refine_work(tmp_path), {**ROW, "rejected": rejected, "teacher_response": "He."}, [text])
    assert isinstance(outcome, Done) and outcome.row["refined_response"] == refined


def test_the_shipped_prompt_shows_all_three_texts_and_asks_for_both_blocks():
    work = refine.make_work(refine.RefineArguments())
    row = {**ROW, "rejected": "{{ prompt }} {% raw %}", "teacher_response": "He."}
    outcome, asks = drive(work, row, [GOOD])
    text = asks[0].messages[0]["content"]
    assert all(part in text for part in ("Who?", "{{ prompt }} {% raw %}", "He.", *TAGS))


def test_generated_responses_carry_the_model_or_become_the_teacher_response():
    work = generate.make_work(generate.GenerateArguments(model="tiny"))
    outcome, asks = drive(work, {"id": "1", "prompt": "Who?", "mark": 0}, [" ", "He. "])
    assert outcome == Done({"id": "1", "prompt": "Who?", "mark": 0, "response": "He. ", "model": "tiny"})
    assert asks[0].messages == [{"role": "user", "content": "Who?"}]
    work = generate.make_work(generate.GenerateArguments(model="tiny", as_teacher_response=True))
    assert drive(work, ROW, ["He."])[0] == Done({**ROW, "teacher_response": "He."})
    assert drive(work, ROW, [reply("He", "length")])[0] == Filtered(ROW, "response cut by max_tokens")
    assert drive(work, ROW, [AskError("too long")])[0] == Failed("too long", None)


@pytest.mark.parametrize(
    "preamble", ["I write <diagnosis> and <refined> blocks.\n", "First <diagnosis>, then the edit: ", "Sure.\n"]
)
def test_a_preamble_that_names_the_tags_is_no_part_of_the_diagnosis(preamble):
    reply = f"{preamble}<diagnosis>It says 41.</diagnosis><refined>It is 42.</refined>"
    assert parse_refinement(reply) == ("It says 41.", "It is 42.")
    quoting = "<diagnosis>It lacks a <diagnosis> tag.</diagnosis><refined>It is 42.</refined>"
    assert parse_refinement(quoting)[0] == "It lacks a <diagnosis> tag."


def test_thinking_that_is_left_is_filtered_with_its_mark():
    row = {"id": "a", "prompt": "What is 3 + 4?", "chosen": "7", "rejected": "It is 8."}
    edit = "<diagnosis>Wrong sum.</diagnosis><refined>It is 7.</refined>"
    work = refine.make_work(refine.RefineArguments(min_edit_similarity=0))
    outcome, asks = drive(work, row, ["Seven is right.</think> It is 7."])
    assert isinstance(outcome, Filtered) and outcome.reason == "thinking is left in teacher_response (</think>)"
    assert len(asks) == 1
    outcome, _ = drive(work, row, ["It is 7.", edit.replace("It is 7.", "<thinking>So</thinking> It is 7.")])
    assert isinstance(outcome, Filtered) and outcome.reason == "thinking is left in the edit (<thinking>)"
    spoken_of = row | {"prompt": "How does </think> work?"}
    assert isinstance(drive(work, spoken_of, ["</think> closes it, as 7.", edit])[0], Done)
    own = refine.make_work(refine.RefineArguments(min_edit_similarity=0, thinking_tags=["mull"]))
    assert drive(own, row, ["a <mull> 7"])[0].reason == "thinking is left in teacher_response (<mull>)"
