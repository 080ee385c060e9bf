"""An ask with choices (`engine.Choices`) behind a server: what only a vLLM server can do, and how to notice that
another one cannot.

    /tokenize         beside /v1, gives the ids of the conversation and of the readings
    /v1/completions   takes token ids, one request a node of the tree, with vLLM's `logprob_token_ids`

A server that lacks either, or answers with anything but the log-probabilities asked for, ends the command with the
way out. It is never read as if it had said something.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

import openai

from distiller.choices import ANCHORS, ChoiceTree, Node, anchored, reading_texts, without_anchor
from distiller.engine import Ask, Completion, EngineDead
from distiller.openai_faults import is_no_json, shown_url

NOT_THERE = (404, 405, 501)


async def weigh(
    client: openai.AsyncOpenAI, slots: asyncio.Semaphore, model: str, ask: Ask, template_kwargs: dict
) -> Completion:
    """The log-probability of each of the ask's choices. A request takes one of the `slots` while it is in flight.

    Raises EngineDead where the server cannot say, AskError, and what the client raises for a request that failed.
    """
    chat = {"messages": ask.messages, "add_generation_prompt": True}
    if template_kwargs:
        chat["chat_template_kwargs"] = template_kwargs
    prompt = await _tokenize(client, slots, {"model": model, **chat})
    tree = ChoiceTree(ask.choices, await _continuations(client, slots, model, reading_texts(ask.choices)))
    context = prompt + tree.context
    requests = [_next_token(client, slots, model, [*context, *node], wanted) for node, wanted in tree.nodes.items()]
    answers: dict[Node, dict[int, float]] = dict(zip(tree.nodes, await asyncio.gather(*requests), strict=True))
    return Completion(
        text="",
        reasoning=None,
        finish_reason="stop",
        prompt_tokens=sum(len(context) + len(node) for node in tree.nodes),
        completion_tokens=len(tree.nodes),
        choice_logprobs=tree.logprobs(answers),
        prefix=None,
    )


async def _continuations(
    client: openai.AsyncOpenAI, slots: asyncio.Semaphore, model: str, texts: list[str]
) -> list[list[int]]:
    """The ids of texts that go on in a conversation."""

    async def tokenized(texts: list[str]) -> list[list[int]]:
        bodies = ({"model": model, "prompt": text, "add_special_tokens": False} for text in texts)
        return await asyncio.gather(*(_tokenize(client, slots, body) for body in bodies))

    for anchor in ANCHORS:
        if readings := without_anchor(await tokenized(anchored(anchor, texts))):
            return readings
    return await tokenized(texts)


async def _tokenize(client: openai.AsyncOpenAI, slots: asyncio.Semaphore, body: dict) -> list[int]:
    """The ids of a text or of a conversation."""
    address = str(client.base_url).rstrip("/").removesuffix("/v1") + "/tokenize"
    try:
        async with slots:
            answer = await client.post(address, body=body, cast_to=object)
    except openai.APIStatusError as error:
        if error.status_code in NOT_THERE or is_no_json(error.response):
            _cannot(client, f"HTTP {error.status_code} from {shown_url(address)}")
        raise
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        _cannot(client, f"{shown_url(address)} gives no token ids")
    return tokens


async def _next_token(
    client: openai.AsyncOpenAI, slots: asyncio.Semaphore, model: str, prompt: list[int], wanted: list[int]
) -> dict[int, float]:
    """Log-probability of each wanted id as the token after the prompt."""
    try:
        async with slots:
            answer = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=1,
                temperature=0.0,
                logprobs=len(wanted),
                extra_body={"logprob_token_ids": wanted, "return_tokens_as_token_ids": True},
            )
    except openai.APIStatusError as error:
        if error.status_code in NOT_THERE or is_no_json(error.response):
            _cannot(client, f"HTTP {error.status_code} from /completions")
        raise
    said = answer.model_dump() if isinstance(answer, openai.types.Completion) else {}
    try:
        (values,) = said["choices"][0]["logprobs"]["top_logprobs"]
        return {token: float(values[f"token_id:{token}"]) for token in wanted}
    except (KeyError, IndexError, TypeError, ValueError):
        _cannot(client, "it does not give the log-probabilities of the tokens asked for (`logprob_token_ids`)")


def _cannot(client: openai.AsyncOpenAI, why: str) -> NoReturn:
    raise EngineDead(
        f"the server at {shown_url(str(client.base_url))} cannot weigh the wordings of a grade: {why}. --score_mode "
        "expected needs a vLLM server of the version this project installs, or the model in process; --score_mode "
        "mean works anywhere"
    )
