"""Rewards from vLLM's pooling as a user gets them, in a process of its own: no code of ours but the CPU settings.

    python tests/pooling_driver.py model conversations.json rewards.json

conversations: list of lists of token ids.
"""

import json
import sys
from pathlib import Path

from distiller.vllm_setup import prepare_cpu

if __name__ == "__main__":
    prepare_cpu()
    from vllm import LLM

    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, enable_chunked_prefill=False, max_model_len=512)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(sys.argv[2]).read_text())]
    rewards = [output.outputs.probs[0] for output in llm.classify(prompts, use_tqdm=False)]
    Path(sys.argv[3]).write_text(json.dumps(rewards))
