"""`eval_judge.sh`: whole runs over a server on loopback, kills, and the embedded teacher in vLLM."""

from __future__ import annotations

import contextlib
import html
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_fixtures import judgebench_row, llmbar_row, rewardbench2_row, rm_bench_row, write_json, write_lines
from eval_fixtures import pair, write_jsonl
from processes import ENVIRONMENT, ROOT
from test_openai_engine import Server, refusal, reply

from RewardTrainer.eval.rescore import rescore
from RewardTrainer.eval.run_eval_judge import main

HOSTILE = "<script>alert('pwned')</script><img src=x onerror=alert(1)>"
PROMPT = "{{ prompt }}\n{% for r in responses %}[{{ r.letter }}] {{ r.text }}\n{% endfor %}"


@pytest.fixture
def server():
    import threading

    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def house(tmp_path):
    """Benchmarks, a preference file and a short prompt."""
    labels = ["A>B", "B>A"] * 3
    write_lines(
        tmp_path / "data/judgebench-gpt/gpt.jsonl",
        [
            judgebench_row(
                f"p{n}",
                "livecodebench",
                label,
                response_A="good answer" if label == "A>B" else "bad",
                response_B="bad" if label == "A>B" else "good answer",
            )
            for n, label in enumerate(labels)
        ],
    )
    write_json(tmp_path / "data/rm-bench/chat_filtered.json", [rm_bench_row(n) for n in range(2)])
    write_lines(
        tmp_path / "data/rewardbench2/rows.jsonl",
        [
            *(rewardbench2_row(str(n), "Math") for n in range(3)),
            rewardbench2_row("ref:1", "Ties", 1, 2),
            rewardbench2_row("tied:1", "Ties", 3, 2),
        ],
    )
    write_json(tmp_path / "data/llmbar/Natural/dataset.json", [llmbar_row(n, n % 2 + 1) for n in range(4)])
    (tmp_path / "prompt.txt").write_text(PROMPT)
    return tmp_path


def shown(body: dict) -> list[str]:
    """The responses as the judge sees them."""
    return re.findall(r"^\[[A-Z]\] (.*)$", body["messages"][-1]["content"], re.MULTILINE)


def longest(body: dict) -> tuple[int, dict]:
    """A judge that prefers the longest response, wherever it stands."""
    lengths = [len(text) for text in shown(body)] or [0]  # or what the engine asks to see whether anybody is there
    letter = "ABCD"[lengths.index(max(lengths))] if lengths.count(max(lengths)) == 1 else "tie"
    return reply(f"So be it. <verdict>{letter}</verdict>")


def judge(
    house: Path, server: Server, *flags: object, form: str = "pairwise_verdict", benchmarks="judgebench-gpt"
) -> int:
    command = ["--model", "m", "--base_url", server.url, "--output_dir", house / "out", "--data_dir", house / "data"]
    command += ["--prompt_file", house / "prompt.txt", "--prompt_form", form, "--benchmarks", benchmarks]
    return main([str(word) for word in [*command, *flags]])


