"""The command line of a teacher stage: arguments, configuration file, and the one `run` behind every entry script.

    @dataclass
    class RefineArguments(StageArguments):
        min_edit_similarity: float = field(default=0.3, metadata={"help": "..."})

    args = parse_stage_args(RefineArguments, Path(__file__).parent / "configs/example.yaml", __doc__)
    sys.exit(run(args, make_work, stage="refine", required={"prompt": "", "rejected": ""}))

Exit codes: 0 done, 1 refused or too many rows failed, 2 the engine died (or the arguments are wrong), 130 / 143 stopped by SIGINT / SIGTERM.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shlex
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

import yaml
from trl import TrlParser

from distiller.dry_run import Preview, dry_run, first_ask
from distiller.engine import EngineDead, Sampling, TeacherEngine
from distiller.manifest import Manifest, hash_file, made_with, model_fingerprint
from distiller.records import BadRow, InputError, parse_columns, read_rows, survey
from distiller.runner import Work, run_stage
from distiller.templates import PromptError


def flag(default: object, text: str) -> object:
    """A dataclass field with its default and its --help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class StageArguments:
    """What every teacher stage takes. A stage adds its own fields (all with a default), which become part of its run's identity."""

    input: str | None = flag(None, "JSONL file, JSON array, or hub dataset `owner/name` or `owner/name:split`")
    output: str | None = flag(None, "JSONL file to write; <output>.filtered.jsonl, .failed.jsonl, .manifest.json beside it")
    model: str | None = flag(None, "the teacher: local directory, hub name, or the name a server knows it by")
    base_url: str | None = flag(None, "OpenAI-compatible server, e.g. http://localhost:8000/v1 (key from OPENAI_API_KEY)")
    prompt_file: str | None = flag(None, "Jinja2 file with the prompt to the teacher")
    columns: str | None = flag(None, "our field names for the input's: ours=theirs,ours=theirs")
    limit: int | None = flag(None, "only the first rows of the input; may grow from run to run")
    seed: int = flag(0, "seed of everything drawn")
    overwrite: bool = flag(False, "begin anew where the output exists")
    retry_failed: bool = flag(False, "run the rows in <output>.failed.jsonl again, with other seeds")
    max_failure_rate: float = flag(0.1, "exit code 1 when a larger share of the rows failed")
    dry_run: bool = flag(False, "rows, token totals and two prompts; no model is loaded, nothing is written")

    temperature: float = flag(0.7, "sampling temperature; 0 is greedy")
    top_p: float = flag(0.8, "nucleus sampling")
    top_k: int = flag(20, "sample from the k most likely tokens; -1 for all")
    max_tokens: int = flag(2048, "longest reply in tokens, thinking included")
    max_tries: int = flag(3, "how often a reply that cannot be parsed is asked for, the first time included")
    enable_thinking: bool | None = flag(None, "true or false, for the chat template (in process: false unless given)")
    chat_template_kwargs: str | None = flag(None, "more arguments for the chat template, as a JSON object")

    max_model_len: int | None = flag(None, "context in tokens; the model's own unless given")
    dtype: str = flag("auto", "in process: auto, bfloat16, float16, float32")
    tensor_parallel_size: int = flag(1, "in process: GPUs the model is spread over")
    gpu_memory_utilization: float = flag(0.9, "in process: share of the GPU's memory to take")
    enforce_eager: bool = flag(False, "in process: no CUDA graphs; starts sooner, decodes slower")
    max_num_seqs: int | None = flag(None, "in process: sequences decoded at once; vLLM's own unless given")
    trust_remote_code: bool = flag(False, "let the model's repository run its own Python code on this machine")
    max_concurrency: int = flag(64, "server: requests in flight at once")
    timeout: float = flag(600.0, "server: seconds until a request is given up and tried again")
    max_retries: int = flag(5, "server: how often the client repeats a request that failed")

    root: Path | None = field(default=None, init=False)
    """The repository root, which the paths in the default configuration are relative to."""

    INPUT_FIELDS: ClassVar[tuple[str, ...]] = ("input",)
    """Fields that name data (a path or a list of paths): their content counts for the identity, not their names."""
    PROMPT_FIELDS: ClassVar[tuple[str, ...]] = ("prompt_file",)
    """Fields that name prompt files: likewise."""
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        "output base_url limit overwrite retry_failed max_failure_rate dry_run root tensor_parallel_size trust_remote_code "
        "gpu_memory_utilization enforce_eager max_num_seqs max_concurrency timeout max_retries".split()
    )
    """Fields that may differ when a run goes on: they change how fast or where, not what comes out."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens)

    @property
    def template_kwargs(self) -> dict:
        """Arguments for the chat template. In process, thinking is off unless asked for; a server is sent only what was given."""
        kwargs = {} if self.base_url else {"enable_thinking": False}
        if self.chat_template_kwargs:
            try:
                kwargs |= json.loads(self.chat_template_kwargs)
            except (ValueError, TypeError) as fault:
                raise InputError(f"--chat_template_kwargs must be a JSON object: {fault}") from fault
        return kwargs if self.enable_thinking is None else {**kwargs, "enable_thinking": self.enable_thinking}

    def validate(self) -> None:
        """Raises InputError for a value that cannot work, before anything is read or loaded."""
        for name in ("input", "output", "model"):
            if not getattr(self, name):
                raise InputError(f"--{name} is needed")
        ranges = {
            "temperature": (0, None),
            "top_p": (1e-9, 1),
            "top_k": (-1, None),
            "max_tokens": (1, None),
            "max_tries": (1, None),
            "max_failure_rate": (0, 1),
            "limit": (1, None),
            "seed": (0, None),
            "max_concurrency": (1, None),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                raise InputError(f"--{name} {value} is out of range (from {low:g}{'' if high is None else f' to {high}'})")
        sources = {os.path.realpath(name) for kind in (self.INPUT_FIELDS, self.PROMPT_FIELDS) for name in self._named(kind)}
        for suffix in ("", ".filtered.jsonl", ".failed.jsonl", ".manifest.json"):
            if os.path.realpath(self.output + suffix) in sources:
                raise InputError(f"--output {self.output} would write over an input ({self.output + suffix})")
        for name in self._named((*self.INPUT_FIELDS, *self.PROMPT_FIELDS, "model")):
            self._check_place(name)

    def _check_place(self, name: str) -> None:
        """Say from where to run, when a relative path is there from the repository root and not from here."""
        if self.root and not Path(name).exists() and (self.root / name).exists() and Path.cwd() != self.root:
            raise InputError(f"{name} does not exist from {Path.cwd()}; run this command from {self.root}")

    def _named(self, fields: Iterable[str]) -> list[str]:
        """The non-empty names in these fields; a field may hold one or a list."""
        values = [getattr(self, name) for name in fields]
        return [name for value in values for name in (value if isinstance(value, list) else [value]) if name]

    def identity(self, stage: str) -> dict:
        """All that decides what the stage writes. Reads the inputs once; raises InputError where one is missing."""
        apart = {"model", "seed", *self.INPUT_FIELDS, *self.PROMPT_FIELDS, *self.NOT_IDENTITY}
        sampling = dataclasses.asdict(self.sampling)
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in {*apart, *sampling}}
        return {
            "stage": stage,
            "model": self.model,
            "model_files": model_fingerprint(self.model),
            "sampling": sampling,
            "seed": self.seed,
            "prompts": {name: [hash_file(path) for path in self._named((name,))] for name in self.PROMPT_FIELDS},
            "inputs": {name: [survey(source)[1] for source in self._named((name,))] for name in self.INPUT_FIELDS},
            "options": options,
        }


Arguments = TypeVar("Arguments", bound=StageArguments)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the script's docstring and shows defaults."""


