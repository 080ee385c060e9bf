"""Messages are checked before they reach a teacher, and thinking is kept apart from the answer."""

import pytest

from distiller.chat import check_messages, split_thinking
from distiller.engine import AskError


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "messages", [[], user(None), user(["a"]), user(""), user(" \n"), user("\ud800"), [{"content": "a"}]]
)
def test_messages_that_an_engine_would_swallow_or_die_of_are_refused(messages):
    with pytest.raises(AskError):
        check_messages(messages)


def test_a_conversation_that_ends_with_the_assistant_is_refused_and_others_are_not():
    turns = [{"role": "system", "content": ""}, *user("a"), {"role": "assistant", "content": "b"}]
    with pytest.raises(AskError, match="nothing to answer"):
        check_messages(turns)
    check_messages([*turns, *user("c")])


@pytest.mark.parametrize(
    ("reply", "opened", "answer", "thinking"),
    [
        ("plain answer\n", False, "plain answer\n", None),
        ("<think>\nwhy\n</think>\n\nanswer", False, "answer", "why"),
        ("\n<think>why</think>answer", None, "answer", "why"),
        ("why\n</think>\n\nanswer", True, "answer", "why"),
        ("why\n</think>\n\nanswer", None, "answer", "why"),
        ("<think>\n\n</think>\n\nanswer", False, "answer", None),
        ("<think>it went on and", False, "", "it went on and"),
        ("it went on and", True, "", "it went on and"),
        ("<think>a</think>b </think> c", False, "b </think> c", "a"),
    ],
)
def test_thinking_is_split_off_the_answer(reply, opened, answer, thinking):
    assert split_thinking(reply, opened) == (answer, thinking)


@pytest.mark.parametrize("opened", [False, None])
def test_an_answer_that_quotes_the_thinking_tags_is_left_whole(opened):
    answer = "<refined>Write </think> to close what <think> opened.</refined>"
    assert split_thinking(answer, opened) == (answer, None)
