"""A stage against a server that answers anything at all: 500 random behaviours (status, headers, body, cuts, finish
reasons, encodings). Whatever comes, there is no traceback, every id is in exactly one file, nothing but what the
server gave as an answer is in a response, and the key is nowhere."""

import copy
import gzip
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_openai_engine import reply, told

from refine import generate_response_vllm as generate

ROWS, COMMANDS = 440, 60
KEY = "sk-fuzz-0123456789abcdef"
ERROR = "FAULTWORDS"
"""In every error that the server words, and in no answer."""
ENDS = (301, 302, 401, 402, 404)  # these end the command by themselves (a redirection leads nowhere here)
STATUSES = (
    201,
    202,
    204,
    206,
    304,
    400,
    403,
    405,
    408,
    409,
    413,
    418,
    422,
    429,
    500,
    501,
    502,
    503,
    520,
    529,
)
VALUES = (None, True, 0, -1, 1.5, 10**30, "", " ", "x", [], {}, [None], [[]], {"a": None}, ["x"], {"role": "user"})
FINISHES = (
    *["stop"] * 8,
    "length",
    "STOP",
    "eos",
    "end_turn",
    "tool_calls",
    "content_filter",
    "error",
    "",
    None,
    3,
    "\u00e9",
)
CONTENTS = (
    "answer {n}",
    "  answer {n}\n",
    "<think>why</think>answer {n}",
    "<think>why {n}",
    "why\n</think>\n\nanswer {n}",
    "[THINK]a[/THINK][THINK]b[/THINK]answer {n}",
    "answer \ud800{n}",
    "answer \0{n}",
    "answer {n} \u4e16\u754c \U0001f600 \u202e",
    "answer {n} " * 5_000,
    "",
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    cut: bool = False
    """The connection ends in the middle of the body."""
    wait: float = 0.0


def mutated(draw: random.Random, value: object) -> object:
    """The value with something in it replaced, left out or nested."""
    value = copy.deepcopy(value)
    places = []

    def walk(node: object) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    for _ in range(draw.randint(1, 3)):
        node, key = draw.choice(places)
        if isinstance(node, dict) and draw.random() < 0.3:
            node.pop(key, None)
        elif isinstance(node, dict) or key < len(node):
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def sound(draw: random.Random, n: int) -> dict:
    content = draw.choice(CONTENTS).replace("{n}", str(n))
    form = draw.random()
    parts = [{"type": "text", "text": content}, *([{"type": "image_url", "image_url": {}}] if form < 0.05 else [])]
    more = {"reasoning_content": "why"} if draw.random() < 0.2 else {}
    return reply(parts if form < 0.1 else content, draw.choice(FINISHES), **more)[1]


def worded_error(draw: random.Random) -> object:
    words = f"{ERROR}: the key {KEY} may not do that; temperature, top_p, seed and max_completion_tokens"
    error = {"message": words, "code": draw.choice([None, 429, 400, "500", "overloaded", "\u00b2", 10**9, [], {}])}
    whole = reply("half an answer")[1]
    whole["choices"][0]["error"] = error
    shapes = [{"error": error}, {"error": words}, {"detail": words}, {"detail": [{"loc": ["body", 1], "msg": words}]}]
    shapes += [words, [words], {"errors": {"a": [words]}}, {"message": {"b": words}}, whole, {"error": [error]}]
    return draw.choice(shapes)


def body_of(draw: random.Random, n: int) -> bytes:
    kind = draw.random()
    if kind < 0.5:
        text = json.dumps(sound(draw, n))
    elif kind < 0.75:
        text = json.dumps(mutated(draw, sound(draw, n)))
    elif kind < 0.9:
        text = json.dumps(worded_error(draw))
    else:
        stream = 'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'
        others = [
            "",
            "null",
            "[]",
            "{}",
            "1e999",
            "NaN",
            '"x"',
            stream,
            "[" * 100_000,
            f"<html><p>{ERROR} {KEY}</html>",
        ]
        text = draw.choice([*others, f"{ERROR} {KEY}", json.dumps(sound(draw, n))[: draw.randint(1, 200)]])
    encoding = draw.choice(["utf-8"] * 12 + ["utf-16", "latin-1", "utf-8-sig"])
    data = text.encode(encoding, "replace")
    return data + b"\xff\xfe" if draw.random() < 0.03 else data


def behaviour(seed: int, n: int, statuses: tuple[int, ...]) -> Answer:
    draw = random.Random(seed)
    status = 200 if draw.random() < 0.75 else draw.choice(statuses)
    data = body_of(draw, n)
    kinds = ["application/json"] * 6 + ["text/html", "text/event-stream", "application/octet-stream", "nonsense", ""]
    headers = {"Content-Type": draw.choice(kinds) + draw.choice(["", "; charset=utf-8", "; charset=klingon"])}
    if draw.random() < 0.9:
        headers["retry-after-ms"] = "1"
    elif draw.random() < 0.5:
        headers["Retry-After"] = draw.choice(["soon", "-1", "1e999", "nan", "7200", "Wed, 21 Oct 2015 07:28:00 GMT"])
    if status in (301, 302):
        headers["Location"] = draw.choice(["/v1/chat/completions", "http://[::1", "/elsewhere"])
    if draw.random() < 0.05:
        data, headers["Content-Encoding"] = draw.choice([(gzip.compress(data), "gzip"), (data, "gzip"), (data, "br")])
    return Answer(status, headers, data, cut=draw.random() < 0.06, wait=draw.choice([0.0] * 60 + [1.5]))


class Fuzzed(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script = sane

    def handle_error(self, request: object, address: object) -> None:
        """A client that had enough."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        answer = self.server.script(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(answer.wait)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        empty = answer.status in (204, 304)
        if not empty:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not empty:
            self.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)
        self.close_connection = answer.cut

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


def sane(body: dict) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(reply(f"answer to {told(body)}")[1]).encode())


@pytest.fixture
def fuzzed(tmp_path, monkeypatch) -> Iterator[Fuzzed]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Fuzzed()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(server: Fuzzed, output: str, *flags: str) -> int:
    base = ["--input", "in.jsonl", "--output", output, "--model", "m", "--base_url", server.url, "--top_k", "-1"]
    base += ["--temperature", "1", "--top_p", "1", "--max_concurrency", "32", "--max_retries", "1", "--timeout", "1"]
    return generate.main([*base, "--max_failure_rate", "1", *flags])


def write_input(count: int) -> set[str]:
    rows = [{"id": f"r{n}", "prompt": f"prompt {n}"} for n in range(count)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["id"] for row in rows}


def check(output: str, said: str) -> dict[str, dict]:
    """The finished rows, once it is sure that no id is in two files, and what must not be anywhere is not."""
    assert "Traceback" not in said and KEY not in said
    found = {suffix: rows(f"{output}{suffix}") for suffix in ("", ".filtered.jsonl", ".failed.jsonl")}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    assert all(KEY not in path.read_text() for path in Path().iterdir() if path.name != "in.jsonl")
    for row in found[""].values():
        assert row["response"].strip() and ERROR not in row["response"]
    return found


def rows(path: str) -> dict[str, dict]:
    """By id, each there once."""
    if not Path(path).exists():
        return {}
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    by_id = {row["id"]: row for row in lines}
    assert len(by_id) == len(lines)
    return by_id


def test_rows_of_which_each_meets_a_behaviour_of_its_own(fuzzed, capfd):
    sent: dict[str, list[bytes]] = {}

    def script(body: dict) -> Answer:
        text = told(body)
        if not text.startswith("prompt "):  # the tiny ask
            return sane(body)
        n = int(text.removeprefix("prompt "))
        answer = behaviour(n, n, STATUSES)
        sent.setdefault(f"r{n}", []).append(answer.body)
        return answer

    ids = write_input(ROWS)
    fuzzed.script = script
    code = command(fuzzed, "out.jsonl")
    said = "".join(capfd.readouterr())
    found = check("out.jsonl", said)
    assert code == 0 and set().union(*found.values()) == ids, said
    # Nothing was invented, and both kinds are there.
    for row in found[""].values():
        # Neither thinking, nor what stands beside an error.
        assert row["response"].split()[0] in {"answer", "x"}, row
    assert len(found[""]) > ROWS / 10 and len(found[".failed.jsonl"]) > ROWS / 10


def test_commands_of_which_each_meets_one_behaviour_only(fuzzed, capfd):
    ids = write_input(3)
    codes = set()
    for number in range(COMMANDS):
        answer = behaviour(ROWS + number, number, STATUSES + 2 * ENDS)
        fuzzed.script = lambda body, answer=answer: answer
        code = command(fuzzed, f"out{number}.jsonl", "--max_retries", "0")
        codes.add(code)
        found = check(f"out{number}.jsonl", "".join(capfd.readouterr()))
        assert code in (0, 1, 2) and (code == 2 or set().union(*found.values()) == ids), answer
        if code == 2:
            fuzzed.script = sane
            assert command(fuzzed, f"out{number}.jsonl") == 0
            found = check(f"out{number}.jsonl", "".join(capfd.readouterr()))
            assert set().union(*found.values()) == ids
    assert codes >= {0, 2}