class _Parser(TrlParser):
    source = ""
    """The configuration file, while its values are being parsed."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {self.source}{message} (--help lists all arguments)\n")


def parse_stage_args(
    cls: type[Arguments], default_config: Path, description: str | None = None, argv: list[str] | None = None
) -> Arguments:
    """Values from `--config file.yaml` (the stage's example where none is given), overridden by the command line.

    The file holds one `name: value` a line, names as in --help, lists and (for JSON arguments) mappings as YAML writes them, and, as
    TRL has it, `env:` with environment variables to set. An unknown key or a wrong value ends the command (exit code 2) and names file and key.
    """
    parser = _Parser((cls,), description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", default=os.path.relpath(default_config), help="YAML file with values for these arguments")
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_known_args(argv)[0].config
    parser.source = f"{config}: "
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    config_argv = _config_argv(config, names, parser)
    parser.parse_args(config_argv)  # only to have a wrong value reported with the file it stands in
    parser.source = ""
    args = parser.parse_args_into_dataclasses([*config_argv, *argv], look_for_args_file=False)[0]
    args.root = default_config.resolve().parents[2]  # <root>/<stage>/configs/example.yaml
    return args


def _config_argv(path: str, names: list[str], parser: _Parser) -> list[str]:
    """A configuration file as command-line arguments, so that both are checked alike. `null` leaves the default."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        parser.error(f"cannot be read: {fault}")
    if not isinstance(config, dict):
        parser.error("must be a mapping of names to values")
    for name, value in (config.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    argv = []
    for name, value in config.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            parser.error(f"unknown key `{name}`" + (f", did you mean `{near[0]}`?" if near else ""))
        if isinstance(value, list):
            argv += [f"--{name}", *(str(item) for item in value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def make_engine(args: StageArguments) -> TeacherEngine:
    """The engine the arguments ask for; imports no more than it needs. Raises EngineDead."""
    if args.base_url:
        from distiller.openai_engine import OpenAIEngine

        return OpenAIEngine(
            args.model,
            args.sampling,
            args.base_url,
            max_concurrency=args.max_concurrency,
            chat_template_kwargs=args.template_kwargs,
            timeout=args.timeout,
            max_retries=args.max_retries,
        )
    from distiller.vllm_engine import VLLMEngine

    return VLLMEngine(
        args.model,
        args.sampling,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
        chat_template_kwargs=args.template_kwargs,
        trust_remote_code=args.trust_remote_code,
        max_num_seqs=args.max_num_seqs,
    )


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came. Not an Exception, so that nothing on the way takes it for an error of its own."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises Stopped (rows on disk are whole whenever it comes); a second one kills."""

    def stop(signum: int, frame: object) -> None:
        for name in before:
            signal.signal(name, signal.SIG_DFL)
        raise Stopped(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(
    args: StageArguments,
    make_work: Callable[[StageArguments], Work],
    *,
    stage: str,
    required: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    rows: Callable[[], list[dict | BadRow]] | None = None,
    preview: Preview | None = None,
    input_from: str = "",
) -> int:
    """Run a stage from its arguments; returns the exit code, everything there is to say printed.

    `make_work(args)` builds the stage's work (it may raise PromptError or InputError). `required` and `optional` fields are those of
    `read_rows`: required ones map to the command that makes them. `rows` replaces the reading of `--input` for a stage that joins
    several files (name them in INPUT_FIELDS). `preview` gives --dry_run all conversations of a row instead of the first one.
    `input_from` is the command that makes the input file, said when there is none.
    """
    try:
        with stop_signals():
            return _run(args, make_work, stage, required or {}, optional, rows, preview, input_from)
    except (InputError, PromptError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    except (EngineDead, OSError) as fault:
        print(f"the teacher engine or the disk gave up: {fault}", file=sys.stderr)
        code = 2
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.signum).name}", file=sys.stderr)
        code = 128 + stopped.signum
    print(f"Finished rows are on disk. To go on, run: {resume_command(args)}", file=sys.stderr)
    return code


def _run(args, make_work, stage, required, optional, rows, preview, input_from) -> int:
    args.validate()
    if args.trust_remote_code:
        print(f"warning: --trust_remote_code runs Python code of {args.model} on this machine", file=sys.stderr)
    for name in args._named(args.INPUT_FIELDS):
        if input_from and Path(name).suffix in (".json", ".jsonl") and not Path(name).exists():
            raise InputError(f"{name} does not exist; to make it, run: {input_from}")
    work = make_work(args)
    if rows:
        source = rows()
        total = len(source)
    else:
        source = read_rows(args.input, parse_columns(args.columns), args.limit, required=required, optional=optional)
        total = min(survey(args.input)[0], args.limit or sys.maxsize)
    if args.dry_run:
        count_tokens, how = token_counter(args)
        dry_run(source, preview or first_ask(work), count_tokens, args.max_tokens, how)
        return 0
    next(iter(source), None)  # a file that does not fit is refused before the output is touched
    manifest = Manifest(args.identity(stage), {**made_with(), "base_url": _without_secrets(args.base_url)})
    summary = run_stage(
        source,
        work,
        lambda: make_engine(args),
        args.output,
        manifest,
        total=total,
        max_failure_rate=args.max_failure_rate,
        overwrite=args.overwrite,
        retry_failed=args.retry_failed,
    )
    print(summary, file=sys.stderr)
    return summary.exit_code


def token_counter(args: StageArguments) -> tuple[Callable[[list[dict]], int], str]:
    """(tokens of a conversation, how they are counted), by the teacher's tokenizer; for a server without a tokenizer here by length."""
    from transformers import AutoTokenizer  # some seconds, and only --dry_run needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.model, trust_remote_code=args.trust_remote_code, local_files_only=bool(args.base_url)
        )
    except (OSError, ValueError) as fault:
        if not args.base_url:
            raise InputError(f"the tokenizer of {args.model} cannot be loaded: {fault}") from fault
        return (lambda messages: sum(len(m["content"]) for m in messages) // 4), "at 4 characters a token: no tokenizer here"

    def count(messages: list[dict]) -> int:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **args.template_kwargs
        )
        return len(tokens["input_ids"])

    return count, "by the teacher's own tokenizer"


def resume_command(args: StageArguments) -> str:
    """The command as it was given, without what would undo or repeat work."""
    undo = [word for name in ("overwrite", "retry_failed") if getattr(args, name) for word in (f"--{name}", "false")]
    return shlex.join(["python", *sys.argv, *undo])


def _without_secrets(url: str | None) -> str | None:
    """Scheme, host and path: a user, a password or a key in the query stay out of the manifest."""
    if not url:
        return None
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
