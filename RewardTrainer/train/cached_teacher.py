"""The teacher's signal from disk, `--teacher_logprobs`: no teacher in memory, and the same KL term.

`refine/cache_teacher_logprobs_vllm.py` wrote it (format and reader: `distiller/logprob_cache.py`); the KL of what it
knows is in `top_k.py`. A batch gets its rows' arrays when it is made, from memory-mapped files. Before a model loads:

1. The student's vocabulary is compared with the teacher's, as for a live teacher (`vocabulary.py`). The tokenizer is
   that of the teacher the cache names, or of --teacher_model where that is given; it must be the same teacher.
2. Every row, of training and held out, must be in the cache, made from exactly the prompt and response tokens that a
   live teacher would read here.
"""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from distiller.logprob_cache import COMMAND, PATTERN, LogprobCache
from distiller.manifest import Manifest, model_fingerprint
from distiller.records import InputError, survey
from distiller.tokens import with_fixed_date
from RewardTrainer.eval.engines.loading import from_pretrained
from RewardTrainer.train.arguments import DataArguments, ModelArguments
from RewardTrainer.train.data import PairFeatures
from RewardTrainer.train.generative import TeacherSignal
from RewardTrainer.train.top_k import KLTail, TopK

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
"""Where the stages run: a relative path in a cache begins here."""
DEFAULT_TAIL: KLTail = "bucket"
TEMPLATE_ROOM = 512
"""Tokens that the teacher's template may write beyond the student's."""


