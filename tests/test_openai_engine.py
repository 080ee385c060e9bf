"""OpenAIEngine against a scripted server on loopback."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distiller.engine import Ask, AskError, Completion, EngineDead, Sampling
from distiller.openai_engine import OpenAIEngine

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=16)


CUT = 0
"""Stands for a status: the connection breaks in the middle of the answer."""


def reply(content="yes", finish_reason="stop", **message) -> tuple[int, dict]:
    """HTTP status and body of a chat completion of 5 + 2 tokens."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return 200, body


def refusal(status: int, message: str = "no") -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": None}}


def hidden(code: int | str | None, message: str) -> tuple[int, dict]:
    """An error in an answer of status 200, as some proxies send it."""
    return 200, {"error": {"message": message, "code": code}}


class Server(ThreadingHTTPServer):
    """Answers each chat request with `script(body)` -> (status, JSON body or raw text).

    Keeps the bodies and keys it was sent and the greatest number of requests that were in it at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Callable[[dict], tuple[int, dict | str]] = lambda body: reply()
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.paths: set[str] = set()
        self.models: dict | list = {"object": "list", "data": [{"id": "served", "object": "model"}]}
        self.sent_headers = {"retry-after-ms": "1"}
        self.dribble: Callable[[dict], float] = lambda body: 0.0  # seconds between two bytes
        self.now = self.peak = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that had enough, or was killed
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(200, self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.paths.add(self.path)
            self.server.now += 1
            self.server.peak = max(self.server.peak, self.server.now)
        status, answer = self.server.script(body)
        with self.server.lock:
            self.server.now -= 1
        self.answer(status, answer, self.server.dribble(body))

    def answer(self, status: int, body: dict | str, pause: float = 0.0) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status or 200)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.sent_headers.items():
            self.send_header(name, value)
        self.end_headers()
        data = data if status else data[: len(data) // 2]
        for start in range(0, len(data), 1 if pause else len(data)):
            self.wfile.write(data[start : start + 1] if pause else data)
            time.sleep(pause)
        self.close_connection = status == CUT

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(text: str = "hello", seed: int = 3) -> Ask:
    return Ask([{"role": "user", "content": text}], seed)


def answers(server: Server, asks: list[Ask], sampling: Sampling = GREEDY, **options) -> list[Completion | AskError]:
    """Each ask's answer, in the order of the asks."""
    engine = OpenAIEngine("m", sampling, server.url, **{"max_retries": 1, **options})
    try:
        for key, one in enumerate(asks):
            engine.submit(key, one)
        got: dict[int, Completion | AskError] = {}
        while len(got) < len(asks):
            got.update(engine.collect())
        assert engine.collect() == []
        return [got[key] for key in range(len(asks))]
    finally:
        engine.close()
        engine.close()


def test_an_answer_carries_text_tokens_and_finish_reason(server):
    assert answers(server, [ask()]) == [Completion("yes", None, "stop", 5, 2, None)]
    assert server.keys == {"Bearer EMPTY"}


def test_the_key_comes_from_the_environment_and_stays_out_of_the_facts(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    answers(server, [ask()])
    assert server.keys == {"Bearer sk-secret"}
    engine = OpenAIEngine("m", GREEDY, server.url)
    assert engine.facts()["model"] == "m" and "sk-secret" not in str(engine.facts())
    engine.close()


def test_fields_that_hosted_servers_refuse_are_sent_only_when_set(server):
    answers(server, [ask()])
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20, max_tokens=9)
    answers(server, [ask(seed=11)], sampling, chat_template_kwargs={"enable_thinking": False})
    plain, full = server.bodies
    messages = [{"role": "user", "content": "hello"}]
    expected = {"model": "m", "messages": messages, "seed": 3, "temperature": 0.0, "top_p": 1.0, "max_tokens": 16}
    assert plain == expected
    expected |= {"seed": 11, "temperature": 0.7, "top_p": 0.8, "max_tokens": 9}
    assert full == expected | {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}


def test_concurrency_is_bounded_and_every_ask_is_answered_once(server):
    def script(body: dict):
        time.sleep(0.02)
        return reply(body["messages"][0]["content"])

    server.script = script
    got = answers(server, [ask(str(number)) for number in range(40)], max_concurrency=4)
    assert [completion.text for completion in got] == [str(number) for number in range(40)]
    assert server.peak == 4


