"""Small benchmark files of our own in upstream's forms: a folder for each benchmark, as `--data_dir` wants it."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from RewardTrainer.eval.base import Verdict


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def rewardbench_row(number: int, subset: str, **more) -> dict:
    models = {"chosen_model": "a", "rejected_model": "b"}
    return {
        "id": number,
        "prompt": f"p{number}",
        "chosen": "yes",
        "rejected": "no",
        "subset": subset,
        **models,
        **more,
    }


def rewardbench2_row(identifier: str, subset: str, right: int = 1, wrong: int = 3, **more) -> dict:
    row = {"id": identifier, "prompt": f"p {identifier}", "subset": subset, "num_correct": right}
    row |= {"chosen": [f"right {n}" for n in range(right)], "rejected": [f"wrong {n}" for n in range(wrong)]}
    return {
        **row,
        "num_incorrect": wrong,
        "total_completions": right + wrong,
        "models": ["m"] * (right + wrong),
        **more,
    }


def rm_bench_row(number: int, **more) -> dict:
    styles = ["short", "long and plain", "# long\n* and rich"]
    rejected = [f"not {style}" for style in styles]
    return {"id": number, "prompt": f"p{number}", "subset": "x", "chosen": styles, "rejected": rejected, **more}


def judgebench_row(name: str, source: str, label: str, **more) -> dict:
    row = {"pair_id": name, "original_id": None, "source": source, "question": f"q {name}", "response_model": "gpt-4o"}
    return {**row, "response_A": "answer a", "response_B": "answer b", "label": label, **more}


def rmb_row(identifier: int, path: str, **more) -> dict:
    talk = [{"role": "user", "content": f"q{identifier}", "language": "English"}]
    row = {"pair_uid": str(identifier), "conversation_input": talk, "category_path": f"Pairwise_set/{path}"}
    return {**row, "chosen": {"llm_name": "a", "answer": "good"}, "reject": {"llm_name": "b", "answer": "bad"}, **more}


def rmb_bon_row(identifier: int, path: str, losers: int) -> dict:
    row = rmb_row(identifier, path)
    losing = [{"llm_name": "b", "answer": f"bad {n}"} for n in range(losers)]
    talk = {"conversation_input": row["conversation_input"], "category_path": f"BoN_set/{path}"}
    return {"bon_uid": str(identifier), "bon_best": row["chosen"], "loser_list": losing, **talk}


def llmbar_row(number: int, label: int) -> dict:
    return {"input": f"do {number}", "output_1": "done", "output_2": "undone", "label": label}


def evalbias_row(bias: str, number: int) -> dict:
    return {"bias": bias, "instruction": f"do {number}", "response1": "good", "response2": "bad", "label": 1}


def ifbench_row(number: int, broken: int) -> dict:
    chosen = {"content": "keeps all", "unsatisfied_constraints": []}
    rejected = {"content": "breaks some", "unsatisfied_constraints": [f"c{n}" for n in range(broken)]}
    row = {"id": number, "source": "s", "original_instruction": "do", "instruction": "do so"}
    return {**row, "chosen": chosen, "rejected": rejected}


def two_orders(*winners: tuple) -> list[list[Verdict]]:
    """Verdicts on pairs asked in both orders: (winner as in the row, winner swapped) of each."""
    return [[Verdict((0, 1), first), Verdict((1, 0), second)] for first, second in winners]


def write_all(data_dir: Path) -> Path:
    """A few rows of every public benchmark."""
    subsets = ("alpacaeval-easy", "mt-bench-med", "llmbar-natural", "donotanswer", "math-prm", "hep-cpp", "hep-go")
    write_parquet(
        data_dir / "rewardbench" / "data" / "filtered-00000-of-00001.parquet",
        [rewardbench_row(n, subsets[n % 7]) for n in range(14)],
    )
    write_parquet(data_dir / "rewardbench" / "data" / "raw-00000-of-00001.parquet", [rewardbench_row(0, "raw only")])
    ties = [rewardbench2_row("ref:1", "Ties", 1, 2), rewardbench2_row("tied:1", "Ties", 3, 2)]
    write_parquet(
        data_dir / "rewardbench2" / "test-00000-of-00001.parquet",
        [*(rewardbench2_row(f"{n}", subset) for n, subset in enumerate(("Factuality", "Math", "Math"))), *ties],
    )
    rm_bench = data_dir / "rm-bench"
    for domain, ids in {"chat": (8, 9), "code": (8,), "safety-refuse": (1, 2, 3), "safety-response": (4,)}.items():
        write_json(rm_bench / f"{domain}_filtered.json", [rm_bench_row(number) for number in ids])
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = [judgebench_row(f"pair {n}", source, ("A>B", "B>A")[n % 2]) for n, source in enumerate(sources)]
    write_lines(data_dir / "judgebench" / "data" / "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl", rows)
    write_lines(
        data_dir / "judgebench" / "data" / "dataset=judgebench,response_model=claude-3-5-sonnet-20240620.jsonl",
        rows[:2],
    )
    published = "dataset=judgebench,response_model=gpt-4o-2024-05-13,judge_name=x,judge_model=y.jsonl"
    write_lines(data_dir / "judgebench" / "outputs" / published, [{**rows[0], "judgments": []}])
    rmb = data_dir / "rmb" / "RMB_dataset"
    write_json(rmb / "Pairwise_set/Harmlessness/S1.json", [rmb_row(n, "Harmlessness/S1") for n in range(3)])
    write_json(rmb / "Pairwise_set/Helpfulness/Chat/Talk.json", [rmb_row(7, "Helpfulness/Chat/Talk")])
    write_json(rmb / "BoN_set/Harmlessness/S1.json", [rmb_bon_row(1, "Harmlessness/S1", 2)])
    write_json(rmb / "BoN_set/Helpfulness/Chat/Talk.json", [rmb_bon_row(2, "Helpfulness/Chat/Talk", 4)])
    llmbar = data_dir / "llmbar" / "Dataset" / "LLMBar"
    write_json(llmbar / "Natural" / "dataset.json", [llmbar_row(n, 1 + n % 2) for n in range(4)])
    for name in ("Neighbor", "GPTInst", "GPTOut", "Manual"):
        write_json(llmbar / "Adversarial" / name / "dataset.json", [llmbar_row(n, 2 - n % 2) for n in range(2)])
    biases = {bias: [evalbias_row(bias, n) for n in range(count)] for bias, count in BIASES.items()}
    write_json(data_dir / "evalbiasbench" / "biasbench.json", biases)
    write_json(data_dir / "ifbench" / "data.json", [ifbench_row(n, n % 4 + 1) for n in range(8)])
    return data_dir


BIASES = {"length bias": 3, "empty reference": 1}
COUNTS = {
    "rewardbench": 14,
    "rewardbench2": 5,
    "rm-bench": 7,
    "judgebench-gpt": 4,
    "judgebench-claude": 2,
    "rmb-pairwise": 4,
    "rmb-bon": 2,
    "llmbar": 12,
    "evalbiasbench": 4,
    "ifbench": 8,
}
"""Rows that `write_all` writes."""
