"""A proxy that makes the server behind it unreliable: `python tests/fault_proxy.py http://127.0.0.1:8000 --rate 0.2`.

Prints its own address on the first line and serves until it is killed. A share of the requests (`--rate`) meets a
fault, each kind as often as the others:

    429, 500   an error with a text of its own, INJECTED in it
    silence    no answer at all, until the client gives up
    hang up    the connection is cut before an answer
    half       the server is asked, and the connection cut in the middle of its answer

Which request meets what is drawn from the seed, the request's content and how often it came before: the same in every
run, whatever the order of arrival. A request whose content holds `always <kind>` meets that fault every time. GET
/faults tells how many requests and faults there were.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
from collections import Counter

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

KINDS = ("429", "500", "silence", "hang up", "half")
INJECTED = "fault injected by the proxy"


class FaultProxy:
    def __init__(self, upstream: str, rate: float, seed: int):
        self.upstream, self.rate, self.seed = upstream, rate, seed
        self.seen: Counter[bytes] = Counter()
        self.counts: Counter[str] = Counter()

    def draw(self, body: bytes) -> str | None:
        """The fault this request meets."""
        for kind in KINDS:
            if f"always {kind}".encode() in body:
                return kind
        digest = hashlib.sha256(body).digest()
        draw = random.Random(f"{self.seed} {digest.hex()} {self.seen[digest]}")
        self.seen[digest] += 1
        return draw.choice(KINDS) if draw.random() < self.rate else None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        kind = self.draw(body) if request.method == "POST" else None
        self.counts["requests"] += request.method == "POST"
        self.counts[kind or "none"] += 1
        if kind in ("429", "500"):
            error = {"message": f"{INJECTED}: {kind}", "type": "error", "param": None, "code": None}
            return web.json_response({"error": error}, status=int(kind))
        if kind == "silence":
            await asyncio.Event().wait()  # cancelled when the client goes
        if kind == "hang up":
            request.transport.abort()
            return web.Response()
        headers = {"Content-Type": "application/json"}
        async with self.session.request(
            request.method, self.upstream + request.path_qs, data=body, headers=headers
        ) as answer:
            data = await answer.read()
        if kind != "half":
            return web.Response(body=data, status=answer.status, content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        request.transport.close()
        return response

    async def faults(self, request: web.Request) -> web.Response:
        return web.json_response(self.counts)

    async def serve(self) -> None:
        application = web.Application(client_max_size=2**30)
        application.router.add_get("/faults", self.faults)
        application.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with ClientSession(timeout=ClientTimeout(total=None), connector=TCPConnector(limit=0)) as self.session:
            print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
            await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream", help="address of the server, without /v1")
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asyncio.run(FaultProxy(args.upstream, args.rate, args.seed).serve())


if __name__ == "__main__":
    main()