def test_one_refused_ask_harms_only_itself(server):
    def script(body: dict):
        return refusal(400, "maximum context length") if body["messages"][0]["content"] == "long" else reply()

    server.script = script
    first, bad, empty, last = answers(server, [ask(), ask("long"), ask(None), ask()])
    assert first.text == last.text == "yes"
    assert isinstance(bad, AskError) and "400" in str(bad) and "maximum context length" in str(bad)
    assert isinstance(empty, AskError) and "content" in str(empty)


PASSING = [refusal(408), refusal(429), refusal(500), refusal(502), refusal(503), (CUT, reply()[1])]
PASSING += [hidden(429, "429"), (200, {"choices": [{"error": {"code": 502, "message": "502"}}]}), (200, "<p>502</p>")]


def told(body: dict) -> str:
    return body["messages"][0]["content"]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault[0])
def test_a_passing_fault_is_retried_and_a_lasting_one_fails_its_ask_alone(server, fault):
    passing = iter([fault, fault])
    server.script = lambda body: next(passing, reply())
    (good,) = answers(server, [ask()], max_retries=2)
    assert good == Completion("yes", None, "stop", 5, 2, None) and len(server.bodies) == 3
    server.script = lambda body: fault if told(body) == "cursed" else reply()
    bad, good = answers(server, [ask("cursed"), ask()], max_retries=1)
    assert isinstance(bad, AskError) and good.text == "yes"
    where = {200: "in an answer of status 200", CUT: "1 retries"}
    assert where.get(fault[0], str(fault[0])) in str(bad)
    assert len([body for body in server.bodies if told(body) == "cursed"]) == 3 * 2  # asked three times, each retried


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refusal(429, "quota"), "takes no more requests after 1 retries .*quota.* --max_concurrency"),
        (refusal(500), "fails every request after 1 retries .*500"),
        (refusal(503, "overloaded"), "fails every request after 1 retries .*503.*overloaded"),
        ((CUT, reply()[1]), "cannot be reached after 1 retries"),
        (
            (200, "<html><p>Back soon</p>"),
            r"fails every request .*\(HTTP 502: Back soon \(in an .* 200\)\). .* --base_url \(it usually ends",
        ),
        (hidden(429, "slow down"), r"takes no more requests after 1 retries \(HTTP 429: slow down \(in an answer of"),
        (hidden("\u00b2", "odd"), r"fails every request after 1 retries \(HTTP 500: odd"),
        ((200, {"object": "error", "message": "come later", "code": 429}), r"no more requests .*HTTP 429: come later"),
        ((200, {"detail": "gone wrong"}), "fails every request .*HTTP 500: gone wrong"),
        ((200, {"choices": None, "base_resp": {"status_code": 429, "status_msg": "slow"}}), "HTTP 429: slow"),
        ((200, reply("")[1] | {"error": {"message": "busy", "code": 503}}), "HTTP 503: busy"),
        (hidden("insufficient_quota", "pay"), r"refused the credentials \(HTTP 402: pay"),
        (hidden(None, "overloaded"), r"fails every request after 1 retries \(HTTP 500: overloaded"),
        (refusal(400, "no top_k here"), "refuses every request .*400.*no top_k here.*--top_k"),
        (refusal(422), "refuses every request .*422"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_fault_that_every_ask_meets_ends_the_command_and_fails_no_row(server, fault, words):
    server.script = lambda body: fault
    with pytest.raises(EngineDead, match=words):
        answers(server, [ask(str(number)) for number in range(5)])


def test_a_server_that_answers_nothing_in_time_ends_the_command(server):
    server.script = lambda body: (time.sleep(1.5), reply())[1]
    with pytest.raises(EngineDead, match="answers nothing within --timeout 0.2 seconds, after 0 retries"):
        answers(server, [ask()], timeout=0.2, max_retries=0)


def test_a_server_that_fails_after_it_has_answered_ends_the_command(server):
    server.script = lambda body: refusal(503) if told(body) != "first" else reply()
    engine = OpenAIEngine("m", GREEDY, server.url, max_retries=0)
    engine.submit(0, ask("first"))
    assert engine.collect()[0][1].text == "yes"
    engine.submit(1, ask("second"))
    with pytest.raises(EngineDead, match="503"):
        engine.collect()
    engine.close()


def test_an_answer_that_holds_none_is_asked_for_again_and_all_are_counted(server):
    empty = reply()[0], reply()[1] | {"choices": []}
    replies = iter([empty, (200, "<html>"), reply()])
    server.script = lambda body: next(replies)
    assert answers(server, [ask()]) == [Completion("yes", None, "stop", 10, 4, None)]
    server.script = lambda body: empty
    (never,) = answers(server, [ask()])
    assert isinstance(never, AskError) and (never.prompt_tokens, never.completion_tokens) == (15, 6)
    assert len(server.bodies) == 6


def test_cached_tokens_are_counted_where_the_server_says_so(server):
    said = reply()[1]
    said["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    server.script = lambda body: (200, said)
    (got,) = answers(server, [ask()])
    assert (got.prompt_tokens, got.cached_tokens) == (5, 4)
    said["usage"] = {"prompt_tokens": None, "completion_tokens": "2"}
    (got,) = answers(server, [ask()])
    assert (got.text, got.prompt_tokens, got.completion_tokens, got.cached_tokens) == ("yes", 0, 0, None)


def test_an_ask_may_have_a_sampling_of_its_own(server):
    own = Sampling(temperature=0.5, top_p=0.9, top_k=7, max_tokens=3)
    answers(server, [ask(), Ask([{"role": "user", "content": "own"}], 1, own)], max_concurrency=1)
    assert {key: server.bodies[0].get(key) for key in ("temperature", "max_tokens", "top_k")} == {
        "temperature": 0.0,
        "max_tokens": 16,
        "top_k": None,
    }
    sent = {key: server.bodies[1][key] for key in ("temperature", "top_p", "top_k", "max_tokens")}
    assert sent == {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 3}


def test_a_server_that_is_slow_with_one_ask_fails_that_ask_alone(server):
    def script(body: dict):
        time.sleep(6.0 if told(body) == "slow" else 0.0)
        return reply()

    server.script = script
    slow, good = answers(server, [ask("slow"), ask()], timeout=2.0, max_retries=0)
    assert isinstance(slow, AskError) and "timed out" in str(slow)
    assert good.text == "yes"


def test_an_answer_that_dribbles_is_over_at_the_time_out(server):
    server.dribble = lambda body: 0.05 if told(body) == "slow" else 0.0  # some 15 s in all
    started = time.monotonic()
    slow, good = answers(server, [ask("slow"), ask()], timeout=1.0, max_retries=1)
    assert 2.0 < time.monotonic() - started < 8.0
    assert isinstance(slow, AskError) and "no answer after 1 retries" in str(slow) and good.text == "yes"
    server.dribble = lambda body: 0.05
    with pytest.raises(EngineDead, match="answers nothing within --timeout 0.3 seconds, after 0 retries"):
        answers(server, [ask()], timeout=0.3, max_retries=0)


def test_a_wait_that_the_server_asks_for_is_obeyed(server):
    server.sent_headers = {"Retry-After": "2"}
    replies = iter([refusal(429, "slowly"), reply()])
    server.script = lambda body: next(replies)
    started = time.monotonic()
    assert answers(server, [ask()])[0].text == "yes"
    assert time.monotonic() - started >= 2.0  # its own first wait would be half a second


def test_a_wait_longer_than_the_client_waits_is_told_and_no_retry_is_claimed(server):
    server.sent_headers = {"Retry-After": "3600"}
    server.script = lambda body: refusal(429, "come later")
    said = r"no more requests after 0 retries \(HTTP 429: come later; it asks to wait, Retry-After: 3600\)"
    with pytest.raises(EngineDead, match=said):
        answers(server, [ask()], max_retries=5)
    assert len(server.bodies) == 2  # and a tiny one


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "OPENAI_API_KEY"), (402, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "--model m; it serves served")],
)
def test_an_error_that_every_ask_would_meet_ends_the_command_and_says_what_to_check(server, status, hint):
    server.script = lambda body: refusal(status)
    with pytest.raises(EngineDead, match=hint):
        answers(server, [ask(), ask()])


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"data": None}, "it lists no models"),
        ({"object": "list"}, "it lists no models"),
        ([{"id": "a"}], "it lists no models"),
        ("<html>", "it lists no models"),
        ({"data": [{"id": "a"}, {"name": "b"}, "c", {"id": 1}]}, "it serves a$"),
    ],
)
def test_whatever_a_server_says_of_its_models_the_fault_is_told(server, models, said):
    server.models, server.script = models, lambda body: refusal(404, "no such model")
    with pytest.raises(EngineDead, match=f"404: no such model.*{said}"):
        answers(server, [ask()])


