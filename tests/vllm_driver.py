"""Runs vLLM engines for a test in a process of their own: `python tests/vllm_driver.py job.json result.json`.

vLLM changes environment, threads and torch's global state for good, so no test imports it into pytest's own process.

job: list of {"arguments": {model, ...}, "sampling": {...}, "rounds": [[[messages, seed], ...], ...]}, one engine after
the other; `num_engines` among the arguments makes it a pool on Ray, and an ask may have a sampling of its own as third
element. result: for each engine {"dead": reason, "started": bool}, or {"facts", "capacity", "rounds": [[completion as
dict | {"error": reason}, ...], ...], "orders": [[index, ...], ...], "written": [[[answers, tokens], ...],
...]} with the answers in the order of the asks, the order in which they came, and how many tokens the engine had
written in the round when so many answers had come.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from distiller.engine import Ask, AskError, Completion, EngineDead, EngineNotStarted, Sampling, TeacherEngine


def make_engine(arguments: dict, sampling: Sampling) -> TeacherEngine:
    if "num_engines" in arguments:
        from distiller.ray_engine import RayEngine

        return RayEngine(sampling=sampling, **arguments)
    from distiller.vllm_engine import VLLMEngine

    return VLLMEngine(sampling=sampling, **arguments)


def as_json(answer: Completion | AskError) -> dict:
    return {"error": str(answer)} if isinstance(answer, AskError) else asdict(answer)


def run_round(engine: TeacherEngine, asks: list) -> tuple[list[dict], list[int], list[tuple[int, int]]]:
    before, written = engine.tokens()[0], []
    for key, (messages, seed, *sampling) in enumerate(asks):
        engine.submit(key, Ask(messages, seed, *(Sampling(**own) for own in sampling)))
    answers: dict[int, Completion | AskError] = {}
    while len(answers) < len(asks):
        fresh = engine.collect()
        assert fresh and not answers.keys() & dict(fresh).keys()
        answers.update(fresh)
        written.append((len(answers), engine.tokens()[0] - before))
    assert engine.collect() == []
    return [as_json(answers[key]) for key in range(len(asks))], list(answers), written


def run_engine(job: dict) -> dict:
    try:
        engine = make_engine(job["arguments"], Sampling(**job["sampling"]))
    except EngineDead as error:
        return {"dead": str(error), "started": not isinstance(error, EngineNotStarted)}
    rounds = [run_round(engine, asks) for asks in job["rounds"]]
    engine.close()
    engine.close()
    found = dict(zip(("rounds", "orders", "written"), zip(*rounds, strict=True), strict=True)) if rounds else {}
    return {"facts": engine.facts(), "capacity": engine.capacity, **found}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run_engine(job) for job in jobs]))
