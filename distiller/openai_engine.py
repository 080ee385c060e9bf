"""The teacher behind an OpenAI-compatible server (`--base_url`): a hosted API, or a fleet of `vllm serve`.

The `openai` client runs in an event loop in a thread of its own; `submit` hands it an ask, `collect` takes what has
come back. Retries of 408, 409, 429, 5xx, time-outs and broken connections are the client's own (exponential,
Retry-After obeyed). What is left after them falls into two kinds, and the difference matters: an ask that failed is
written to the failed file and left alone by a rerun; a server that failed must end the command with nothing written,
so that a rerun picks up where it stopped. Where the status does not tell, the server is asked something tiny: if it
meets the same fate, the server is at fault, else the ask.

An error in the body of an answer of status 200 has the status that it stands for (`openai_faults.py`).

| what comes back                    | what happens                                                            |
|------------------------------------|-------------------------------------------------------------------------|
| 401, 402, 404                      | the command ends                                                        |
| 400, 403, 413, 422                 | the ask failed; the command ends where a tiny ask is refused as well    |
| 408, 409, 429, 5xx, cut connection | retried; then asked again, or the command ends where a tiny ask fails   |
| time-out                           | retried; then the ask failed, or the command ends where a tiny ask does |
| no answer in the reply             | asked again                                                             |
| content filter, refusal            | the ask failed                                                          |

What is asked again has failed after `TRIES` times.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib import metadata

import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.completion_usage import PromptTokensDetails

from distiller.chat import ThinkingMarks, check_messages, thinking_marks
from distiller.engine import Ask, AskError, Completion, EngineDead, EngineNotStarted, Sampling
from distiller.openai_choices import weigh
from distiller.openai_client import cause_of, make_client
from distiller.openai_faults import is_no_json, said, secrets_of, shown_url, without_secrets
from distiller.usage import Usage

LIST_SECONDS = 10.0  # how long a server gets to list its models
TRIES = 3
RETRIED = (408, 409, 429)  # by the client, as 5xx
FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "end", "complete", "completed"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "safety"), "content_filter"),
}
"""As servers write them, in lower case, and OpenAI's own word for the same."""
TINY = [{"role": "user", "content": "Say yes."}]
TINY_TOKENS = 16
MOST_TOKENS = 1 << 31  # of one reply: a server that says more than this does not count tokens
TINY_RETRIES = 4  # a server that fails one request in five must not be taken for one that fails them all


class _Passing(AskError):
    """A fault that may be gone when the same is asked again."""


