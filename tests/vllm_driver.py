"""Runs vLLM engines for a test in a process of their own: `python tests/vllm_driver.py job.json result.json`.

vLLM changes environment, threads and torch's global state for good, so no test imports it into pytest's own process.

job: list of {"arguments": {model, ...}, "sampling": {...}, "rounds": [[[messages, seed], ...], ...]}, one engine after
the other. result: for each engine {"dead": reason}, or {"facts", "capacity", "rounds": [[completion as dict |
{"error": reason}, ...], ...]} with the answers in the order of the asks.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from distiller.engine import Ask, AskError, Completion, EngineDead, Sampling
from distiller.vllm_engine import VLLMEngine


def as_json(answer: Completion | AskError) -> dict:
    return {"error": str(answer)} if isinstance(answer, AskError) else asdict(answer)


def run_round(engine: VLLMEngine, asks: list) -> list[dict]:
    for key, (messages, seed) in enumerate(asks):
        engine.submit(key, Ask(messages, seed))
    answers: dict[int, Completion | AskError] = {}
    while len(answers) < len(asks):
        fresh = engine.collect()
        assert fresh and not answers.keys() & dict(fresh).keys()
        answers.update(fresh)
    assert engine.collect() == []
    return [as_json(answers[key]) for key in range(len(asks))]


def run_engine(job: dict) -> dict:
    try:
        engine = VLLMEngine(sampling=Sampling(**job["sampling"]), **job["arguments"])
    except EngineDead as error:
        return {"dead": str(error)}
    rounds = [run_round(engine, asks) for asks in job["rounds"]]
    engine.close()
    engine.close()
    return {"facts": engine.facts(), "capacity": engine.capacity, "rounds": rounds}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run_engine(job) for job in jobs]))
