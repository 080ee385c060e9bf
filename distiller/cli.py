"""The one `run` behind every entry script of a teacher stage.

    @dataclass
    class RefineArguments(StageArguments):
        min_edit_similarity: float = flag(0.3, "...")

    if __name__ == "__main__":
        args = parse_stage_args(RefineArguments, Path(__file__).parent / "configs" / "example.yaml", __doc__)
        sys.exit(run(args, make_work, stage="refine", required={"prompt": "", "rejected": ""}))

Exit codes: 0 done; 1 refused, or too many rows failed; 2 the engine or the disk gave up (or the arguments are wrong);
3 stopped at --max_tokens_total; 129, 130 and 143 stopped by SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

from jinja2 import TemplateError

from distiller.arguments import StageArguments, flag, parse_stage_args
from distiller.dry_run import CountTokens, Preview, dry_run, first_ask
from distiller.engine import EngineDead, EngineNotStarted, TeacherEngine
from distiller.manifest import Manifest, made_with
from distiller.openai_faults import shown_url
from distiller.records import BadRow, InputError, parse_columns, read_rows, survey
from distiller.runner import Work, run_stage
from distiller.store import LineFile
from distiller.streams import patient_streams
from distiller.templates import PromptError
from distiller.tokens import with_fixed_date
from distiller.usage import Usage

__all__ = [
    "StageArguments",
    "check_made",
    "exit_code_of",
    "flag",
    "make_engine",
    "parse_stage_args",
    "resume_command",
    "run",
    "stop_signals",
]


def make_engine(args: StageArguments) -> TeacherEngine:
    """The engine the arguments ask for; imports no more than it needs. Raises EngineDead."""
    if args.base_url:
        from distiller.openai_engine import OpenAIEngine

        engine = OpenAIEngine(
            args.model,
            args.sampling,
            args.base_url,
            max_concurrency=args.max_concurrency,
            chat_template_kwargs=args.template_kwargs,
            timeout=args.timeout,
            max_retries=args.max_retries,
            leave_out=args.leave_out or (),
            thinking_tags=args.thinking_tags or (),
        )
        if args.retry_failed:  # failed rows go next, but not for a server that cannot make new ones
            engine.check()
        return engine
    options = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "max_model_len": args.max_model_len,
        "dtype": args.dtype,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.enforce_eager,
        "chat_template_kwargs": args.template_kwargs,
        "trust_remote_code": args.trust_remote_code,
        "max_num_seqs": args.max_num_seqs,
        "thinking_tags": args.thinking_tags or (),
    }
    if args.num_engines:
        from distiller.ray_engine import RayEngine

        return RayEngine(args.model, args.sampling, num_engines=args.num_engines, **options)
    from distiller.vllm_engine import VLLMEngine

    return VLLMEngine(args.model, args.sampling, **options)


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came. Not an Exception, so that nothing on the way takes it for its own error."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises Stopped (rows on disk are whole whenever it comes); a second
    one kills. SIGHUP, which a closed terminal sends, is left alone where it is ignored: under nohup."""

    def stop(signum: int, frame: object) -> None:
        for name in before:
            signal.signal(name, signal.SIG_DFL)
        raise Stopped(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
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
    ranges: Mapping[str, tuple[float, float]] | None = None,
    rows: Callable[[], list[dict | BadRow]] | None = None,
    preview: Preview | None = None,
    input_from: str = "",
    engine: Callable[[StageArguments], TeacherEngine] | None = None,
    open_done: Callable[[Path], LineFile] = LineFile,
    report: Callable[[], object] | None = None,
) -> int:
    """Run a stage from its arguments; returns the exit code, everything there is to say printed.

    `make_work(args)` builds the stage's work (it may raise PromptError or InputError). `required`, `optional` and
    `ranges` are those of `read_rows`: required fields map to the command that makes them. `rows` replaces the reading
    of `--input` for a stage that joins several files (name them in INPUT_FIELDS). `preview` gives --dry_run all
    conversations of a row instead of the first one. `input_from` is the command that makes the input file, said when
    there is none. For a stage that asks and writes in ways of its own: `engine(args)` in place of `make_engine`, and
    `open_done` of `store.Store`. `report()` says more about the finished files, printed at the end, also where too
    many rows failed.
    """
    reading = {"required": required, "optional": optional, "ranges": ranges}
    begun = []  # what a rerun with the same flags would undo or repeat

    def body() -> int:
        start = partial(engine or make_engine, args)
        return _run(args, make_work, stage, reading, rows, preview, input_from, start, open_done, report, begun)

    def rest() -> str:
        if not Path(args.output).exists():
            state = "No row was finished"
        elif args.overwrite and not begun:
            state = "The earlier rows are as they were"
        else:
            state = "Finished rows are on disk"
        return f"{state}. To go on, run: {resume_command(args, bool(begun))}"

    return exit_code_of(body, rest)