def test_answers_that_came_before_the_end_are_returned_first(server):
    def script(body: dict):
        if body["messages"][0]["content"] == "forbidden":
            time.sleep(0.1)
            return refusal(401)
        return reply()

    server.script = script
    engine = OpenAIEngine("m", GREEDY, server.url)
    engine.submit(0, ask("forbidden"))
    engine.submit(1, ask())
    time.sleep(0.5)
    assert [key for key, _ in engine.collect()] == [1]
    with pytest.raises(EngineDead):
        engine.submit(2, ask())
    with pytest.raises(EngineDead):
        engine.collect()
    engine.close()


def test_a_server_that_is_gone_is_engine_death_and_no_row_is_failed(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineDead, match="cannot be reached after 1 retries"):
        answers(server, [ask(), ask()])


def test_an_address_without_scheme_is_refused_at_once():
    with pytest.raises(EngineDead, match="http://"):
        OpenAIEngine("m", GREEDY, "localhost:8000/v1")


@pytest.mark.parametrize(
    "response",
    [
        (200, {"object": "chat.completion", "choices": []}),
        (200, {"object": "chat.completion", "choices": None}),
        (200, {"choices": [{"index": 0, "finish_reason": "stop", "message": None}]}),
        (200, {"choices": [{"index": 0, "finish_reason": "stop"}]}),
        (200, {"choices": ["yes"]}),
        (200, {"choices": "yes"}),
        (200, {"choices": [{"index": 0, "finish_reason": "stop", "message": "yes"}]}),
        (200, [1]),
        (200, {}),
        reply(content=None),
        reply(content=["half"]),
        reply(content=None, refusal="I will not"),
        reply(content="half", finish_reason="content_filter"),
        reply(content="half", finish_reason=None),
    ],
)
def test_a_reply_without_an_answer_is_an_error_and_never_a_text(server, response):
    server.script = lambda body: response
    (got,) = answers(server, [ask()])
    assert isinstance(got, AskError)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no seed here", "type": "x", "code": None}},
        {"message": "no seed here"},
        {"detail": "no seed here"},
        {"detail": [{"loc": ["body", "seed"], "msg": "no seed here"}]},
        {"error": "no seed here"},
        ["no seed here"],
        {"errors": [{"detail": "no seed here"}]},
        {"odd": "no seed here"},
        "no seed here",
        "<html><style>p {}</style><p>no <b>seed</b> here</p></html>",
        json.dumps("no seed here"),
        "no seed here " + "and so on " * 10_000,
    ],
)
def test_what_a_server_says_of_a_fault_is_told_in_whatever_form_it_says_it(server, body):
    server.script = lambda asked: (400, body) if told(asked) == "cursed" else reply()
    (bad,) = answers(server, [ask("cursed")])
    assert "no seed here" in str(bad) and len(str(bad)) < 400 and "<" not in str(bad)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("eos", "stop"), ("eos_token", "stop"), ("STOP", "stop"), ("end_turn", "stop"), ("MAX_TOKENS", "length")],
)
def test_every_servers_word_for_an_end_is_known(server, theirs, ours):
    server.script = lambda body: reply("yes</think>", theirs, reasoning_content="why")
    (got,) = answers(server, [ask()])
    assert (got.text, got.finish_reason) == ("yes</think>", ours) and len(server.bodies) == 1


