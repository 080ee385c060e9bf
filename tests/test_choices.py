"""The probability of each wording of a place in a reply: the tree of tokens, and servers that can and cannot say."""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distiller.choices import ChoiceTree, reading_texts
from distiller.engine import Ask, AskError, Choices, Completion, EngineDead, Sampling
from distiller.openai_engine import OpenAIEngine

SCORES = tuple(str(score) for score in range(1, 11))
GRADE = Choices("So <score>", SCORES, "</score>\nThat is all.")
TOKENIZERS = {
    "split digits": r"</|<|>|score|\d|\s|\w+|.",
    "whole ten": r"</|<|>|score|\d+|\s|\w+|.",
    "ten with the tag's end": r"</|<|>10|>|score|\d|\s|\w+|.",
    "digits with the tag's end": r"</|<|>\d+|>|score|\d|\s|\w+|.",
    "digits with the next tag": r"\d+</|</|<|>|score|\s|\w+|.",
    "ten alone with the next tag": r"10</|</|<|>|score|\d|\s|\w+|.",
    "characters": r"(?s).",
}


def tokenize(text: str, pattern: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of the pattern's pieces, made up as they come."""
    return [vocabulary.setdefault(piece, len(vocabulary)) for piece in re.findall(pattern, text)]


def toy_probabilities(context: list[int], size: int) -> list[float]:
    """A language model: the next token's distribution, drawn from the tokens so far."""
    weights = [random.Random(f"{context} {token}").random() ** 4 for token in range(size)]
    return [weight / sum(weights) for weight in weights]


def answer(tree: ChoiceTree, size: int) -> dict:
    asked = {node: toy_probabilities([*tree.context, *node], size) for node in tree.nodes}
    return {node: {token: math.log(asked[node][token]) for token in wanted} for node, wanted in tree.nodes.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tree_gives_the_probability_of_each_reading_up_to_where_all_agree_again(name):
    vocabulary: dict[str, int] = {}
    readings = [tokenize(text, TOKENIZERS[name], vocabulary) for text in reading_texts(GRADE)]
    tree = ChoiceTree(GRADE, readings)
    got = tree.logprobs(answer(tree, len(vocabulary)))
    pieces = list(vocabulary)
    for reading, path, value in zip(readings, tree.paths, got, strict=True):
        # Teacher forcing, token by token, over what is not context.
        assert reading[: len(tree.context) + len(path)] == [*tree.context, *path]
        forced = sum(
            math.log(toy_probabilities(reading[:end], len(vocabulary))[reading[end]])
            for end in range(len(tree.context), len(tree.context) + len(path))
        )
        assert value == pytest.approx(forced, abs=1e-9)
        # The event says that the number is over, and no more than its first token does.
        written = "".join(pieces[token] for token in reading[: len(tree.context) + len(path)])
        without_last = "".join(pieces[token] for token in reading[: len(tree.context) + len(path) - 1])
        number = re.search(r"(\d+)\D", written)
        assert number and number[1] == SCORES[tree.paths.index(path)]
        assert "</score>" not in without_last
    assert math.fsum(map(math.exp, got)) < 1


def test_what_every_reading_shares_is_asked_for_once_and_a_single_token_has_one_question():
    def tree(name):
        vocabulary: dict[str, int] = {}
        made = ChoiceTree(GRADE, [tokenize(t, TOKENIZERS[name], vocabulary) for t in reading_texts(GRADE)])
        pieces = list(vocabulary)
        nodes = {tuple(pieces[t] for t in n): {pieces[t] for t in w} for n, w in made.nodes.items()}
        return "".join(pieces[token] for token in made.context), nodes

    context, nodes = tree("split digits")
    assert context == "So <score>"
    assert nodes.pop(()) == set("123456789") and nodes.pop(("1",)) == {"0", "</"}
    assert nodes.pop(("1", "0")) == {"</"} and set(nodes) == {(digit,) for digit in "23456789"}
    context, nodes = tree("ten with the tag's end")
    assert context == "So <score" and nodes[()] == {">", ">10"} and nodes[(">",)] == set("123456789")


def test_texts_that_the_tokenizer_does_not_tell_apart_are_refused():
    with pytest.raises(AskError, match="does not tell '1'"):
        ChoiceTree(GRADE, [[1, 2, 9] for _ in SCORES])
    with pytest.raises(AskError, match="does not tell"):
        ChoiceTree(Choices("", ("1", "10"), ""), [[5, 1], [5, 1, 0]])  # nothing follows that could end the 1


@pytest.mark.parametrize("value", [0.0, math.nan, 3.0])
def test_numbers_that_are_no_log_probabilities_are_refused(value):
    tree = ChoiceTree(Choices("", ("1", "2"), "x"), [[1, 9], [2, 9]])
    answers = {node: dict.fromkeys(wanted, value) for node, wanted in tree.nodes.items()}
    with pytest.raises(EngineDead, match="raw_logprobs"):
        tree.logprobs(answers)


# ------------------------------------------------------------------------------------------------------------- servers

MESSAGES = [{"role": "user", "content": "Grade it."}]
WHOLE_TEN = TOKENIZERS["whole ten"]


class Handler(BaseHTTPRequestHandler):
    """What a vLLM server does at the addresses we use, with a toy model; `server.changed` are its faults."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.now += 1
            self.server.peak = max(self.server.peak, self.server.now)
        time.sleep(self.server.seconds)
        status, answer = self.server.changed.get(self.path, self.served)(body)
        with self.server.lock:
            self.server.now -= 1
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def served(self, body: dict) -> tuple[int, dict]:
        vocabulary = self.server.vocabulary
        with self.server.lock:
            if self.path == "/tokenize" and "messages" in body:
                assert body["add_generation_prompt"] and body["chat_template_kwargs"] == {"enable_thinking": True}
                return 200, {"tokens": tokenize(f"{body['messages']} assistant: ", WHOLE_TEN, vocabulary), "count": 1}
            if self.path == "/tokenize":
                assert body["add_special_tokens"] is False
                return 200, {"tokens": tokenize(body["prompt"], WHOLE_TEN, vocabulary), "count": 1}
        if self.path != "/v1/completions":
            return 404, {"error": {"message": "no such page"}}
        assert body["max_tokens"] == 1 and body["temperature"] == 0
        top = {
            f"token_id:{token}": math.log(toy_probabilities(body["prompt"], self.server.size)[token])
            for token in [0, *body["logprob_token_ids"]]  # with the one that was drawn
        }
        logprobs = {"top_logprobs": [top], "tokens": ["token_id:0"], "token_logprobs": [-1.0], "text_offset": [0]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
        return 200, {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.changed: dict = {}
        self.vocabulary: dict[str, int] = {}
        self.size = 60
        self.lock = threading.Lock()
        self.now = self.peak = 0  # requests in it at once
        self.seconds = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, choices: Choices = GRADE) -> Completion | AskError:
    engine = OpenAIEngine(
        "m",
        Sampling(0.7, 1.0, -1, 16),
        server.url,
        max_retries=0,
        chat_template_kwargs={"enable_thinking": True},
    )
    try:
        engine.submit(0, Ask(MESSAGES, 0, choices=choices))
        ((_, completion),) = engine.collect()
        return completion
    finally:
        engine.close()


def test_a_server_that_takes_tokens_gives_the_probabilities_of_the_whole_conversation(server):
    completion = ask(server)
    prompt = tokenize(f"{MESSAGES} assistant: ", WHOLE_TEN, server.vocabulary)
    readings = [tokenize(text, WHOLE_TEN, server.vocabulary) for text in reading_texts(GRADE)]
    start = len(tokenize("So <score>", WHOLE_TEN, server.vocabulary))
    expected = [
        sum(
            math.log(toy_probabilities(prompt + reading[:end], server.size)[reading[end]])
            for end in (start, start + 1)
        )
        for reading in readings
    ]
    assert completion.choice_logprobs == pytest.approx(expected, abs=1e-9)
    assert completion.text == "" and completion.completion_tokens == 11 and completion.prompt_tokens > len(prompt)


def test_max_concurrency_holds_for_the_requests_behind_an_ask_too(server):
    server.seconds = 0.01
    engine = OpenAIEngine(
        "m", Sampling(0.7, 1.0, -1, 16), server.url, max_concurrency=3, chat_template_kwargs={"enable_thinking": True}
    )
    try:
        for key in range(3):
            engine.submit(key, Ask(MESSAGES, 0, choices=GRADE))
        answers = []
        while len(answers) < 3:
            answers += [answer for _, answer in engine.collect()]
    finally:
        engine.close()
    assert all(isinstance(answer, Completion) for answer in answers) and server.peak == 3


NOT_THERE = (404, {"error": {"message": "no such page"}})
PLAIN = {"index": 0, "text": "7", "finish_reason": "length", "logprobs": None}
TOP = PLAIN | {"logprobs": {"top_logprobs": [{"7": -0.1, " 8": -2.5}], "tokens": ["7"], "token_logprobs": [-0.1]}}


@pytest.mark.parametrize(
    ("path", "response"),
    [
        ("/tokenize", NOT_THERE),
        ("/tokenize", (405, {"detail": "Method Not Allowed"})),
        ("/tokenize", (200, "<html>welcome</html>")),
        ("/tokenize", (200, {"content": "llama.cpp has another one"})),
        ("/v1/completions", NOT_THERE),
        ("/v1/completions", (200, "<html>welcome</html>")),
        ("/v1/completions", (200, {"object": "text_completion", "choices": [PLAIN]})),
        ("/v1/completions", (200, {"object": "text_completion", "choices": [TOP]})),
        ("/v1/completions", (200, {"object": "text_completion", "choices": []})),
    ],
)
def test_a_server_that_cannot_weigh_the_grades_ends_the_command_and_names_the_mode_that_works(server, path, response):
    server.changed[path] = lambda body: response
    with pytest.raises(EngineDead, match="--score_mode mean"):
        ask(server)


def test_texts_that_a_served_tokenizer_does_not_tell_apart_fail_their_ask_alone(server):
    server.changed["/tokenize"] = lambda body: (200, {"tokens": [3, 4], "count": 2})
    assert isinstance(ask(server), AskError)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_a_fault_that_passes_is_not_taken_for_a_server_that_cannot_weigh(server, path):
    server.changed[path] = lambda body: (200, {"error": {"message": "upstream is down", "code": 502}})
    failed = ask(server)
    assert isinstance(failed, AskError) and "HTTP 502 from the server: upstream is down" in str(failed)
