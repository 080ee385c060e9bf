"""The client of an OpenAI-compatible server: its address, its key, what stands in between, and what is said of them.

All of it is checked before the first row, in one line that names the variable or the flag: the client itself tells a
key with a line break, an unknown host and a dead proxy by the same "Connection error.", after all its retries. And no
message holds the key, nor a password of the address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import sys
from pathlib import Path
from socket import gaierror
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from distiller.engine import EngineNotStarted
from distiller.openai_faults import AROUND, KEY, settle_status, shown_url

CONNECT_SECONDS = 5.0  # a machine that is off must be found out within a minute, all retries included


class _Bounded(openai.DefaultAsyncHttpxClient):
    """A client whose time-out is for a whole request, its answer's body included. The libraries take it for the wait
    between two bytes, which a server that dribbles never makes too long."""

    async def send(self, request: object, **options: object) -> object:
        seconds = request.extensions["timeout"]["read"]
        try:
            async with asyncio.timeout(seconds):
                return await super().send(request, **options)
        except TimeoutError as late:  # as what the library calls it, which the client retries
            library = sys.modules[type(request).__module__.partition(".")[0]]
            raise library.ReadTimeout(f"no whole answer in {seconds:g} seconds", request=request) from late


def make_client(base_url: str, timeout: float, max_retries: int) -> openai.AsyncOpenAI:
    """The client for `base_url`, whose query goes with every request; the key is OPENAI_API_KEY ("EMPTY" without one).
    Raises EngineNotStarted."""
    url = base_url.strip()
    if not url.casefold().startswith(("http://", "https://")):
        raise EngineNotStarted(
            f"--base_url {shown_url(url)} must start with http:// or https:// (and usually end with /v1)"
        )
    parts = urlsplit(url)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name) and not Path(os.environ[name]).exists():
            raise EngineNotStarted(f"{name} names {os.environ[name]}, which does not exist: correct or unset it")
    # No proxy leads to this machine; SSL_CERT_FILE counts here too, which is read by ssl itself.
    direct = {"trust_env": False, "verify": ssl.create_default_context()} if _is_here(parts.hostname) else {}
    try:
        through = _Bounded(event_hooks={"response": [settle_status]}, **direct)
    except ssl.SSLError as fault:
        raise EngineNotStarted(f"SSL_CERT_FILE or SSL_CERT_DIR names no certificates ({fault}): unset it") from fault
    except Exception as fault:  # of many kinds: a package that is missing, an address that is none
        proxies = ", ".join(f"{name.upper()}_PROXY={shown_url(value)}" for name, value in getproxies().items())
        raise EngineNotStarted(
            f"no client can be made with {proxies or 'this environment'}: {fault}; correct or unset it, or put "
            f"{parts.hostname} into NO_PROXY"
        ) from fault
    return openai.AsyncOpenAI(
        api_key=api_key(),
        base_url=parts._replace(query="", fragment="").geturl(),
        default_query=dict(parse_qsl(parts.query, keep_blank_values=True)),
        timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS),
        max_retries=max_retries,
        http_client=through,
    )


def api_key() -> str:
    """OPENAI_API_KEY without white space and a byte-order mark at its ends. Raises EngineNotStarted for a key that no
    request can carry."""
    key = os.environ.get(KEY, "").strip(AROUND)
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise EngineNotStarted(
                f"{KEY}: character {place} of {len(key)} is {character!r} (U+{ord(character):04X}), which is "
                "in no key: copy the key again, without quotes around it"
            )
    return key or "EMPTY"


def cause_of(error: BaseException, base_url: str) -> str:
    """Why there was no connection, in words that say what to look at."""
    chain = []
    fault: BaseException | None = error
    while fault is not None and fault not in chain:
        chain.append(fault)
        fault = fault.__cause__ or fault.__context__
    parts = urlsplit(base_url)
    proxy = None if _is_here(parts.hostname) or proxy_bypass(parts.hostname or "") else _proxy_for(parts.scheme)
    by_way = f", by way of {proxy}" if proxy else ""
    said = str(chain[-1]) or type(chain[-1]).__name__
    for each in chain:
        if isinstance(each, gaierror):
            said = f"the host {parts.hostname} is not known" if not proxy else "the proxy's host is not known"
        elif isinstance(each, ssl.SSLCertVerificationError):
            said = (
                f"its certificate is not trusted ({each.verify_message}): name the file of who signed it in "
                "SSL_CERT_FILE"
            )
        elif isinstance(each, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(each):
            said = "it does not speak https: try http://"
        elif isinstance(each, ConnectionRefusedError):
            said = "nothing listens there"
        else:
            continue
        break
    return said + by_way


def _is_here(host: str | None) -> bool:
    """Whether it is this machine."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def _proxy_for(scheme: str) -> str | None:
    """NAME=address of the proxy that the environment names for such addresses."""
    found = getproxies()
    name = next((name for name in (scheme, "all") if name in found), None)
    return name and f"{name.upper()}_PROXY={shown_url(found[name])}"
