"""The teacher's top-k log-probabilities on its own responses, on disk: the format, its writer and its reader.

Pure numpy: no vLLM, no torch, no model. `refine/cache_teacher_logprobs_vllm.py` writes it. Reading:

    cache = LogprobCache("data/teacher_logprobs")
    cache.check(row_id, response_ids, prompt_ids)      # once, before training: are these the tokens it was made from?
    row = cache[row_id]                                # in a data loader, in any order and any process

**What is stored.** For a response of n tokens (as training sees it: the end of turn included) position t holds the
distribution that predicts response token t from the prompt and the response tokens before it, the first one included:
the k most likely ids with their natural log-probabilities over the teacher's whole vocabulary, the log-probability of
token t itself, wherever it ranks, and `tail`, the probability of all ids outside the top k. The ids are the teacher's.

**What it can give at temperature T.** At T = 1 the probabilities of the top k, of the response token and of the rest
as one lump. At another T the differences log p_i - log p_j are exact within the top k (they are divided by T), their
normaliser is not known: `softmax(top_logprobs / T)` is the tempered distribution *given* that the token is one of the
top k. What that leaves out, next to S = sum over the top k of p_i^(1/T), is at T > 1 between tail^(1/T) and
(V - k)^(1 - 1/T) tail^(1/T) for a vocabulary of V, and at T < 1 at most tail^(1/T).

**Precision.** Half precision keeps 11 bits: a log-probability l is off by at most |l| / 2048 (3e-8 near 0), and the KL
from it by about 1/2048 of the teacher's entropy. `tail` is computed before rounding.

**Files.** A directory of shards, safetensors files `logprobs-00000.safetensors` ..., each with whole rows (R rows, N
tokens together) and all a reader needs:

    top_ids (N, k), token_ids (N,)                            uint16 for vocabularies up to 65,536, else int32
    top_logprobs (N, k), token_logprobs (N,), tail (N,)       float16
    row_ids (bytes,) uint8, row_id_ends (R,) int32            the ids as UTF-8, one after the other
    token_ends (R,) int32, prompt_hashes (R,) uint64, checksums (R,) uint32

A shard appears under its name whole or not at all, and never changes. What is read is checked: the index (the last two
lines and the metadata) by a checksum when the cache is opened, a row's tokens by its own each time. So a damaged file
is found, yet opening reads little; the rest is memory-mapped and any number of processes share it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distiller.atomic import write_whole
from distiller.records import InputError

COMMAND = "python refine/cache_teacher_logprobs_vllm.py"
FORMAT = "teacher-logprobs-1"
PATTERN = "logprobs-*.safetensors"
TOKENS = ("token_ids", "token_logprobs", "top_ids", "top_logprobs", "tail")
INDEX = ("row_ids", "row_id_ends", "token_ends", "prompt_hashes", "checksums")
LOWEST = float(np.finfo(np.float16).min)
"""Stands for anything less likely, -inf included: exp(LOWEST) is 0, and LOWEST * 0 is no NaN."""
PERCENTILES = (5.0, 1.0, 0.1)


@dataclass(frozen=True)
class TokenLogprobs:
    """One row of the cache: a response of n tokens, k candidates a position, the most likely first."""

    token_ids: np.ndarray
    """(n,) int32: the response, its end of turn included."""
    token_logprobs: np.ndarray
    """(n,) float32, natural log, at temperature 1; like the two below over the whole vocabulary."""
    top_ids: np.ndarray
    """(n, k) int32"""
    top_logprobs: np.ndarray
    """(n, k) float32"""
    tail: np.ndarray
    """(n,) float32 in [0, 1]: probability of all ids outside `top_ids`."""
    prompt_hash: int
    """`hash_ids` of the teacher's prompt tokens."""

    @classmethod
    def measured(
        cls,
        prompt_ids: Sequence[int],
        token_ids: np.ndarray,
        token_logprobs: np.ndarray,
        top_ids: np.ndarray,
        top_logprobs: np.ndarray,
    ) -> TokenLogprobs:
        """From what a model gave: the same arrays in full precision, `tail` from them."""
        tail = 1.0 - np.exp(top_logprobs.astype(np.float64)).sum(-1)  # (n,)
        return cls(token_ids, token_logprobs, top_ids, top_logprobs, tail.clip(0.0, 1.0), hash_ids(prompt_ids))