class OpenAIEngine:
    """A `TeacherEngine` on an OpenAI-compatible server (address and key: `openai_client.py`).

    base_url: with its `/v1`. max_concurrency: requests in flight at once. timeout: seconds for one whole try.
    max_retries: tries after the first. chat_template_kwargs: for vLLM and SGLang servers; it and `top_k` are sent only
    where set, because a hosted API refuses fields it does not know. leave_out: of temperature, top_p and seed, what is
    not sent. A temperature or top_p of 1, which is what every API takes without the field (but vLLM, which takes the
    model's own), is left out once the server has refused it. Raises EngineNotStarted for an address, a key or an
    environment that no request can be made with.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        base_url: str,
        *,
        max_concurrency: int = 64,
        chat_template_kwargs: dict | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
        leave_out: Sequence[str] = (),
        thinking_tags: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.base_url = shown_url(base_url)
        self._secrets = secrets_of(base_url)
        self.capacity = max_concurrency
        self._timeout = timeout
        self.template_kwargs = dict(chat_template_kwargs or {})
        # Hosted reasoning models refuse `max_tokens`, some local servers know no other: the first refusal switches.
        self._length_field = "max_tokens"
        self._left_out = set(leave_out)
        self._marks = thinking_marks(tuple(thinking_tags))
        self._finished: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._in_flight = 0
        self._answered = False  # any ask yet, so that the server is known to take the fields we send
        self._dead: EngineDead | None = None
        self._slots = asyncio.Semaphore(max_concurrency)  # one a request: an ask with choices makes several
        self._client = make_client(base_url, timeout, max_retries)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Ask something tiny, its answer thrown away. Raises EngineNotStarted where the server does not answer it."""
        try:
            answer = asyncio.run_coroutine_threadsafe(self._answer(Ask(TINY, 0)), self._loop).result()
            if isinstance(answer, AskError):
                raise EngineDead(f"{self.base_url} does not answer so much as {TINY[0]['content']!r}: {answer}")
        except EngineDead as error:
            self.close()
            raise EngineNotStarted(without_secrets(str(error), self._secrets)) from error

    def submit(self, key: int, ask: Ask) -> None:
        """Queue one ask; at most `max_concurrency` are sent at once, the others wait. Raises EngineDead."""
        if self._dead:
            raise self._dead
        future = asyncio.run_coroutine_threadsafe(self._answer(ask), self._loop)
        self._in_flight += 1
        future.add_done_callback(lambda done: self._finished.put((key, done)))

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        """Wait for at least one answer, return all there are. [] where nothing is in flight. Raises EngineDead."""
        results = []
        # Answers that came before the server failed are returned first: they are paid for.
        while not self._finished.empty() or (self._in_flight and not results and not self._dead):
            key, future = self._finished.get()
            self._in_flight -= 1
            try:
                results.append((key, future.result()))
            except EngineDead as error:
                self._dead = EngineDead(without_secrets(str(error), self._secrets))
        if self._dead and not results:
            raise self._dead
        return results

    async def _answer(self, ask: Ask) -> Completion | AskError:
        """The answer, or the reason why this ask has none. Raises EngineDead where no ask can be answered."""
        try:
            check_messages(ask.messages)
        except AskError as refusal:
            return refusal
        usage = Usage()  # an answer that is of no use and asked for again is paid for all the same
        for _ in range(TRIES):
            answer = await self._ask_once(ask)
            usage.add(answer)
            if not isinstance(answer, _Passing):
                break
        if isinstance(answer, AskError):
            raw = answer.raw and without_secrets(answer.raw, self._secrets)
            return AskError(without_secrets(str(answer), self._secrets), **usage.tokens, raw=raw)
        return replace(answer, **usage.tokens)

    async def _ask_once(self, ask: Ask) -> Completion | AskError:
        """Ask, with the client's retries. Raises EngineDead."""
        try:
            if ask.choices:
                answer = await weigh(self._client, self._slots, self.model, ask, self.template_kwargs)
            else:
                answer = _completion(await self._request(ask), self._marks, ask.messages)
        except AskError as refusal:
            return refusal
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            return await self._ask_at_fault(error)
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return _Passing(f"the server's answer cannot be read: {error}")
        self._answered |= isinstance(answer, Completion)
        return answer

    async def _request(self, ask: Ask, max_retries: int | None = None) -> ChatCompletion:
        sampling = ask.sampling or self.sampling
        top_k = {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
        template = {"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}
        client = self._client if max_retries is None else self._client.with_options(max_retries=max_retries)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": ask.seed}
        async with self._slots:
            length_field, left_out = self._length_field, set(self._left_out)
            while True:
                try:
                    answer = await client.chat.completions.create(
                        model=self.model,
                        messages=ask.messages,
                        **{name: value for name, value in drawn.items() if name not in left_out},
                        extra_body={**top_k, **template} or None,
                        **{length_field: sampling.max_tokens},
                    )
                    break
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    named = {name for name in _fields_named(error) if drawn[name] == 1 and name != "seed"} - left_out
                    if length_field == "max_tokens" and "max_completion_tokens" in error.response.text:
                        length_field = "max_completion_tokens"
                    elif named:
                        left_out.add(max(named))  # top_p first: some take either, but not both
                    else:
                        raise
        # Only now is it known that this is what was refused, and not something else in this one request.
        self._length_field = length_field
        for name in sorted(left_out - self._left_out):
            print(f"note: the server refuses {name}, which is not sent any more", file=sys.stderr)
        self._left_out |= left_out
        return answer

    async def _ask_at_fault(self, error: openai.APIStatusError | openai.APIConnectionError) -> AskError:
        """The ask's failure, or EngineDead raised where the server is at fault."""
        refused = _refused(error)
        if isinstance(error, openai.APIStatusError):
            reason = f"HTTP {error.status_code} from the server: {said(error.response)}"
            if error.status_code in (401, 402, 404) or await self._fate_of_a_tiny_ask(error) is refused:
                raise EngineDead(await self._end_for(error)) from error
            return AskError(reason) if refused else _Passing(reason)
        if await self._fate_of_a_tiny_ask(error) is refused:
            raise EngineDead(await self._end_for(error)) from error
        why = error.message if isinstance(error, openai.APITimeoutError) else cause_of(error, self.base_url)
        reason = f"no answer {_retries(error)}: {why}"
        return AskError(reason) if isinstance(error, openai.APITimeoutError) else _Passing(reason)

    async def _fate_of_a_tiny_ask(self, error: openai.APIError) -> bool | None:
        """None: it is answered. True: the server refuses it. False: the server fails. `error` befell another ask."""
        # In full while the length may be what the server refuses. Not one token after that: some refuse that, too.
        length = min(self.sampling.max_tokens, TINY_TOKENS) if self._answered else self.sampling.max_tokens
        sampling = replace(self.sampling, max_tokens=length)
        # By name: which of its HTTP libraries the client uses is its own affair.
        unreachable = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
        try:
            await self._request(Ask(TINY, 0, sampling), max_retries=1 if unreachable else TINY_RETRIES)
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            return _refused(error)
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return None

    async def _end_for(self, error: openai.APIStatusError | openai.APIConnectionError) -> str:
        """What happened to the server and what to check, for the user."""
        retries = _retries(error)
        if isinstance(error, openai.APITimeoutError):
            return (
                f"{self.base_url} answers nothing within --timeout {self._timeout:g} seconds, {retries}. "
                "Check the server, raise --timeout, or lower --max_concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            why = cause_of(error, self.base_url)
            return f"{self.base_url} cannot be reached {retries} ({why}). Check that the server runs"
        words = f"HTTP {error.status_code}: {said(error.response)}"
        if (wait := error.response.headers.get("retry-after")) and not _retried(error):
            words += f"; it asks to wait, Retry-After: {wait[:40]}"
        match error.status_code:
            case 401 | 402 | 403:
                return f"{self.base_url} refused the credentials ({words}). Check OPENAI_API_KEY and the account"
            case 404:
                return (
                    f"{self.base_url} answered {words}. Check --base_url (it usually ends with /v1) and --model "
                    f"{self.model}; {await self._served_models()}"
                )
            case 429:
                return (
                    f"{self.base_url} takes no more requests {retries} ({words}). Lower --max_concurrency, or check "
                    "the account's limits"
                )
        if _refused(error):
            named = _fields_named(error) - self._left_out
            able = "It may not take top_k (--top_k -1 sends none), chat template arguments, or so large a --max_tokens"
            remedy = f"To send it no such field: --leave_out {' '.join(sorted(named))}" if named else able
            return f"{self.base_url} refuses every request ({words}). {remedy}"
        address = " and --base_url (it usually ends with /v1)" if is_no_json(error.response) else ""
        return f"{self.base_url} fails every request {retries} ({words}). Check the server{address}"

    async def _served_models(self) -> str:
        try:
            client = self._client.with_options(max_retries=0, timeout=LIST_SECONDS)
            page = await client.get("/models", cast_to=object)
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError):
            page = None
        models = page.get("data") if isinstance(page, dict) else None
        models = models if isinstance(models, list) else []
        names = [model["id"] for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]
        return f"it serves {', '.join(names[:10])}" if names else "it lists no models"

    def close(self) -> None:
        """Drop what is in flight and stop the thread. May be called again."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def facts(self) -> dict:
        """What the manifest keeps. The address is left out: a rerun may well find the same model at another one."""
        return {
            "engine": "openai",
            "model": self.model,
            "chat_template_kwargs": self.template_kwargs,
            "openai": metadata.version("openai"),
        }


def _refused(error: openai.APIStatusError | openai.APIConnectionError) -> bool:
    """Whether the server read the request and will not have it; otherwise it fails, or is not there."""
    status = error.status_code if isinstance(error, openai.APIStatusError) else 500
    return status < 500 and status not in RETRIED


def _retried(error: openai.APIStatusError | openai.APIConnectionError) -> int:
    """How often the client retried: never where the server forbids it, or asks to wait for longer than 120 s."""
    return int(error.request.headers.get("x-stainless-retry-count", 0))


def _retries(error: openai.APIStatusError | openai.APIConnectionError) -> str:
    return f"after {_retried(error)} retries"


def _fields_named(error: openai.APIStatusError) -> set[str]:
    """Which of the fields that can be left out the refusal speaks of."""
    return set(re.findall(r"\b(temperature|top_p|seed)\b", said(error.response)))


def _completion(response: ChatCompletion, marks: ThinkingMarks, messages: list[dict]) -> Completion | AskError:
    """The server's answer as ours; token counts are 0 where the server sends none.

    What is not there is an AskError, never an empty or invented text. The client validates nothing (a web page comes
    through as a str, a field of another type as that type), so everything used is checked here.
    """
    if not isinstance(response, ChatCompletion):
        return _Passing("the server answered with something that is no chat completion. Check --base_url")
    tokens = _tokens(response)
    choice = response.choices[0] if isinstance(response.choices, list) and response.choices else None
    if not isinstance(choice, Choice) or not isinstance(choice.message, ChatCompletionMessage):
        return _Passing("the server's answer holds no message", **tokens)
    extra = choice.message.model_extra or {}
    thinking = extra.get("reasoning_content") or extra.get("reasoning") or None
    text, of_parts = _of_parts(choice.message.content)
    thinking, raw = thinking or of_parts, text
    tokens["raw"] = text if isinstance(text, str) and text.strip() else thinking if isinstance(thinking, str) else None
    if text is not None and not isinstance(text, str):
        tokens["raw"] = json.dumps(text, ensure_ascii=False, default=str)
    refusal = f": {choice.message.refusal}" if choice.message.refusal else ""
    ended = FINISH_REASONS.get(str(choice.finish_reason).casefold())
    if ended not in ("stop", "length"):
        kind = AskError if refusal or ended == "content_filter" else _Passing
        return kind(f"the server ended the reply with finish_reason {choice.finish_reason!r}{refusal}", **tokens)
    if text is None:
        # A server with a reasoning parser has no content for a reply cut inside its thinking: an empty answer.
        if not (thinking and ended == "length"):
            kind = AskError if refusal else _Passing
            if thinking and not refusal:
                refusal = ", it is all thinking: switch that off (--enable_thinking false, or the server's own way)"
            return kind(f"the server's message has no content{refusal}", **tokens)
        text = ""
    if not isinstance(text, str):
        return _Passing(f"the server's message content is a {type(text).__name__}, not a text", **tokens)
    del tokens["raw"]
    prefix = None
    if thinking is None:
        text, thinking = marks.split(text, None, messages=messages, cut=ended == "length")
        if text == raw and ended == "length":
            # The chat template may have opened a thinking that was cut before its end: no answer can be told from it.
            text, thinking = "", raw or None
        prefix = raw[: len(raw) - len(text)]
    kept = {"finish_reason": ended, "choice_logprobs": None, "prefix": prefix}
    return Completion(text=text, reasoning=thinking, **kept, **tokens)


def _of_parts(content: object) -> tuple[object, str | None]:
    """(a message's content, its thinking); of parts that are all text or thinking the text of either."""
    if not isinstance(content, list) or not content:
        return content, None
    texts = {"text": "", "thinking": ""}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        name = "text" if kind in ("text", "output_text") else "thinking"
        said = part.get(kind, part.get("text")) if kind in ("text", "output_text", "thinking", "reasoning") else None
        if isinstance(said, list):  # in parts of its own
            said = _of_parts(said)[0]
        if not isinstance(said, str):
            return content, None
        texts[name] += said
    return texts["text"], texts["thinking"] or None


def _tokens(response: ChatCompletion) -> dict[str, int | None]:
    """The tokens of an answer; 0 (and None for cached ones) where the server does not say."""
    usage = response.usage if isinstance(response.usage, CompletionUsage) else CompletionUsage.model_construct()
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if isinstance(details, PromptTokensDetails) else None
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    counts = {name: count if _is_count(count) else 0 for name, count in counts.items()}
    return {**counts, "cached_tokens": cached if _is_count(cached) else None}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < MOST_TOKENS
