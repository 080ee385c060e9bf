"""The arguments of a command that turns one file of rows into another, those every teacher stage adds to them, and
their reading from YAML and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

import yaml
from trl import TrlParser

from distiller.engine import Sampling
from distiller.manifest import hash_file, model_fingerprint
from distiller.openai_faults import shown_url
from distiller.records import InputError


def flag(default: object, text: str) -> object:
    """A dataclass field with its default and its --help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class FileArguments:
    """What every command takes that reads rows and writes each to one of three files. A command adds its own fields
    (all with a default)."""

    input: str | None = flag(
        None,
        "a file (JSONL, JSON, CSV, Parquet, Arrow), a saved dataset, or a hub dataset `owner/name[:config][:split]`",
    )
    output: str | None = flag(
        None, "JSONL file to write; <output>.filtered.jsonl, .failed.jsonl, .manifest.json beside it"
    )
    columns: str | None = flag(None, "our field names for the input's: ours=theirs,ours=theirs")
    limit: int | None = flag(None, "only the first rows of the input")
    overwrite: bool = flag(False, "begin anew where the output exists")
    max_failure_rate: float = flag(0.1, "exit code 1 when a larger share of the rows failed")

    root: Path | None = field(default=None, init=False)
    """The repository root, which relative default paths are relative to."""

    NEEDED: ClassVar[tuple[str, ...]] = ("input", "output")
    INPUT_FIELDS: ClassVar[tuple[str, ...]] = ("input",)
    """Fields that name data (a path or a list of paths): their content counts for the identity, not their names."""
    PROMPT_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that name prompt files: likewise."""
    RANGES: ClassVar[Mapping[str, tuple[float, float | None]]] = {"limit": (1, None), "max_failure_rate": (0, 1)}
    """The least and the greatest value of a field, both allowed; None for no limit."""

    def validate(self) -> None:
        """Raises InputError for a value that cannot work, before anything is read or loaded."""
        for name in self.NEEDED:
            if not getattr(self, name):
                raise InputError(f"--{name} is needed")
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                raise InputError(
                    f"--{name} {value} is out of range (from {low:g}{'' if high is None else f' to {high}'})"
                )
        self.check_output()
        for name in self.named(*self.INPUT_FIELDS, *self.PROMPT_FIELDS):
            check_other_files(self.output, name)
        for name in self.named(*self.INPUT_FIELDS, *self.PROMPT_FIELDS):
            self._check_place(name)

    def check_output(self) -> None:
        """Raises InputError where the output is there and cannot be what this command writes."""
        if os.path.isdir(self.output):
            raise InputError(f"--output {self.output} is a directory: name a file in it, such as out.jsonl")
        if self.output == "-" or (os.path.exists(self.output) and not os.path.isfile(self.output)):
            raise InputError(f"--output {self.output} is no file: rows are written to it and to files beside it")

    def _check_place(self, name: str) -> None:
        """Say from where to run, when a relative path is there from the repository root and not from here."""
        if self.root and not Path(name).exists() and (self.root / name).exists() and Path.cwd() != self.root:
            raise InputError(f"{name} does not exist from {Path.cwd()}; run this command from {self.root}")

    def named(self, *fields: str) -> list[str]:
        """The non-empty names in these fields; a field may hold one or a list."""
        values = [getattr(self, name) for name in fields]
        return [name for value in values for name in (value if isinstance(value, list) else [value]) if name]


def check_other_files(output: str, source: str) -> None:
    """Raises InputError where what is written, `output` or a file beside it, is the file of an input, by any name: by
    a link of either kind, by another mount of its directory, in other capitals on a file system that folds them."""
    files = ("", ".filtered.jsonl", ".failed.jsonl", ".new.filtered.jsonl", ".new.failed.jsonl", ".manifest.json")
    for suffix in (name + ending for name in files for ending in ("", ".new", ".part")):  # those of `store` and others
        written = output + suffix
        same = os.path.exists(written) and os.path.exists(source) and os.path.samefile(written, source)
        if same or os.path.realpath(written) == os.path.realpath(source):
            names = written if written == source else f"{written} is {source}"
            raise InputError(f"--output {output} would write over an input ({names})")
    directory = next((path for path in (source, source.rpartition(":")[0]) if path and os.path.isdir(path)), None)
    if directory and Path(directory).resolve() in Path(output).resolve().parents:
        raise InputError(f"--output {output} is in {directory}, which is read: what is written would be input too")


@dataclass
class StageArguments(FileArguments):
    """What every teacher stage takes. A stage adds its own fields (all with a default), which become part of its run's
    identity."""

    model: str | None = flag(None, "the teacher: local directory, hub name, or the name a server knows it by")
    base_url: str | None = flag(
        None, "OpenAI-compatible server, e.g. http://localhost:8000/v1 (key from OPENAI_API_KEY)"
    )
    prompt_file: str | None = flag(None, "Jinja2 file with the prompt to the teacher")
    limit: int | None = flag(None, "only the first rows of the input; may grow from run to run")
    seed: int = flag(0, "seed of everything drawn")
    retry_failed: bool = flag(False, "run the rows in <output>.failed.jsonl again, with other seeds")
    max_tokens_total: int | None = flag(
        None, "begin no more rows once this output has taken so many tokens, prompts and replies; exit code 3"
    )
    price_per_million: list[float] | None = flag(
        None, "INPUT OUTPUT [CACHED]: price of a million tokens; the cost goes to the summary and the manifest"
    )
    dry_run: bool = flag(False, "rows, token totals and two prompts; no model is loaded, nothing is written")

    temperature: float = flag(0.7, "sampling temperature; 0 is greedy")
    top_p: float = flag(0.8, "nucleus sampling")
    top_k: int = flag(20, "sample from the k most likely tokens; -1 for all")
    max_tokens: int = flag(2048, "longest reply in tokens, thinking included")
    max_tries: int = flag(3, "how often a reply that cannot be parsed is asked for, the first time included")
    enable_thinking: bool | None = flag(None, "true or false, for the chat template (in process: false unless given)")
    chat_template_kwargs: str | None = flag(None, "more arguments for the chat template, as a JSON object")

    thinking_tags: list[str] | None = flag(
        None,
        "names of tags around the teacher's thinking, beside think, thinking, thought, thoughts and reasoning (all "
        "but think are part of an answer to a prompt that speaks of them)",
    )

    max_model_len: int | None = flag(None, "context in tokens; the model's own unless given")
    dtype: str = flag(
        "auto",
        "in process: auto (on a CPU bfloat16 where it has that, float32 for tiny models), bfloat16, float16, float32",
    )
    num_engines: int | None = flag(None, "a pool of so many in-process engines on Ray (RAY_ADDRESS: in a cluster)")
    tensor_parallel_size: int = flag(1, "in process: GPUs the model is spread over, for each engine")
    gpu_memory_utilization: float = flag(0.9, "in process: share of the GPU's memory to take")
    enforce_eager: bool = flag(False, "in process: no CUDA graphs; starts sooner, decodes slower")
    max_num_seqs: int | None = flag(None, "in process: sequences decoded at once; vLLM's own unless given")
    trust_remote_code: bool = flag(False, "let the model's repository run its own Python code on this machine")
    leave_out: list[str] | None = flag(
        None, "server: fields not to send, of temperature, top_p and seed, to one that refuses them"
    )
    max_concurrency: int = flag(64, "server: requests in flight at once")
    timeout: float = flag(600.0, "server: seconds until a request is given up and tried again")
    max_retries: int = flag(5, "server: how often the client repeats a request that failed")

    NEEDED: ClassVar[tuple[str, ...]] = ("input", "output", "model")
    PROMPT_FIELDS: ClassVar[tuple[str, ...]] = ("prompt_file",)
    RANGES: ClassVar[Mapping[str, tuple[float, float | None]]] = {
        **FileArguments.RANGES,
        "temperature": (0, None),
        "top_p": (1e-9, 1),
        "top_k": (-1, None),
        "max_tokens": (1, None),
        "max_tries": (1, None),
        "seed": (0, None),
        "num_engines": (1, None),
        "tensor_parallel_size": (1, None),
        "max_model_len": (1, None),
        "max_num_seqs": (1, None),
        "gpu_memory_utilization": (1e-9, 1),
        "max_concurrency": (1, None),
        "timeout": (0, None),
        "max_retries": (0, None),
        "max_tokens_total": (1, None),
    }
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {
            "output",
            "base_url",
            "limit",
            "overwrite",
            "retry_failed",
            "max_failure_rate",
            "max_tokens_total",
            "price_per_million",
            "dry_run",
            "num_engines",
            "max_model_len",  # more rows fit; none changes, or the engine's facts say so (longrope)
            "tensor_parallel_size",
            "trust_remote_code",
            "gpu_memory_utilization",
            "enforce_eager",
            "max_num_seqs",
            "max_concurrency",
            "timeout",
            "max_retries",
            "root",
        }
    )
    """Fields that may differ when a run goes on: they change how fast or where, not what comes out."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens)

    @property
    def longest_reply(self) -> int:
        """The most tokens that any reply can take."""
        return self.max_tokens

    @property
    def template_kwargs(self) -> dict:
        """Arguments for the chat template. In process, thinking is off unless asked for; a server is sent only what
        was given."""
        kwargs = {} if self.base_url else {"enable_thinking": False}
        if self.chat_template_kwargs:
            try:
                kwargs |= json.loads(self.chat_template_kwargs)
            except (ValueError, TypeError) as fault:
                raise InputError(f"--chat_template_kwargs must be a JSON object: {fault}") from fault
        return kwargs if self.enable_thinking is None else {**kwargs, "enable_thinking": self.enable_thinking}

    def validate(self) -> None:
        super().validate()
        if self.base_url is not None and not self.base_url.strip():
            raise InputError("--base_url is empty: name the server, or leave the flag out")
        if self.num_engines and self.base_url:
            raise InputError("--num_engines and --base_url exclude each other: the server has engines of its own")
        names = [name.strip("<>[]/ \u25c1\u25b7") for name in self.thinking_tags or ()]
        for given, name in zip(self.thinking_tags or (), names, strict=True):
            if not re.fullmatch(r"[^\s<>\[\]/=\u25c1\u25b7]+", name):
                raise InputError(f"--thinking_tags {given!r}: give the name of a tag, as scratchpad of <scratchpad>")
        self.thinking_tags = names or None
        if unknown := set(self.leave_out or ()) - {"temperature", "top_p", "seed"}:
            raise InputError(
                f"--leave_out {', '.join(sorted(unknown))}: only temperature, top_p and seed can be left out"
            )
        prices = self.price_per_million
        if prices is not None and not (len(prices) in (2, 3) and all(0 <= price < math.inf for price in prices)):
            raise InputError(
                f"--price_per_million {' '.join(map(str, prices))}: two or three numbers are needed, the price of a "
                "million prompt tokens, completion tokens and, where it differs, cached prompt tokens"
            )
        if self.base_url:
            try:
                host = urlsplit(self.base_url.strip())
                if host.scheme not in ("http", "https") or not host.hostname or host.port == 0:
                    raise ValueError("it is no address of the form http://host:port/v1")
            except ValueError as fault:
                raise InputError(f"--base_url {shown_url(self.base_url)}: {fault}") from fault
        for name in self.named("model"):
            self._check_place(name)

    def identity(self, stage: str, hashes: Mapping[str, str]) -> dict:
        """All that decides what the stage writes; `hashes` has the content hash of every input, by its name."""
        sampling = dataclasses.asdict(self.sampling)
        apart = {
            "model",
            "seed",
            "enable_thinking",
            *sampling,
            *self.INPUT_FIELDS,
            *self.PROMPT_FIELDS,
            *self.NOT_IDENTITY,
        }
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in apart}
        return {
            "stage": stage,
            "model": self.model,
            "model_files": model_fingerprint(self.model),
            "sampling": sampling,
            "seed": self.seed,
            "prompts": {name: [hash_file(path) for path in self.named(name)] for name in self.PROMPT_FIELDS},
            "inputs": {name: [hashes[source] for source in self.named(name)] for name in self.INPUT_FIELDS},
            "options": {**options, "chat_template_kwargs": self.template_kwargs},
        }