def test_what_was_paid_for_is_kept_with_the_failure(server):
    server.script = lambda body: reply("half an answer", "who knows")
    (got,) = answers(server, [ask()])
    assert isinstance(got, AskError) and "'who knows'" in str(got) and got.raw == "half an answer"
    server.script = lambda body: reply(None, reasoning_content="why")
    (got,) = answers(server, [ask()])
    assert isinstance(got, AskError) and got.raw == "why"


def test_an_answer_by_another_content_type_is_read(server):
    server.script = lambda body: (200, json.dumps(reply("so")[1]))  # sent as text/html
    assert answers(server, [ask()])[0].text == "so"


def test_thinking_in_parts_is_kept_apart(server):
    inner = [{"type": "text", "text": "why"}]
    parts = [
        {"type": "thinking", "thinking": inner},
        {"type": "text", "text": "a"},
        {"type": "output_text", "text": "b"},
    ]
    replies = iter(
        [reply(parts), reply([{"type": "image_url"}]), reply([{"type": "image_url"}]), reply([{"type": "image_url"}])]
    )
    server.script = lambda body: next(replies)
    got, odd = answers(server, [ask(), ask()], max_concurrency=1)
    assert (got.text, got.reasoning) == ("ab", "why")
    assert isinstance(odd, AskError) and odd.raw == '[{"type": "image_url"}]'