@dataclass(frozen=True)
class CacheInfo:
    """What all shards of a cache have in common."""

    top_k: int
    vocab_size: int
    """Number of the teacher's logits."""
    model: str
    """The teacher's name, as it was given."""
    tokenizer: str
    """`tokens.tokenizer_fingerprint` of the tokenizer that cut the responses."""

    @property
    def id_type(self) -> type[np.integer]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32


def hash_ids(ids: Sequence[int]) -> int:
    """64 bits for a sequence of token ids."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).digest(), "little")


def write_shard(path: Path, info: CacheInfo, rows: Sequence[tuple[str, TokenLogprobs]]) -> None:
    """Write rows (id, log-probabilities), at least one, as one shard: whole, or (where this is interrupted) not at
    all."""
    halves = ("token_logprobs", "top_logprobs", "tail")
    tensors = {name: np.concatenate([getattr(row, name) for _, row in rows]) for name in TOKENS}
    tensors = {
        name: np.maximum(values, LOWEST).astype(np.float16) if name in halves else values.astype(info.id_type)
        for name, values in tensors.items()
    }
    names = [identifier.encode("utf-8", "surrogatepass") for identifier, _ in rows]
    ends = np.cumsum([len(row.token_ids) for _, row in rows])
    tensors |= {
        "row_ids": np.frombuffer(b"".join(names), dtype=np.uint8),
        "row_id_ends": np.cumsum([len(name) for name in names]).astype(np.int32),
        "token_ends": ends.astype(np.int32),
        "prompt_hashes": np.array([row.prompt_hash for _, row in rows], dtype=np.uint64),
    }
    starts = [0, *ends[:-1]]
    tensors["checksums"] = np.array(
        [_checksum(tensors[name][start:end] for name in TOKENS) for start, end in zip(starts, ends, strict=True)],
        dtype=np.uint32,
    )
    metadata = {"format": FORMAT, **{name: str(value) for name, value in asdict(info).items()}}
    metadata["checksum"] = str(_index_checksum(metadata, tensors))
    write_whole(path, save(tensors, metadata), sync=True)


def _checksum(arrays: Iterator[np.ndarray]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array), value)
    return value


def _index_checksum(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> int:
    said = "\n".join(f"{name}={metadata[name]}" for name in sorted(metadata) if name != "checksum")
    return _checksum([np.frombuffer(said.encode(), dtype=np.uint8), *(tensors[name] for name in INDEX)])


class Shard:
    """One shard, open for reading: its index in memory, its tokens memory-mapped."""

    def __init__(self, path: Path):
        """Raises InputError for a file that is damaged or no shard."""
        self.path = path
        try:
            self._file = safe_open(path, framework="np")
            metadata = self._file.metadata() or {}
            index = {name: self._file.get_tensor(name) for name in INDEX}
            if _index_checksum(metadata, index) != int(metadata["checksum"]):
                raise ValueError("its index does not fit its checksum")
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
            self.info = CacheInfo(
                int(metadata["top_k"]), int(metadata["vocab_size"]), metadata["model"], metadata["tokenizer"]
            )
        except (SafetensorError, OSError, KeyError, ValueError) as fault:
            raise self._damaged(fault) from fault
        names, ends = index["row_ids"].tobytes(), index["row_id_ends"].tolist()
        starts = [0, *ends[:-1]]
        self.ids = [names[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]
        self._ends = index["token_ends"].tolist()
        self.prompt_hashes = index["prompt_hashes"].tolist()
        self._checksums = index["checksums"].tolist()

    def _damaged(self, fault: object) -> InputError:
        return InputError(
            f"{self.path}: damaged ({fault}); delete this file and run {COMMAND} again, with the flags it was made "
            "with: its rows are made anew"
        )

    def tokens(self, name: str, row: int | None = None) -> np.ndarray:
        """The tensor of that name, whole or one row's part of it, copied from the file; not checked."""
        try:
            if row is None:
                return self._file.get_tensor(name)
            return self._file.get_slice(name)[self._ends[row - 1] if row else 0 : self._ends[row]]
        except SafetensorError as fault:
            raise self._damaged(fault) from fault

    def read(self, row: int) -> TokenLogprobs:
        """A row by its number in the shard. Raises InputError where its bytes have changed."""
        arrays = {name: self.tokens(name, row) for name in TOKENS}
        if _checksum(arrays.values()) != self._checksums[row]:
            raise self._damaged(f"row {self.ids[row]} does not fit its checksum")
        arrays = {
            name: array.astype(np.float32 if array.dtype == np.float16 else np.int32) for name, array in arrays.items()
        }
        return TokenLogprobs(**arrays, prompt_hash=self.prompt_hashes[row])


