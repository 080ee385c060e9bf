"""What an OpenAI-compatible server says of a fault, wherever and however it says it.

Not every server keeps to statuses. Some proxies answer 200 and put the error into the body
(`{"error": {"message": ..., "code": 429}}`, or into the choice), others answer 200 with a web page. `settle_status`
gives such an answer the status that it stands for before the client sees it, so that the client's own retries and all
that depends on a status hold for it. And there are as many forms of an error's body as there are servers: `said` reads
the words of any. What is secret in an address or a message is not shown.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

if TYPE_CHECKING:  # or httpx2, as the client has it
    import httpx

KEY = "OPENAI_API_KEY"
AROUND = "\ufeff \t\r\n"
"""Not part of the key, wherever it was copied from."""
SETTLED, NO_JSON = "settled", "no_json"  # extensions of a response
LONGEST_OPEN = 3
"""Characters of what is too short for a secret; to hide it would make any text unreadable."""
MOST = 300
"""Characters of a body that are shown."""
STATUSES = {
    **dict.fromkeys(("invalid_api_key", "authentication_error", "unauthorized", "permission_error"), 401),
    **dict.fromkeys(("insufficient_quota", "billing_error", "payment_required"), 402),
    **dict.fromkeys(("model_not_found", "not_found_error", "not_found"), 404),
    **dict.fromkeys(("invalid_request_error", "context_length_exceeded", "bad_request", "validation_error"), 400),
    **dict.fromkeys(("rate_limit_exceeded", "rate_limit_error", "too_many_requests"), 429),
    **dict.fromkeys(("overloaded_error", "overloaded", "service_unavailable"), 503),
}
"""What OpenAI and others write as an error's `code` or `type` in place of a number."""
_WORDS = ("message", "msg", "status_msg", "detail", "error_message", "error", "errors", "base_resp", "title", "reason")
_SAID = ("content", "reasoning", "reasoning_content", "refusal")
_ANSWERS = ("choices", "tokens", "data")
"""What an answer of one kind or another has, and an error has not."""


async def settle_status(response: httpx.Response) -> None:
    """An event hook of httpx. Raises what reading the body raises."""
    if response.status_code == 200:
        await response.aread()
        if status := _status(response):
            response.status_code, response.extensions[SETTLED] = status, True
        elif not is_no_json(response):  # whatever the server calls it: the client would hand it on as a text
            response.headers["Content-Type"] = "application/json"


def _status(response: httpx.Response) -> int | None:
    """The status that an answer with an error in it stands for; None for an answer."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        response.extensions[NO_JSON] = True
        return 502  # a web page, half an answer: what stands between us and the server has said it
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = first.get("message")
    answered = isinstance(message, dict) and any(message.get(name) for name in _SAID)
    error = first.get("error") or (None if first.get("text") or answered else body.get("error"))
    if not error and not any(body.get(name) for name in _ANSWERS) and _words(body):
        error = body  # as FastAPI and others write it
    if not error:
        return None
    names = ("code", "status", "status_code", "type")
    parts = [part for part in (error, body, body.get("base_resp")) if isinstance(part, dict)]
    for value in (part.get(name) for part in parts for name in names):
        if str(value).isdecimal() and 400 <= int(value) < 600:
            return int(value)
        if isinstance(value, str) and value.casefold() in STATUSES:
            return STATUSES[value.casefold()]
    return 500


def is_no_json(response: httpx.Response) -> bool:
    """Whether a web page or the like came with status 200: what a server has for an address that it does not know."""
    return NO_JSON in response.extensions


def said(response: httpx.Response) -> str:
    """What the body says went wrong, on one line, at most `MOST` characters; its beginning, where no words are found
    in it."""
    try:
        text = " ".join(dict.fromkeys(_words(json.loads(response.content)))) or response.text
    except (ValueError, RecursionError):
        text = response.text
        if text.lstrip().startswith("<"):
            text = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = " ".join(text.split())
    text = text if len(text) <= MOST else f"{text[:MOST]} ..."
    return f"{text} (in an answer of status 200)" if SETTLED in response.extensions else text


def _words(body: object) -> list[str]:
    """The messages in a body: a text, or what stands under one of `_WORDS`, also in a list of such (FastAPI's)."""
    if isinstance(body, str):
        return [body] if body.strip() else []
    if isinstance(body, list):
        return [word for part in body[:5] for word in _words(part)]
    if not isinstance(body, dict):
        return []
    for choice in body.get("choices") or () if isinstance(body.get("choices"), list) else ():
        if isinstance(choice, dict) and choice.get("error"):
            return _words(choice["error"])
    found = [word for key in _WORDS if key in body for word in _words(body[key])]
    place = body.get("loc") or body.get("param")
    if found and place:
        names = place if isinstance(place, list) else [place]
        found[0] = f"{'.'.join(map(str, names))}: {found[0]}"
    return found


def shown_url(url: str) -> str:
    """Scheme, host and path of an address, or of what should be one: a user, a password or a key in the query are not
    shown."""
    scheme, mark, rest = url.strip("'\" \t\r\n").rpartition("://")
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif "@" in path and ":" in host and not re.fullmatch(r"(\[[^]]*\]|[^:]*):\d+", host):  # a slash in the password
        host, slash, path = path.rpartition("@")[2].partition("/")
    return f"{scheme}{mark}{host}{slash}{path}"


def secrets_of(base_url: str) -> dict[str, str]:
    """{secret: what is shown in its place}: the key, and the password and the query's values of an address."""
    found = {os.environ.get(KEY, "").strip(AROUND): f"[{KEY}]"}
    try:
        parts = urlsplit(base_url.strip())
        # A user's name is no secret, but where it is all that there is: a token.
        hidden = [parts.password or parts.username]
        hidden += [value for name, value in parse_qsl(parts.query) if "version" not in name]
    except ValueError:
        hidden = []
    if hidden and parts.username:
        hidden.append(b64encode(f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()).decode())
    for secret in filter(None, hidden):
        found |= {secret: "[--base_url]", quote(secret, safe=""): "[--base_url]", unquote(secret): "[--base_url]"}
    return {secret: instead for secret, instead in found.items() if len(secret) > LONGEST_OPEN}


def without_secrets(text: str, secrets: Mapping[str, str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):  # one may hold another
        text = text.replace(secret, secrets[secret])
    return text
