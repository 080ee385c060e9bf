"""A command whose teacher is a server, through that server's faults: exit code, words, files, and the rerun."""

import json
import re
import time
from pathlib import Path

import pytest
from test_openai_engine import CUT, refusal, reply, server, told  # noqa: F401 - server is a fixture

from refine import generate_response_vllm as generate

ROWS = 12


@pytest.fixture
def place(tmp_path, monkeypatch, server):  # noqa: F811
    """The current directory with an input of `ROWS` prompts, and a server whose clients wait no time between tries."""
    rows = [{"id": f"r{n}", "prompt": f"prompt {n}"} for n in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(server, *flags: object) -> int:  # noqa: F811
    base = ["--input", "in.jsonl", "--output", "out.jsonl", "--model", "m", "--base_url", server.url, "--top_k", "-1"]
    return generate.main([*base, "--max_concurrency", "2", "--max_retries", "1", *map(str, flags)])


def rows_of(suffix: str = "") -> dict[str, dict]:
    path = Path(f"out.jsonl{suffix}")
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def usage() -> dict:
    return json.loads(Path("out.jsonl.manifest.json").read_text())["usage"]


def late(fault):
    """A script that answers five asks and then meets every ask with the fault, tiny ones included."""
    answered = []

    def script(body: dict):
        if len(answered) < 5:
            answered.append(body)
            return reply(f"answer to {told(body)}")
        return fault(body) if callable(fault) else fault

    return script


ENDS = [
    (refusal(401, "bad key"), "refused the credentials .*401.*bad key.* OPENAI_API_KEY"),
    (refusal(400, "your balance is too low"), "refuses every request .*400.*balance is too low"),
    (refusal(402, "no money"), "402.*no money"),
    (refusal(404, "no such model"), "404.*no such model.* --model m; it serves served"),
    (refusal(429, "too fast"), "429.*too fast.* Lower --max_concurrency"),
    (refusal(500, "broken"), "fails every request .*500.*broken"),
    (refusal(503, "loading"), "fails every request .*503.*loading"),
    ((CUT, reply()[1]), "cannot be reached after 1 retries"),
]


@pytest.mark.parametrize("when", ["at first", "later"])
@pytest.mark.parametrize(("fault", "words"), ENDS, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_server_at_fault_ends_the_command_fails_no_row_and_the_rerun_finishes(
    place,
    server,  # noqa: F811
    capsys,
    fault,
    words,
    when,
):
    before = sorted(path.name for path in place.iterdir())
    server.script = late(fault) if when == "later" else lambda body: fault
    assert command(server) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and "To go on, run: python" in said
    if when == "later":
        assert 0 < len(rows_of()) <= 5 and not rows_of(".failed.jsonl") and not rows_of(".filtered.jsonl")
        assert "Finished rows are on disk." in said
    else:
        assert sorted(path.name for path in place.iterdir()) == before and "No row was finished." in said
    server.script = lambda body: reply(f"answer to {told(body)}")
    assert command(server) == 0
    rows = rows_of()
    assert {row["response"] for row in rows.values()} == {f"answer to prompt {n}" for n in range(ROWS)}
    assert len(rows) == ROWS and not rows_of(".failed.jsonl")


USELESS = [
    ((200, json.dumps({"error": {"message": "slow down", "code": 429}})), 2),
    ((200, "<html>Sign in</html>"), 2),
    (reply(None, reasoning_content="I think."), 1),
    (reply("x", finish_reason="content_filter"), 1),
    (reply("half an answer", finish_reason="length"), 1),
]
"""Answers of status 200 that no row can be made of, and the command's exit code: a server's fault, or each row's."""


def test_rows_to_be_overwritten_stay_where_the_server_cannot_make_new_ones(place, server, capsys, monkeypatch):  # noqa: F811
    server.script = lambda body: reply("old")
    assert command(server) == 0
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    monkeypatch.setattr("sys.argv", ["generate.py", "--overwrite"])
    server.script = lambda body: refusal(404, "no such model")
    assert command(server, "--overwrite") == 2
    said = capsys.readouterr().err
    assert "gave up: " in said and said.endswith(
        "The earlier rows are as they were. To go on, run: python generate.py --overwrite\n"
    )
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    for useless, code in USELESS:
        server.script = lambda body, useless=useless: useless
        assert command(server, "--overwrite") == code
        now = {path.name: path.read_bytes() for path in place.iterdir()}
        waiting = [now.pop(f"out.jsonl.new.{kind}.jsonl", b"").splitlines() for kind in ("failed", "filtered")]
        assert now == before and sum(map(len, waiting)) == (ROWS if code == 1 else 0)
    server.script = lambda body: reply("new")
    assert command(server, "--overwrite") == 0
    assert [row["response"] for row in rows_of().values()] == ["new"] * ROWS


def test_a_server_that_dies_ends_the_command_and_the_rerun_finishes(place, server, capsys):  # noqa: F811
    def die(body: dict):
        server.socket.close()  # nobody can connect any more
        return CUT, reply()[1]

    server.script = late(die)
    assert command(server) == 2
    assert "cannot be reached after 1 retries" in capsys.readouterr().err
    done = rows_of()
    assert 0 < len(done) <= 5 and not rows_of(".failed.jsonl")


def test_faults_of_single_asks_cost_their_rows_alone_and_are_told_apart(place, server):  # noqa: F811
    faults = {
        "prompt 1": refusal(400, "too long"),
        "prompt 2": refusal(500, "cursed"),
        "prompt 3": (CUT, reply()[1]),
        "prompt 4": (200, {**reply()[1], "choices": []}),
        "prompt 5": reply("half", "content_filter"),
    }

    def script(body: dict):
        if told(body) == "prompt 6":
            time.sleep(8)
        return faults.get(told(body), reply())

    server.script = script
    assert command(server, "--timeout", 3) == 1
    reasons = {identifier: row["reason"] for identifier, row in rows_of(".failed.jsonl").items()}
    words = {
        "r1": "HTTP 400 from the server: .*too long",
        "r2": "HTTP 500 from the server: .*cursed",
        "r3": "no answer after 1 retries",
        "r4": "the server's answer holds no message",
        "r5": "finish_reason 'content_filter'",
        "r6": "no answer after 1 retries: Request timed out",
    }
    assert reasons.keys() == words.keys() and len(rows_of()) == ROWS - len(words)
    assert all(re.search(words[identifier], reason) for identifier, reason in reasons.items())
    # 6 answers, an empty one asked for three times, a filtered one: all were paid for.
    assert usage()["asks"] == ROWS and usage()["prompt_tokens"] == 5 * (6 + 3 + 1)

    tiny = [body["max_tokens"] for body in server.bodies if "Say yes." in str(body)]
    assert min(tiny) <= 16 < max(body["max_tokens"] for body in server.bodies)  # once the server has answered

    failed = rows_of(".failed.jsonl")
    server.script = lambda body: refusal(404, "no such model")
    assert command(server, "--retry_failed") == 2
    assert rows_of(".failed.jsonl") == failed
    server.script = lambda body: reply()
    assert command(server, "--retry_failed") == 0
    assert len(rows_of()) == ROWS and not rows_of(".failed.jsonl")


def test_a_cap_stops_the_command_and_a_higher_one_goes_on_without_a_row_twice(place, server, capsys):  # noqa: F811
    server.script = lambda body: reply(f"answer to {told(body)}")
    assert command(server, "--max_tokens_total", 30, "--price_per_million", 2e6, 1e6) == 3
    first = rows_of()
    assert len(first) == 5 and len(server.bodies) == 5  # 7 tokens each
    assert usage() == {
        "asks": 5,
        "prompt_tokens": 25,
        "completion_tokens": 10,
        "cached_tokens": None,
        "price_per_million": [2e6, 1e6],
        "cost": 60.0,
    }
    assert "stopped at --max_tokens_total 30 with 7 rows left" in capsys.readouterr().err
    assert command(server, "--max_tokens_total", 30) == 3 and len(server.bodies) == 5
    assert command(server, "--max_tokens_total", 1000) == 0
    assert len(server.bodies) == ROWS and rows_of().items() >= first.items() and len(rows_of()) == ROWS


def test_what_was_paid_for_is_in_the_failed_file_whatever_ended_it(place, server):  # noqa: F811
    replies = {
        "prompt 0": reply("a whole answer", "weird"),
        "prompt 1": reply("half an answer", "content_filter"),
        "prompt 2": reply(None, reasoning_content="only thoughts"),
        "prompt 3": reply("", "stop"),
    }
    server.script = lambda body: replies.get(told(body), reply())
    assert command(server) == 1
    failed = rows_of(".failed.jsonl")
    assert {row["id"]: row["raw"] for row in failed.values()} == {
        "r0": "a whole answer",
        "r1": "half an answer",
        "r2": "only thoughts",
        "r3": None,
    }
    assert "finish_reason 'weird'" in failed["r0"]["reason"]