@dataclass(frozen=True)
class Coverage:
    """How much of the teacher's distribution a cache holds."""

    top_k: int
    rows: int
    tokens: int
    bytes: int
    """On disk, shards whole."""
    mean: float
    """Probability mass of the top k, the mean over tokens."""
    percentiles: dict[float, float]
    """{p: mass that p % of the tokens are below}, for PERCENTILES."""

    def __str__(self) -> str:
        low = ", ".join(f"{mass:.4f} at the lowest {percent:g} %" for percent, mass in self.percentiles.items())
        return (
            f"the top {self.top_k} cover a probability mass of {self.mean:.4f} a token on average, {low}\n"
            f"{self.rows} rows, {self.tokens} tokens, {self.bytes / 1e6:.1f} MB: "
            f"{self.bytes / self.tokens:.1f} bytes a token"
        )


class LogprobCache:
    """A cache, read by row id. Holds the ids in memory; may be pickled and forked, for data loaders."""

    def __init__(self, path: str | Path):
        """Raises InputError where there is no cache, or a shard of it is damaged."""
        self.path = Path(path)
        self._shards = [Shard(file) for file in sorted(self.path.glob(PATTERN))]
        if not self._shards:
            raise InputError(f"{path} has no cached log-probabilities (no {PATTERN} in it); to make them: {COMMAND}")
        self.info = self._shards[0].info
        self._places: dict[str, tuple[Shard, int]] = {}
        for shard in self._shards:
            if shard.info != self.info:
                raise InputError(f"{shard.path} is of another cache ({shard.info}, not {self.info}); take it away")
            for row, identifier in enumerate(shard.ids):
                if identifier in self._places:
                    raise InputError(f"{shard.path}: row {identifier} is in {self._places[identifier][0].path} too")
                self._places[identifier] = (shard, row)

    def __reduce__(self) -> tuple:
        return LogprobCache, (self.path,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """The ids of all rows."""
        return iter(self._places)

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._places

    def __getitem__(self, row_id: str) -> TokenLogprobs:
        """Raises InputError for a row that is not there or whose bytes are damaged."""
        shard, row = self._place(row_id)
        return shard.read(row)

    def check(self, row_id: str, response_ids: Sequence[int], prompt_ids: Sequence[int] | None = None) -> None:
        """Raises InputError unless the row was cached for exactly these response tokens and, where given, after
        exactly these prompt tokens of the teacher. Cheap: no log-probability is read."""
        shard, row = self._place(row_id)
        cached, given = shard.tokens("token_ids", row).astype(np.int64), np.asarray(response_ids, dtype=np.int64)
        remake = f"make the cache from the file that is trained on: {COMMAND} --overwrite"
        if len(cached) != len(given) or (cached != given).any():
            both = min(len(cached), len(given))
            first = int(np.append(cached[:both] != given[:both], True).argmax())
            raise InputError(
                f"row {row_id}: {self.path} was made from another response, or cut into tokens by another tokenizer: "
                f"{len(cached)} tokens there and {len(given)} here, different from token {first} on; {remake} "
                "(--student_model takes the student's tokenizer)"
            )
        if prompt_ids is not None and hash_ids(prompt_ids) != shard.prompt_hashes[row]:
            raise InputError(
                f"row {row_id}: {self.path} was made after another prompt: its text, the teacher's chat template "
                f"(some write today's date) or a cut of over-long prompts differs; {remake}"
            )

    def coverage(self) -> Coverage:
        """Measured over all tokens; reads 2 bytes of each."""
        tail = np.concatenate([shard.tokens("tail") for shard in self._shards]).astype(np.float64)
        return Coverage(
            top_k=self.info.top_k,
            rows=len(self),
            tokens=len(tail),
            bytes=sum(shard.path.stat().st_size for shard in self._shards),
            mean=float(1 - tail.mean()),
            percentiles={percent: float(1 - np.percentile(tail, 100 - percent)) for percent in PERCENTILES},
        )

    def _place(self, row_id: str) -> tuple[Shard, int]:
        if row_id not in self._places:
            raise InputError(
                f"row {row_id} is not in {self.path}; run {COMMAND} on the file that has it "
                f"(or see {self.path}.failed.jsonl)"
            )
        return self._places[row_id]
