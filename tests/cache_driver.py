"""Runs `refine/cache_teacher_logprobs_vllm.py` several times in a process of its own, which imports vLLM once:
`python tests/cache_driver.py jobs.json`, a list of command lines. Prints a JSON list of exit codes as its last line.
"""

import json
import sys
from pathlib import Path

from refine.cache_teacher_logprobs_vllm import main

if __name__ == "__main__":
    print(json.dumps([main(argv) for argv in json.loads(Path(sys.argv[1]).read_text())]))