Arguments = TypeVar("Arguments", bound=FileArguments)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the script's docstring and shows defaults."""


class _Parser(TrlParser):
    source = ""
    """The configuration file, while its values are being parsed."""
    lines: ClassVar[dict[str, int]] = {}
    """In which line of it each key stands."""

    def error(self, message: str) -> None:
        place = ""
        if self.source:
            key = re.match(r"unknown key `(\w+)`|argument --(\w+)", message)
            line = self.lines.get(key[1] or key[2]) if key else None
            place = f"{self.source}, line {line}: " if line else f"{self.source}: "
        self.exit(2, f"{self.prog}: {place}{message} (--help lists all arguments)\n")


def parse_stage_args(
    cls: type[Arguments], default_config: Path | None, description: str | None = None, argv: list[str] | None = None
) -> Arguments:
    """Values from `--config file.yaml` (`default_config`, if any, unless given), overridden by the command line.

    The file holds one `name: value` a line, names as in --help, lists and (for JSON arguments) mappings as YAML writes
    them, and, as TRL has it, `env:` with environment variables to set. An unknown key or a wrong value ends the
    command (exit code 2) and names file and key.
    """
    parser = _Parser((cls,), description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    default = os.path.relpath(default_config) if default_config else None
    parser.add_argument("--config", default=default, help="YAML file with values for these arguments")
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_known_args(argv)[0].config
    parser.source = config
    lists = {f.name: "list" in str(f.type) for f in dataclasses.fields(cls) if f.init}
    config_argv = _config_argv(config, lists, parser) if config else []
    parser.parse_args(config_argv)  # only to have a wrong value reported with the file it stands in
    parser.source = ""
    args, *_, unknown = parser.parse_args_into_dataclasses(
        [*config_argv, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], lists, n=1)
        parser.error(f"unknown argument {' '.join(unknown)}" + (f", did you mean --{near[0]}?" if near else ""))
    for name in lists:
        setattr(args, name, expanded(getattr(args, name)))
    # <root>/<stage>/configs/example.yaml, <root>/distiller/arguments.py
    args.root = default_config.resolve().parents[2] if default_config else Path(__file__).resolve().parents[1]
    return args


def expanded(value: object) -> object:
    """A path in the home directory in full, as a shell writes it: `~/teacher` in a file, `--model=~/teacher`; of
    several, in a list or separated by commas, each."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    home = os.path.expanduser("~")
    return re.sub(r"(^|,\s*)~/", rf"\g<1>{home}/", value) if isinstance(value, str) else value


def _config_argv(path: str, lists: Mapping[str, bool], parser: _Parser) -> list[str]:
    """A configuration file as command-line arguments, so that both are checked alike. `null` leaves the default;
    `lists` tells of every argument whether it takes several values."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = yaml.safe_load(text) or {}
        if config and isinstance(config, dict):
            parser.lines = {key.value: key.start_mark.line + 1 for key, _ in yaml.compose(text).value}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        parser.error(f"cannot be read: {fault}")
    if not isinstance(config, dict):
        parser.error("must be a mapping of names to values")
    environment = config.pop("env", None) or {}
    if not isinstance(environment, dict):
        parser.error("`env` must be a mapping of names to values")
    for name, value in environment.items():
        os.environ[name] = str(value)
    argv = []
    for name, value in config.items():
        if name not in lists:
            near = difflib.get_close_matches(str(name), lists, n=1)
            parser.error(f"unknown key `{name}`" + (f", did you mean `{near[0]}`?" if near else ""))
        if isinstance(value, list) and not lists[name]:
            parser.error(f"argument --{name}: takes one value, not a list")
        if isinstance(value, dict) and not name.endswith("_kwargs"):
            parser.error(f"argument --{name}: takes one value, not a mapping")
        if isinstance(value, list):
            argv += [f"--{name}", *(str(item) for item in value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
