"""Messages are checked before they reach a teacher, and thinking is kept apart from the answer."""

import pytest

from distiller.chat import check_messages, thinking_marks
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
        ("plain answer\n", "", "plain answer\n", None),
        ("<think>\nwhy\n</think>\n\nanswer", "", "answer", "why"),
        ("\n<think>why</think>answer", None, "answer", "why"),
        ("why\n</think>\n\nanswer", "<think>", "answer", "why"),
        ("why\n</reasoning>\nmore</think>answer", "<think>", "answer", "why\n</reasoning>\nmore"),
        ("why\n</think>\n\nanswer", None, "answer", "why"),
        ("<think>\n\n</think>\n\nanswer", "", "answer", None),
        ("<think>it went on and", "", "", "it went on and"),
        ("it went on and", "<think>", "", "it went on and"),
        ("[Thought] for the day: rest.", None, "[Thought] for the day: rest.", None),
        ("<think>a</think>b </think> c", "", "b </think> c", "a"),
        ("<thinking>why</thinking>answer", None, "answer", "why"),
        ("[THINK]why[/THINK]answer", "", "answer", "why"),
        ("<reasoning>\nwhy\n</reasoning>\n\nanswer", None, "answer", "why"),
        ("<thought>why</thought>answer", None, "answer", "why"),
        ("<THINK>why</THINK>answer", "", "answer", "why"),
        ("<think>a</think>\n<think>b</think>\nanswer", "", "answer", "a\nb"),
        ("<think>a</think>\n<thinking>b</thinking>", None, "", "a\nb"),
        ("<thinking>a</thinking>\n<think>b", None, "", "a\nb"),
        ("why\r\n</think>\r\n\r\nanswer", None, "answer", "why"),
        ("why</think>answer", "<think>", "answer", "why"),
        ("<mull>why</mull>answer", "", "answer", "why"),
        ("<think>not </reasoning> yet</think>answer", "", "answer", "not </reasoning> yet"),
        ("<think >why</think >answer", None, "answer", "why"),
        ('<reasoning effort="low">why</ reasoning>answer', None, "answer", "why"),
        ("<seed:think>why</seed:think>answer", None, "answer", "why"),
        ("\u25c1think\u25b7why\u25c1/think\u25b7answer", None, "answer", "why"),
        ("<|begin_of_thought|>why<|end_of_thought|>answer", None, "answer", "why"),
        ("analysiswhyassistantfinalanswer", None, "answer", "why"),
        ("analysis of the text: good", None, "analysis of the text: good", None),
        ("[thought experiments] are fun [/thought]", None, "[thought experiments] are fun [/thought]", None),
        ("<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>a", None, "a", "why"),
    ],
)
def test_thinking_is_split_off_the_answer(reply, opened, answer, thinking):
    assert thinking_marks(("mull",)).split(reply, opened) == (answer, thinking)


@pytest.mark.parametrize("opened", ["", None])
def test_an_answer_that_quotes_the_thinking_tags_is_left_whole(opened):
    answer = "<refined>Write </think> to close what <think> opened.</refined>"
    assert thinking_marks().split(answer, opened) == (answer, None)
    answer = "The note:\n<note>\n  <thought>\n    Buy milk\n  </thought>\n</note>"
    assert thinking_marks().split(answer, opened) == (answer, None)


@pytest.mark.parametrize("opened", ["", None])
def test_a_form_that_the_prompt_asks_for_is_part_of_the_answer(opened):
    answer = "<reasoning>\n2 + 2 = 4\n</reasoning>\n<answer>4</answer>"
    asked = [
        {"role": "system", "content": "Write <reasoning> ... </reasoning> <answer> ... </answer>."},
        *user("2 + 2?"),
    ]
    assert thinking_marks().split(answer, opened, messages=asked) == (answer, None)
    assert thinking_marks().split(answer, opened) == ("<answer>4</answer>", "2 + 2 = 4")
    assert thinking_marks(("reasoning",)).split(answer, opened, messages=asked)[0] == "<answer>4</answer>"
    unopened = answer.removeprefix("<reasoning>\n")
    assert thinking_marks().split(unopened, opened, messages=asked) == (unopened, None)
    asked = user("Think first, inside <think> </think>.")
    assert thinking_marks().split("<think>why</think>4", opened, messages=asked) == ("4", "why")


def test_an_unclosed_mark_is_thinking_that_max_tokens_cut_or_surely_thinking():
    assert thinking_marks().split("<reasoning>why", cut=True) == ("", "why")
    assert thinking_marks().split("<reasoning>why") == ("<reasoning>why", None)
    assert thinking_marks(("reasoning",)).split("<reasoning>why") == ("", "why")


def test_a_mark_that_is_left_is_found_unless_it_is_what_the_conversation_speaks_of():
    marks = thinking_marks(("mull",))
    assert marks.left("It is 7.</THINK> So 7.", "What is 3 + 4?") == "</THINK>"
    assert marks.left("a <mull> b") == "<mull>" and thinking_marks().left("a <mull> b") is None
    assert marks.left("Write </think>.", "How do I close <think>? By </think>?") is None
    assert marks.left("I think, [so] <b>I am</b>.") is None


def test_a_special_token_that_is_a_mark_is_known():
    marks = thinking_marks(("mull",))
    assert all(map(marks.uses, ("[THINK]", "[/THINK]", "<think>", "<|channel|>", "</mull>")))
    assert not any(map(marks.uses, ("<|im_end|>", "</s>", "[INST]", "<pad>")))


def test_a_prompt_that_opens_the_thinking_is_known():
    marks = thinking_marks()
    assert marks.opens("<|im_start|>assistant\n<think>\n") == "<think>" and marks.opens("[THINK]") == "[THINK]"
    assert not marks.opens("Say <think> twice. <think>x</think>")