class CachedTeacher:
    """A `LogprobCache` in the place of a `student.LiveTeacher`."""

    def __init__(self, cache: LogprobCache, kl_tail: KLTail = DEFAULT_TAIL):
        self.cache = cache
        self.kl_tail = kl_tail

    def rows(self, row_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """The response tokens of some rows, one row after the other: top_ids (T, k) int32, top_logprobs (T, k), tail
        (T,) fp32, natural log. Raises InputError for a row whose bytes are damaged."""
        rows = [self.cache[row_id] for row_id in row_ids]
        return {
            name: torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
            for name in ("top_ids", "top_logprobs", "tail")
        }

    def signal_for(self, top_ids: torch.Tensor, top_logprobs: torch.Tensor, tail: torch.Tensor) -> TeacherSignal:
        """What `rows` gave, as `generative.generative_losses` asks for it."""
        return TopK(top_ids, top_logprobs, tail, self.kl_tail).__getitem__

    def check(self, pairs: Sequence[PairFeatures], command: str) -> None:
        """Raises InputError unless every pair was cached for exactly its teacher row; `command` makes the cache."""
        missing = [pair["id"] for pair in pairs if pair["id"] not in self.cache]
        if missing:
            failed = Path(f"{self.cache.path}.failed.jsonl")
            reasons = f" ({failed} says which rows failed, and why)" if failed.exists() and survey(failed)[0] else ""
            raise InputError(
                f"{len(missing)} of {len(pairs)} rows (such as {missing[0]}) are not in --teacher_logprobs "
                f"{self.cache.path}{reasons}. They are made, from the repository's root, by\n    {command}"
            )
        for pair in pairs:
            prompt, response = np.split(pair["teacher_input_ids"], [pair["teacher_response_start"]])
            self.cache.check(pair["id"], response)
            try:
                self.cache.check(pair["id"], response, prompt)
            except InputError as fault:
                if pair["truncated"]:
                    raise InputError(
                        f"row {pair['id']}: --overlong truncate_prompt has cut its prompt, which {self.cache.path} "
                        "has whole: raise --max_length, or use --overlong drop"
                    ) from fault
                raise


def open_cache(
    model_args: ModelArguments, data_args: DataArguments, kl_weight: float, temperature: float
) -> CachedTeacher | None:
    """What `--teacher_logprobs` and `--kl_tail` say; None for a live teacher, or none.

    Raises InputError for flags that would be ignored or cannot be kept, and for a cache that is missing or damaged.
    """
    path, tail = model_args.teacher_logprobs, model_args.kl_tail
    if path is None:
        if tail is not None:
            raise InputError(f"--kl_tail {tail} would be ignored: a live teacher has no tail; remove it")
        return None
    if not kl_weight:
        raise InputError("--teacher_logprobs would be ignored: this loss has no KL term; remove it")
    if tail is None:
        tail = DEFAULT_TAIL
    if tail == "bucket" and temperature != 1:
        raise InputError(
            f"--kl_temperature {temperature:g} with --teacher_logprobs needs --kl_tail renormalize: at a temperature "
            "other than 1 the probability of what is not cached is unknown"
        )
    if not any(Path(path).glob(PATTERN)):
        raise InputError(
            f"--teacher_logprobs {path}: no cached log-probabilities there (current directory: {Path.cwd()}). They "
            f"are made, from the repository's root, by\n    {make_command(model_args, data_args)}"
        )
    return CachedTeacher(LogprobCache(path), tail)


def make_command(model_args: ModelArguments, data_args: DataArguments, cached: CachedTeacher | None = None) -> str:
    """The command that makes a cache for what is trained on, to be run from the repository's root.

    `cached`: one that is there already. It goes on where it was made from this very file, and is made anew otherwise.
    """

    def place(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    output = str(Path(model_args.teacher_logprobs).resolve())
    held_out = [] if data_args.eval_file is None else [data_args.eval_file]
    sources = [place(name.strip()) for name in (*data_args.train_file.split(","), *held_out)]
    first, source = "", sources[0]
    if len(sources) > 1:  # a cache is made from one file
        source = f"{output}.rows.jsonl"
        first = f"{shlex.join(['cat', *sources])} > {shlex.quote(source)} && "  # a hub dataset has to be saved first
    flags = {"input": source, "output": output, "student_model": place(model_args.model_name_or_path)}
    flags["max_model_len"] = data_args.max_length + TEMPLATE_ROOM
    anew = ""
    if cached is not None:
        if len(sources) > 1 or survey(source)[1] not in _inputs(cached.cache):
            anew = " --overwrite"
        flags |= {"model": cached.cache.info.model, "top_k_logprobs": cached.cache.info.top_k}
    elif model_args.teacher_model is not None:
        flags["model"] = place(model_args.teacher_model)
    if data_args.columns is not None:
        flags["columns"] = data_args.columns
    return f"{first}{COMMAND} {shlex.join(part for name in flags for part in (f'--{name}', str(flags[name])))}{anew}"


def _manifest(cache: LogprobCache) -> Manifest | None:
    return Manifest.load(Path(f"{cache.path}.manifest.json"))


def _inputs(cache: LogprobCache) -> list[str]:
    """Content hashes of the files a cache was made from; empty where its manifest is gone."""
    manifest = _manifest(cache)
    return [] if manifest is None else manifest.identity["inputs"]["input"]


def teacher_tokenizer(cached: CachedTeacher, model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher that the cache was made from.

    Raises InputError where it cannot be loaded, or --teacher_model is another teacher.
    """
    info, given = cached.cache.info, model_args.teacher_model
    code = {"trust_remote_code": model_args.trust_remote_code}
    if given is not None:
        _check_same_teacher(cached.cache, given, **code)
        return with_fixed_date(AutoTokenizer.from_pretrained(given, **code))
    local = next((place for place in (Path(info.model), ROOT / info.model) if place.is_dir()), None)
    try:
        return with_fixed_date(AutoTokenizer.from_pretrained(local or info.model, **code))
    except (OSError, ValueError) as fault:
        raise InputError(
            f"{cached.cache.path} was made from {info.model}, whose tokenizer cannot be loaded ({fault}); say where "
            "it is with --teacher_model: nothing else of the teacher is loaded"
        ) from fault


def _check_same_teacher(cache: LogprobCache, given: str, **load_args) -> None:
    """By its files where both are directories, by name where neither is, by the number of logits in any case."""
    manifest = _manifest(cache)
    files = None if manifest is None else manifest.identity.get("model_files")
    fingerprint = model_fingerprint(given)
    both = files is not None and fingerprint is not None
    names = manifest is not None and files is None and fingerprint is None
    size = from_pretrained(AutoConfig, given, **load_args).get_text_config().vocab_size
    if (both and files != fingerprint) or (names and given != cache.info.model) or size != cache.info.vocab_size:
        raise InputError(
            f"--teacher_model {given} is not the teacher of --teacher_logprobs {cache.path}, which was made from "
            f"{cache.info.model} ({cache.info.vocab_size} logits): remove one of the two flags, or make the cache anew"
        )
