"""The teacher behind an OpenAI-compatible server (`--base_url`): a hosted API, or a fleet of `vllm serve`.

The `openai` client runs in an event loop in a thread of its own; `submit` hands it an ask, `collect` takes what has
come back. Retries of 408, 409, 429, 5xx, timeouts and broken connections are the client's own (exponential,
Retry-After obeyed). What is left after them falls into two kinds, and the difference matters: an ask that failed is
written to the failed file and left alone by a rerun; a server that failed must end the command with nothing written,
so that a rerun picks up where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from concurrent.futures import Future
from importlib import metadata

import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

from distiller.chat import check_messages, split_thinking
from distiller.engine import Ask, AskError, Completion, EngineDead, Sampling

CONNECT_SECONDS = 5.0  # a machine that is off must be found out within a minute, all retries included
PROBE_SECONDS = 10.0  # how long a server that failed an ask gets to answer anything at all


class OpenAIEngine:
    """A `TeacherEngine` on an OpenAI-compatible server. The key is read from OPENAI_API_KEY ("EMPTY" without one).

    base_url: with its `/v1`. max_concurrency: requests in flight at once. timeout: seconds for one try. max_retries:
    tries after the first. chat_template_kwargs: for vLLM and SGLang servers; it and `top_k` are sent only where set,
    because a hosted API refuses fields it does not know. Raises EngineDead for a base_url that is no address.
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
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise EngineDead(f"--base_url {base_url!r} must start with http:// or https:// (and usually end with /v1)")
        self.model = model
        self.sampling = sampling
        self.base_url = base_url
        self.capacity = max_concurrency
        self.template_kwargs = dict(chat_template_kwargs or {})
        self.extra_body: dict = {}
        if sampling.top_k > 0:
            self.extra_body["top_k"] = sampling.top_k
        if self.template_kwargs:
            self.extra_body["chat_template_kwargs"] = self.template_kwargs
        # Hosted reasoning models refuse `max_tokens`, some local servers know no other: the first refusal switches.
        self._length_field = "max_tokens"
        self._finished: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._in_flight = 0
        self._dead: EngineDead | None = None
        self._slots = asyncio.Semaphore(max_concurrency)
        self._client = openai.AsyncOpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",
            base_url=base_url,
            timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS),
            max_retries=max_retries,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()

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
                self._dead = error
        if self._dead and not results:
            raise self._dead
        return results

    async def _answer(self, ask: Ask) -> Completion | AskError:
        """The answer, or the reason why this ask has none. Raises EngineDead where no ask can be answered."""
        try:
            check_messages(ask.messages)
            async with self._slots:
                return _completion(await self._request(ask))
        except AskError as refusal:
            return refusal
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EngineDead(
                f"{self.base_url} refused the credentials (HTTP {error.status_code}): {error.message}. "
                "Check OPENAI_API_KEY"
            ) from error
        except openai.NotFoundError as error:
            raise EngineDead(
                f"{self.base_url} answered HTTP 404: {error.message}. "
                f"Check --base_url (it usually ends with /v1) and --model {self.model}; {await self._served_models()}"
            ) from error
        except openai.APIStatusError as error:
            return AskError(f"HTTP {error.status_code} from the server: {error.message}")
        except openai.APIConnectionError as error:
            if not await self._reachable():
                raise EngineDead(
                    f"{self.base_url} cannot be reached after {self._client.max_retries} retries ({error.message}). "
                    "Check that the server runs; the same command then goes on where this one stopped"
                ) from error
            return AskError(f"no answer after {self._client.max_retries} retries: {error.message}")
        except (openai.APIError, json.JSONDecodeError) as error:
            return AskError(f"the server's answer cannot be read: {error}")

    async def _request(self, ask: Ask) -> ChatCompletion:
        field = self._length_field
        try:
            return await self._client.chat.completions.create(
                model=self.model,
                messages=ask.messages,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=ask.seed,
                extra_body=self.extra_body or None,
                **{field: self.sampling.max_tokens},
            )
        except openai.BadRequestError as error:
            if field != "max_tokens" or "max_completion_tokens" not in error.message:
                raise
        self._length_field = "max_completion_tokens"
        return await self._request(ask)

    async def _reachable(self) -> bool:
        """Whether the server answers anything, an error included."""
        try:
            await self._client.with_options(max_retries=0, timeout=PROBE_SECONDS).models.list()
        except openai.APIStatusError:
            return True
        except openai.APIConnectionError:
            return False
        return True

    async def _served_models(self) -> str:
        try:
            page = await self._client.with_options(max_retries=0, timeout=PROBE_SECONDS).models.list()
        except openai.APIError:
            return "it lists no models"
        return f"it serves {', '.join(model.id for model in page.data[:10]) or 'no model'}"

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


def _completion(response: ChatCompletion) -> Completion | AskError:
    """The server's answer as ours; token counts are 0 where the server sends none.

    What is not there is an AskError, never an empty or invented text. The client validates nothing (a web page comes
    through as a str, a field of another type as that type), so everything used is checked here.
    """
    if not isinstance(response, ChatCompletion):
        return AskError("the server answered with something that is no chat completion. Check --base_url")
    choice = response.choices[0] if isinstance(response.choices, list) and response.choices else None
    if not isinstance(choice, Choice) or not isinstance(choice.message, ChatCompletionMessage):
        return AskError("the server's answer holds no message")
    extra = choice.message.model_extra or {}
    thinking = extra.get("reasoning_content") or extra.get("reasoning") or None
    refusal = f": {choice.message.refusal}" if choice.message.refusal else ""
    if choice.finish_reason not in ("stop", "length"):
        return AskError(f"the server ended the reply with finish_reason {choice.finish_reason!r}{refusal}")
    text = choice.message.content
    if text is None:
        # A server with a reasoning parser has no content for a reply cut inside its thinking: an empty answer.
        if not (thinking and choice.finish_reason == "length"):
            return AskError(f"the server's message has no content{refusal}")
        text = ""
    if not isinstance(text, str):
        return AskError(f"the server's message content is a {type(text).__name__}, not a text")
    if thinking is None:
        text, thinking = split_thinking(text, opened=None)
    usage = response.usage if isinstance(response.usage, CompletionUsage) else None
    return Completion(
        text=text,
        reasoning=thinking,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        logprobs=None,
    )