@patient_streams()
def exit_code_of(body: Callable[[], int], rest: Callable[[], str]) -> int:
    """The exit code of `body`. What ended it early is printed, and then `rest()`, which says what is left to do."""
    try:
        with stop_signals():
            return body()
    except (InputError, PromptError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    except EngineNotStarted as fault:
        print(f"the teacher engine did not start: {fault}", file=sys.stderr)
        code = 2
    except EngineDead as fault:
        print(f"the teacher engine gave up: {fault}", file=sys.stderr)
        code = 2
    except OSError as fault:  # a full disk, a directory that may not be written
        print(f"error: {fault}", file=sys.stderr)
        code = 2
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.signum).name}", file=sys.stderr)
        code = 128 + stopped.signum
    print(rest(), file=sys.stderr)
    return code


def _run(args, make_work, stage, reading, rows, preview, input_from, make_engine, open_done, report, begun) -> int:
    args.validate()
    if args.trust_remote_code:
        print(f"warning: --trust_remote_code runs Python code of {args.model} on this machine", file=sys.stderr)
    check_made(args.named(*args.INPUT_FIELDS), input_from)
    work = make_work(args)
    source = rows() if rows else read_rows(args.input, parse_columns(args.columns), args.limit, **reading)
    next(iter(source), None)  # a file that does not fit is refused before anything is loaded or touched
    if args.dry_run:
        count_tokens, how = token_counter(args)
        dry_run(
            source,
            preview or first_ask(work),
            count_tokens,
            args.longest_reply,
            how,
            args.seed,
            args.price_per_million,
        )
        return 0
    surveys = {name: survey(name) for name in args.named(*args.INPUT_FIELDS)}  # (rows, hash) of each input
    total = len(source) if rows else min(surveys[args.input][0], args.limit or sys.maxsize)
    identity = args.identity(stage, {name: digest for name, (_, digest) in surveys.items()})
    made = {**made_with(), "base_url": shown_url(args.base_url) if args.base_url else None}
    manifest = Manifest(identity, made, usage=Usage(price_per_million=args.price_per_million))
    summary = run_stage(
        source,
        work,
        make_engine,
        args.output,
        manifest,
        total=total,
        max_failure_rate=args.max_failure_rate,
        overwrite=args.overwrite,
        retry_failed=args.retry_failed,
        open_done=open_done,
        max_tokens_total=args.max_tokens_total,
        on_begun=lambda: begun.append(True),
    )
    print(summary, file=sys.stderr)
    if report and not summary.waiting and (said := str(report())):
        print(said, file=sys.stderr)
    return summary.exit_code


def check_made(names: list[str], command: str) -> None:
    """Raises InputError naming the command that makes a file that is not there."""
    for name in names if command else ():
        if Path(name).suffix in (".json", ".jsonl") and not Path(name).exists():
            raise InputError(f"{name} does not exist; to make it, run: {command}")


def token_counter(args: StageArguments) -> tuple[CountTokens, str]:
    """(what counts the tokens of conversations, how it does), by the teacher's tokenizer; for a server without a
    tokenizer here by length."""
    from transformers import AutoTokenizer  # some seconds, and only --dry_run needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.model, trust_remote_code=args.trust_remote_code, local_files_only=bool(args.base_url)
        )
        with_fixed_date(tokenizer).get_chat_template()  # ValueError without one
    except (OSError, ValueError) as fault:
        if not args.base_url:
            raise InputError(f"the tokenizer of {args.model} cannot be loaded: {fault}") from fault
        return (
            lambda conversations: [sum(len(m["content"]) for m in messages) // 4 for messages in conversations]
        ), "at 4 characters a token: no tokenizer here"

    def render(messages: list[dict]) -> str | None:
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **args.template_kwargs
            )
        except TemplateError:
            return None

    def count(conversations: list[list[dict]]) -> list[int | None]:
        texts = [render(messages) for messages in conversations]
        # All at once, which takes every core; the template writes special tokens itself.
        ids = iter(tokenizer([text or "" for text in texts], add_special_tokens=False)["input_ids"] if texts else [])
        return [None if text is None else len(tokens) for text, tokens in zip(texts, ids, strict=True)]

    return count, "by the teacher's own tokenizer"


def resume_command(args: StageArguments, begun: bool) -> str:
    """The command as it was given, but for what is secret in an address; where its work has `begun`, without what
    would undo or repeat it. A shell script in front of it names itself in RM_DISTILLER_COMMAND."""
    done = [name for name in ("overwrite", "retry_failed") if begun and getattr(args, name)]
    undo = [word for name in done for word in (f"--{name}", "false")]
    script = os.environ.get("RM_DISTILLER_COMMAND")
    command = ["bash", script] if script else ["python", sys.argv[0]]
    given = [_shown(word, before) for before, word in pairwise(["", *sys.argv[1:]])]
    return shlex.join([*command, *given, *undo])


def _shown(word: str, before: str) -> str:
    """A word of the command line, without what is secret in it where it is an address."""
    flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
    address = flag in ("--base_url", "--base-url") or "://" in value
    return (f"{flag}=" if equals == "=" else "") + shown_url(value) if address and value else word