def test_content_in_parts_of_text_is_read(server):
    parts = [{"type": "text", "text": "half "}, {"type": "text", "text": "and half"}]
    server.script = lambda body: reply(parts)
    assert answers(server, [ask()])[0].text == "half and half"
    server.script = lambda body: reply([*parts, {"type": "image_url", "image_url": {"url": "x"}}])
    assert isinstance(answers(server, [ask()])[0], AskError)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_the_servers_reasoning_is_kept_apart(server, field):
    server.script = lambda body: reply("answer", **{field: "why"})
    (got,) = answers(server, [ask()])
    assert (got.text, got.reasoning) == ("answer", "why")


def test_a_reply_cut_inside_its_thinking_is_an_empty_answer_that_says_length(server):
    replies = iter([reply(None, "length", reasoning_content="why"), reply("<think>why", "length")])
    server.script = lambda body: next(replies)
    for got in answers(server, [ask(), ask()], max_concurrency=1):
        assert (got.text, got.reasoning, got.finish_reason) == ("", "why", "length")


def test_a_cut_reply_that_may_be_all_thinking_is_no_answer(server):
    replies = iter([reply("It is right, <score>9</score>, but", "length"), reply("why\n</think>\n\n7 is", "length")])
    server.script = lambda body: next(replies)
    (got,) = answers(server, [ask()])
    assert (got.text, got.reasoning, got.finish_reason) == ("", "It is right, <score>9</score>, but", "length")
    (got,) = answers(server, [ask()])
    assert (got.text, got.reasoning) == ("7 is", "why")


def test_a_server_that_wants_max_completion_tokens_is_given_it(server):
    def script(body: dict):
        return refusal(400, "Use 'max_completion_tokens' instead.") if "max_tokens" in body else reply()

    server.script = script
    got = answers(server, [ask(), ask()], max_concurrency=1)
    assert [completion.text for completion in got] == ["yes", "yes"]
    assert len(server.bodies) == 3 and server.bodies[-1]["max_completion_tokens"] == 16


def strict(*refused: str):
    """A server that refuses these fields."""

    def script(body: dict):
        found = [name for name in refused if name in body]
        return refusal(400, f"Unsupported parameter: '{found[0]}' is not permitted.") if found else reply()

    return script


def test_a_field_of_the_apis_own_value_is_left_out_where_it_is_refused(server, capsys):
    server.script = strict("temperature", "top_p")
    both = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=16)
    assert [got.text for got in answers(server, [ask(), ask()], both, max_concurrency=1)] == ["yes", "yes"]
    assert len(server.bodies) == 4 and "seed" in server.bodies[-1]
    assert "the server refuses top_p, which is not sent any more" in capsys.readouterr().err


def test_one_refused_ask_that_names_a_field_changes_nothing_for_the_others(server, capsys):
    def script(body: dict):
        if told(body) == "bad":
            said = {"detail": [{"loc": ["body"], "msg": "no temperature like this, no top_p like that"}]}
            return 422, said
        return reply()

    server.script = script
    both = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=16)
    bad, good = answers(server, [ask("bad"), ask()], both, max_concurrency=1)
    assert isinstance(bad, AskError) and good.text == "yes"
    assert {"temperature", "top_p"} <= server.bodies[-1].keys() and capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["temperature", "top_p", "seed"])
def test_another_field_that_is_refused_is_named_with_its_flag_and_can_be_left_out(server, field):
    server.script = strict(field)
    own = Sampling(temperature=0.5, top_p=0.9, top_k=-1, max_tokens=16)
    with pytest.raises(EngineDead, match=f"'{field}' is not permitted.* --leave_out {field}"):
        answers(server, [ask()], own)
    assert answers(server, [ask()], own, leave_out=[field])[0].text == "yes"
    assert {"temperature", "top_p", "seed"} - server.bodies[-1].keys() == {field}


def test_closing_with_asks_in_flight_does_not_hang(server):
    server.script = lambda body: (time.sleep(2.0), reply())[1]
    engine = OpenAIEngine("m", GREEDY, server.url)
    engine.submit(0, ask())
    time.sleep(0.1)
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 1.0
