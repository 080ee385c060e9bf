"""Between stages 2 and 3: the teacher's log-probabilities of its own answers, once and for all.

Reads rows with `prompt` and `teacher_response` (of the file that training will read) and writes a directory of shards
with, for every token of the response, the --top_k_logprobs most likely tokens, their log-probabilities, that of the
token itself, and the probability of all others. Whoever reads it needs no teacher on a GPU; what it holds and how it
is read says distiller/logprob_cache.py. At the end the probability mass that the top k cover is printed.

A row that does not fit --max_model_len goes to <output>.failed.jsonl. The same command goes on after an interruption;
a kill costs the rows of the shard not yet written. The disk takes 6 bytes a candidate: 0.4 kB a response token at
--top_k_logprobs 64, and 0.3 kB where the vocabulary is under 65,536.

    # the scored pairs of the embedded world and its tiny teacher, on any CPU
    python refine/cache_teacher_logprobs_vllm.py

    # the paper's setting on one GPU
    python refine/cache_teacher_logprobs_vllm.py --config refine/configs/cache_paper.yaml
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from distiller.cli import StageArguments, flag, parse_stage_args, run
from distiller.engine import AskError
from distiller.logprob_cache import CacheInfo, LogprobCache
from distiller.logprob_store import ShardFiles, check_directory
from distiller.records import InputError, prompt_messages, response_text
from distiller.runner import Done, Failed, RowWork, Work
from distiller.tokens import end_of_turn, prompt_ids, response_ids, tokenizer_fingerprint, with_fixed_date
from distiller.vllm_logprobs import ResponseAsk, VLLMLogprobEngine
from distiller.vllm_setup import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def absent(value: object) -> object:
    """A field of the other stages that this one does not take."""
    return field(default=value, init=False)


@dataclass
class CacheArguments(StageArguments):
    """Arguments of the caching stage. Nothing is drawn and nothing is asked in words, and a server cannot do this."""

    output: str | None = flag(None, "directory to write; <output>.failed.jsonl and .manifest.json beside it")
    top_k_logprobs: int = flag(64, "candidates kept for each token of a response")
    student_model: str | None = flag(None, "whose tokenizer cuts the responses into tokens; the teacher unless given")
    shard_tokens: int = flag(65536, "response tokens a shard holds: what a kill can cost")

    base_url: str | None = absent(None)
    prompt_file: str | None = absent(None)
    seed: int = absent(0)
    temperature: float = absent(0.0)
    top_p: float = absent(1.0)
    top_k: int = absent(-1)
    max_tokens: int = absent(1)
    max_tries: int = absent(1)
    enable_thinking: bool | None = absent(None)
    chat_template_kwargs: str | None = absent(None)
    max_tokens_total: int | None = absent(None)
    price_per_million: list[float] | None = absent(None)
    num_engines: int | None = absent(None)
    leave_out: list[str] | None = absent(None)
    thinking_tags: list[str] | None = absent(None)
    max_concurrency: int = absent(1)
    timeout: float = absent(0.0)
    max_retries: int = absent(0)

    NOT_IDENTITY = StageArguments.NOT_IDENTITY | {"shard_tokens", "student_model"}

    @cached_property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The teacher's, for prompts, and the one that cuts responses into tokens.

        Raises EngineDead for a teacher that is not there, InputError for tokenizers that cannot be loaded or do not
        fit together.
        """
        check_weights(self.model)
        teacher = self._tokenizer(self.model)
        if self.student_model is None:
            return teacher, teacher
        student, known = self._tokenizer(self.student_model), teacher.get_vocab()
        different = [token for token, i in student.get_vocab().items() if known.get(token) != i]
        if different:
            raise InputError(
                f"--student_model {self.student_model}: {len(different)} of its tokens are not the teacher's "
                f"(such as {different[0]!r}), so that the teacher's distributions say nothing about them"
            )
        return teacher, student

    def _tokenizer(self, model: str) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=self.trust_remote_code)
            with_fixed_date(tokenizer).get_chat_template()
        except (OSError, ValueError) as fault:
            raise InputError(f"{model}: no tokenizer with a chat template: {fault}") from fault
        return tokenizer

    @cached_property
    def info(self) -> CacheInfo:
        """Raises InputError where the vocabulary is smaller than --top_k_logprobs."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as fault:
            raise InputError(f"{self.model}: its config.json cannot be used: {fault}") from fault
        vocab_size = config.get_text_config().vocab_size
        if self.top_k_logprobs > vocab_size:
            raise InputError(f"--top_k_logprobs {self.top_k_logprobs}: {self.model} knows {vocab_size} tokens only")
        return CacheInfo(self.top_k_logprobs, vocab_size, self.model, tokenizer_fingerprint(self.tokenizers[1]))

    def validate(self) -> None:
        super().validate()
        for name in ("top_k_logprobs", "shard_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is out of range (from 1)")

    def check_output(self) -> None:
        check_directory(Path(self.output))

    def identity(self, stage: str, hashes: Mapping[str, str]) -> dict:
        """Without sampling, with everything that makes tokens of a row."""
        known = super().identity(stage, hashes)
        teacher, responses = self.tokenizers
        template = json.dumps([teacher.get_chat_template(), self.template_kwargs])
        kept = {name: known[name] for name in ("stage", "model", "model_files", "inputs", "options")}
        return kept | {
            "tokenizer": tokenizer_fingerprint(teacher),
            "response_tokenizer": self.info.tokenizer,
            "prompt": hashlib.sha256(template.encode()).hexdigest()[:16],
            "end_of_turn": end_of_turn(responses),
        }


def make_work(args: CacheArguments) -> Work:
    """The stage's work on one row. Raises InputError, EngineDead."""
    teacher, responses = args.tokenizers
    end_of_turn(responses)  # a template without one is refused here and not row by row

    def work(row: dict) -> RowWork:
        prompt, text = prompt_messages(row["prompt"]), response_text(row["teacher_response"])
        reply = yield ResponseAsk(
            messages=[*prompt, {"role": "assistant", "content": text}],
            seed=args.seed,
            prompt_ids=prompt_ids(teacher, prompt, "the prompt", **args.template_kwargs),
            response_ids=response_ids(responses, text),
        )
        if isinstance(reply, AskError):
            return Failed(str(reply))
        return Done({"id": row["id"], "logprobs": reply.tokens})

    return work


def make_engine(args: CacheArguments) -> VLLMLogprobEngine:
    """Raises EngineDead."""
    return VLLMLogprobEngine(
        args.model,
        args.top_k_logprobs,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
        chat_template_kwargs=args.template_kwargs,
        trust_remote_code=args.trust_remote_code,
        max_num_seqs=args.max_num_seqs,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_stage_args(CacheArguments, Path(__file__).parent / "configs/cache_example.yaml", __doc__, argv)
    return run(
        args,
        make_work,
        stage="cache_teacher_logprobs",
        required={"prompt": "", "teacher_response": "python refine/refine_response_vllm.py"},
        input_from="python score/cali_score_vllm.py",
        engine=make_engine,
        open_done=lambda path: ShardFiles(path, args.info, args.shard_tokens),
        report=lambda: LogprobCache(args.output).coverage(),
    )


if __name__ == "__main__":
    sys.exit(main())