def results(house: Path) -> dict:
    return json.loads((house / "out/results.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_judge_that_prefers_the_longest_response_is_right_in_both_orders_without_bias(house, server, capsys):
    server.script = longest
    assert judge(house, server) == 0
    found = results(house)
    assert found["benchmarks"]["judgebench-gpt"]["overall"] == 1
    about = found["judges"]["judgebench-gpt"]
    assert (about["consistency"], about["both_right"], about["position_bias"], about["pairs"]) == (1, 1, 0, 6)
    assert found["judge"]["prompt_form"] == "pairwise_verdict" and found["judge"]["temperature"] == 0
    assert all(body["temperature"] == 0 for body in server.bodies) and len(server.bodies) == 12
    said = lines(house / "out/verdicts.jsonl")
    assert all(set(line) == {"benchmark", "id", "subset", "order", "verdict", "raw"} for line in said)
    out = capsys.readouterr().out
    assert "judgebench-gpt: 6 of 6 rows" in out and re.search(r"Position bias +0\.000", out)


def cells_of_page(page: str) -> list[str]:
    found = (html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", page))
    return [" ".join(cell.split()) for cell in found]


def cells_of_markdown(text: str) -> list[str]:
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [cell.strip() for line in rows for cell in line.removeprefix("|").removesuffix("|").split("|")]


def test_the_markdown_holds_every_table_of_the_report(house, server):
    server.script = lambda body: reply("<verdict>A</verdict>" if len(server.bodies) % 3 else "I cannot say")
    judge(house, server, "--max_failure_rate", 1, benchmarks="judgebench-gpt,rm-bench")
    markdown = cells_of_markdown((house / "out/results.md").read_text())
    assert markdown == cells_of_page((house / "out/report.html").read_text())
    for name in ("Position bias", "Consistency", "Label agreement", "Unreadable"):
        assert markdown.count(name) >= 2


def test_a_judge_that_always_names_the_first_place_is_found_out(house, server):
    server.script = lambda body: reply("<verdict>A</verdict>")
    assert judge(house, server, benchmarks="judgebench-gpt,rm-bench") == 0
    found = results(house)
    assert [found["benchmarks"][name]["overall"] for name in ("judgebench-gpt", "rm-bench")] == [0, 0.5]
    for about in found["judges"].values():
        assert (about["position_bias"], about["consistency"], about["label_agreement"]) == (1, 0, 0.5)


def test_unreadable_replies_are_counted_kept_and_worth_what_the_benchmark_says(house, server, capsys):
    def script(body):
        return reply("no idea") if shown(body)[0] == "bad" else longest(body)

    server.script = script
    assert judge(house, server) == 1  # half of the asks failed
    found, said = results(house), lines(house / "out/verdicts.jsonl")
    about, counts = found["judges"]["judgebench-gpt"], found["counts"]["judgebench-gpt"]
    assert (about["verdicts"], about["unreadable"], about["unreadable_rate"]) == (12, 6, 0.5)
    assert (counts["unreadable"], counts["refused"], counts["counted"]) == (6, 0, 6)
    assert found["benchmarks"]["judgebench-gpt"]["overall"] == 1  # +1 and 0 a pair
    assert [line["raw"] for line in said if line["verdict"] is None] == ["no idea"] * 6
    assert "6 of 12 replies cannot be read" in capsys.readouterr().err


def test_a_refused_ask_is_no_verdict(house, server, capsys):
    server.script = lambda body: (
        refusal(400, "too long") if "q p2" in body["messages"][0]["content"] else longest(body)
    )
    judge(house, server)
    counts = results(house)["counts"]["judgebench-gpt"]
    assert (counts["refused"], counts["unreadable"], counts["counted"]) == (2, 0, 5)
    assert len(lines(house / "out/verdicts.jsonl")) == 10
    err = capsys.readouterr().err
    assert "gpt.jsonl, line 3" in err and "too long" in err


@pytest.mark.parametrize("seed", range(3))
def test_the_tables_are_those_of_rescore(house, server, seed):
    draw = random.Random(seed)
    server.script = lambda body: reply(
        draw.choice(["<verdict>A</verdict>", "<verdict>B</verdict>", "<verdict>tie</verdict>", "?"])
    )
    names = ["judgebench-gpt", "rm-bench", "llmbar", "rewardbench2"]
    judge(house, server, benchmarks=",".join(names))
    for name in names:
        summary, _ = rescore(name, house / "data", None, house / "out/verdicts.jsonl")
        assert results(house)["benchmarks"][name].items() >= summary.items()


def test_a_pointwise_judge_rates_each_response_once_and_its_scores_are_rescored_too(house, server):
    (house / "prompt.txt").write_text("{{ prompt }}\n[A] {{ response }}")

    # Ratings by length, but for lists of right and wrong texts by what they say.
    def script(body):
        text = shown(body)[0]
        return reply(f"<score>{4 if text.startswith(('not ', 'wrong', 'bad', 'undone')) else 8}</score>")

    server.script = script
    names = ["judgebench-gpt", "rm-bench", "llmbar", "rewardbench2"]
    assert judge(house, server, form="pointwise_score", benchmarks=",".join(names)) == 0
    found = results(house)
    assert found["benchmarks"]["judgebench-gpt"]["overall"] == found["benchmarks"]["rm-bench"]["overall"] == 1
    assert len(server.bodies) == 6 * 2 + 2 * 6 + 4 * 2 + 3 * 4 + 3 + 5
    for name in ("rm-bench", "llmbar", "rewardbench2"):
        summary, _ = rescore(name, house / "data", house / "out/scores.jsonl", None)
        assert found["benchmarks"][name].items() >= summary.items()
    summary, _ = rescore("judgebench-gpt", house / "data", None, house / "out/verdicts.jsonl")
    assert found["benchmarks"]["judgebench-gpt"].items() >= summary.items()


def test_a_reply_that_was_cut_and_may_be_thinking_says_what_to_raise(house, server):
    server.script = lambda body: reply("Perhaps <verdict>A</verdict>, but", "length")
    assert judge(house, server) == 1
    failed = lines(house / "out/judgements.jsonl.failed.jsonl")
    assert len(failed) == 12 and all("raise --max_tokens" in row["reason"] for row in failed)


def test_scores_of_a_pair_are_kept_and_their_bias_is_told_in_points(house, server):
    def script(body):
        first, second = (9 if text == "good answer" else 4 for text in shown(body))
        return reply(f"<score_a>{first + 0.5}</score_a><score_b>{second}</score_b>")

    server.script = script
    assert judge(house, server, form="pairwise_scores") == 0
    about = results(house)["judges"]["judgebench-gpt"]
    assert (about["position_bias_points"], about["position_bias"], about["label_agreement"]) == (0.5, 0, 1)
    assert {tuple(line["scores"]) for line in lines(house / "out/verdicts.jsonl")} == {(9.5, 4), (4.5, 9)}


def test_a_second_run_asks_nothing_and_other_settings_are_refused(house, server, capsys):
    server.script = longest
    assert judge(house, server, "--limit", 2) == 0 and len(server.bodies) == 4
    assert judge(house, server) == 0 and len(server.bodies) == 12
    before = (house / "out/verdicts.jsonl").read_bytes()
    assert judge(house, server) == 0 and len(server.bodies) == 12
    assert (house / "out/verdicts.jsonl").read_bytes() == before
    capsys.readouterr()
    assert judge(house, server, "--temperature", 0.5) == 1
    assert "sampling.temperature: 0.0 before, 0.5 now" in capsys.readouterr().err
    (house / "prompt.txt").write_text("Well? " + PROMPT)
    assert judge(house, server) == 1 and "the content of --prompt_file changed" in capsys.readouterr().err
    (house / "prompt.txt").write_text(PROMPT)
    path = house / "data/judgebench-gpt/gpt.jsonl"
    path.write_text(path.read_text().replace("good answer", "fine answer"))
    assert judge(house, server) == 1 and "digests.judgebench-gpt" in capsys.readouterr().err
    assert len(server.bodies) == 12 and (house / "out/verdicts.jsonl").read_bytes() == before


def test_failed_asks_are_run_again_on_demand(house, server):
    server.script = lambda body: reply("?")
    assert judge(house, server) == 1
    server.script = longest
    assert judge(house, server) == 1 and results(house)["judges"]["judgebench-gpt"]["unreadable"] == 12
    assert judge(house, server, "--retry_failed") == 0
    assert results(house)["judges"]["judgebench-gpt"]["unreadable"] == 0


def test_what_a_user_gets_wrong_is_named(house, server, capsys):
    for flags, message in [
        (["--benchmarks", "nosuch"], "nosuch: no file in "),
        (["--benchmarks", "llmbar,llmbar"], "one or more different names"),
        (["--data_dir", house / "nowhere"], "--data_dir"),
        (["--max_tries", "3"], "--max_tries 3: at --temperature 0"),
        (["--prompt_file", house / "none.txt"], "none.txt"),
    ]:
        assert judge(house, server, *flags) == 1
        assert message in capsys.readouterr().err
    (house / "prompt.txt").write_text("{{ prompt }} {{ answer }}")
    assert judge(house, server) == 1
    assert "uses `answer`; it may use" in capsys.readouterr().err
    assert not (house / "out").exists() and not server.bodies


def test_a_verdict_that_was_only_thought_is_none(house, server):
    def script(body):
        letter = "AB"[shown(body)[0] != "good answer"]
        wrong = f"<verdict>{'BA'['AB'.index(letter)]}</verdict>"
        if "q p0" in body["messages"][0]["content"]:
            return reply(f"<think>{wrong}</think>I cannot say.")
        return reply(f"<verdict>{letter}</verdict>", reasoning_content=f"At first sight {wrong}")

    server.script = script
    assert judge(house, server, "--enable_thinking", "true") == 1  # 2 of 12 cannot be read
    about = results(house)["judges"]["judgebench-gpt"]
    assert (about["unreadable"], about["label_agreement"]) == (2, 1)
    assert all(body["chat_template_kwargs"] == {"enable_thinking": True} for body in server.bodies)
    assert not any(
        "first sight" in line["raw"] or "<think>" in line["raw"] for line in lines(house / "out/verdicts.jsonl")
    )


def test_a_run_stopped_at_its_cap_says_what_is_left_and_goes_on(house, server, capsys):
    server.script = longest
    assert judge(house, server, "--max_tokens_total", 40) == 3  # an ask takes 7
    counts = results(house)["counts"]["judgebench-gpt"]
    assert 0 < counts["not_run"] == 12 - counts["answered"] and counts["counted"] == counts["answered"] // 2
    assert f"{counts['not_run']} of 12 asks are left to run" in capsys.readouterr().err
    assert judge(house, server) == 0
    assert results(house)["counts"]["judgebench-gpt"]["not_run"] == 0 and len(server.bodies) == 12


def test_a_dry_run_shows_both_orders_and_asks_nothing(house, server, capsys):
    assert judge(house, server, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "q p0\n[A] good answer\n[B] bad" in out and "q p0\n[A] bad\n[B] good answer" in out
    assert "rows: 12 (12 usable, finished ones included; 0 that cannot be used)" in out
    assert not server.bodies and not (house / "out").exists()


def test_the_page_escapes_what_a_judge_and_a_file_say(house, server):
    path = write_jsonl(house / "pairs.jsonl", [pair(n, chosen=f"x{HOSTILE}", rejected="y") for n in range(3)])
    server.script = lambda body: reply(f"{HOSTILE}<verdict>{'AB'[shown(body)[0] != 'y']}</verdict>")
    assert judge(house, server, benchmarks=str(path)) == 0
    page = (house / "out/report.html").read_text()
    (overall,) = [benchmark["overall"] for benchmark in results(house)["benchmarks"].values()]
    assert f"{overall:.3f} [{overall:.3f}, {overall:.3f}]" in page  # the same on every row: no spread
    assert "Wrong in every order" in page and page.count("&lt;script&gt;") >= 6
    assert "<script" not in page and "<img" not in page and "http" not in page.replace("http-equiv", "")


def script_command(*flags: object) -> list[str]:
    return ["bash", str(ROOT / "RewardTrainer/scripts/eval_judge.sh"), *map(str, flags)]


SCRIPT_ENVIRONMENT = {**ENVIRONMENT, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}


def test_a_run_without_a_server_ends_and_prints_the_command_to_go_on_with(house):
    command = script_command("--model", "m", "--base_url", "http://127.0.0.1:9/v1", "--max_retries", 0, "--limit", 1)
    command += ["--output_dir", str(house / "out")]
    done = subprocess.run(command, cwd="/", env=SCRIPT_ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "To go on, run: " in done.stderr and "Traceback" not in done.stderr
    assert shlex.split(done.stderr.partition("To go on, run: ")[2]) == command


@pytest.mark.slow
def test_a_run_killed_at_random_ends_with_the_verdicts_of_an_undisturbed_one(house, server):
    rows = [
        judgebench_row(f"p{n}", "livecodebench", "A>B", response_A=f"good {n}", response_B="bad") for n in range(120)
    ]
    write_lines(house / "data/judgebench-gpt/gpt.jsonl", rows)

    def slowly(body):
        time.sleep(0.01)
        return longest(body)

    server.script = slowly
    flags = ["--model", "m", "--base_url", server.url, "--data_dir", house / "data", "--benchmarks", "judgebench-gpt"]
    flags += ["--prompt_file", house / "prompt.txt", "--prompt_form", "pairwise_verdict", "--max_concurrency", 4]
    whole, broken = house / "whole", house / "broken"
    undisturbed = subprocess.run(
        script_command(*flags, "--output_dir", whole), env=SCRIPT_ENVIRONMENT, capture_output=True, text=True
    )
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    command, output, draw = (
        script_command(*flags, "--output_dir", broken),
        broken / "judgements.jsonl",
        random.Random(5),
    )
    for kills in range(2):
        until = (output.read_bytes().count(b"\n") if kills else 0) + draw.randint(5, 60)
        process = subprocess.Popen(
            command,
            env=SCRIPT_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while not output.exists() or output.read_bytes().count(b"\n") < until:
                assert process.poll() is None, "ended before it could be killed"
                time.sleep(0.005)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with output.open("ab") as file:
        file.write(b'{"id": "torn')
    assert not (broken / "verdicts.jsonl").exists()
    last = subprocess.run(command, env=SCRIPT_ENVIRONMENT, capture_output=True, text=True)
    assert last.returncode == 0 and "of 240 rows are finished already" in last.stderr, last.stderr[-3000:]
    for name in ("verdicts.jsonl", "results.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert len({line["id"] for line in lines(output)}) == len(lines(output)) == 240


@pytest.mark.slow
def test_bare_the_embedded_teacher_judges_the_embedded_benchmark_in_vllm(tmp_path):
    done = subprocess.run(
        script_command("--output_dir", tmp_path / "out", "--limit", 12),
        cwd="/",
        env=SCRIPT_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out/results.json").read_text())
    about = found["judges"]["example"]
    assert about["verdicts"] == 12 * 9 * 2 and about["pairs"] > 90
    assert found["benchmarks"]["example"]["overall"] > 0.8 and about["consistency"] > 0.8
    assert abs(about["position_bias"]) < 0.2
    summary, rows = rescore("example", None, None, tmp_path / "out/verdicts.jsonl")
    assert found["benchmarks"]["example"].items() >= summary.items() and rows == "12 of 500 rows"
    assert "example: 12 of 12 rows" in done.stdout
