"""A pool of vLLM engines on Ray (`--num_engines`): several on this machine, or on all machines of a cluster.

Each engine is a `VLLMEngine` in an actor, a process of its own with its own GPUs. Where RAY_ADDRESS is set (Ray's own
convention) the pool runs in that cluster, whose machines need this environment and the model at the same path;
otherwise Ray is started here and ends with the command.

The driver keeps no queue. An ask goes to the engine with the fewest asks in flight, but a row's next ask follows its
first one, whose prompt may be in that engine's prefix cache. An answer comes back the moment its engine has it, alone:
a slow row holds nothing back. No actor is started again in silence: one that dies ends the command, as a dead engine
does anywhere else.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import queue
import signal
import socket
import sys
import threading
from concurrent.futures import Future

import ray
from ray.exceptions import RayError

from distiller.engine import Ask, AskError, Completion, EngineDead, EngineNotStarted, Sampling
from distiller.vllm_engine import VLLMEngine
from distiller.vllm_setup import check_weights, is_cpu_build

ASKS_AN_ACTOR = 100_000  # more than any engine wants at once: Ray's own limit must hold nothing back
OBJECT_STORE_BYTES = 100 << 20  # asks and answers are a few kB each; Ray would take 30 % of the memory
TELL_SECONDS = 60.0
KNOCK_SECONDS = 10.0
COUNT_SECONDS = 5.0  # a progress line waits for its counts no longer
KEYS_REMEMBERED = 100_000  # more rows than are ever in flight; a row forgotten loses its cached prompt, no more


class EngineActor:
    """One engine in a process of its own.

    A thread loads and steps the engine, and is the only one to touch it; the methods wait in the actor's event loop,
    so that asks come in between two steps.
    """

    def __init__(self, model: str, sampling: Sampling, options: dict) -> None:
        self._arguments = (model, sampling, options)
        self._asks: queue.SimpleQueue[tuple[Ask, asyncio.Future]] = queue.SimpleQueue()

    async def load(self) -> tuple[int, dict] | EngineDead:
        """Load the model; (capacity, facts) of the engine."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        loaded = self._loop.create_future()
        threading.Thread(target=self._run, args=(loaded,), name="engine", daemon=True).start()
        return await self._or_ended(loaded)

    async def tokens(self) -> tuple[int, int]:
        return self._engine.tokens()

    async def answer(self, ask: Ask) -> Completion | AskError | EngineDead:
        answer = self._loop.create_future()
        self._asks.put((ask, answer))
        return await self._or_ended(answer)

    async def _or_ended(self, future: asyncio.Future) -> object:
        await asyncio.wait((future, self._ended), return_when=asyncio.FIRST_COMPLETED)
        return future.result() if future.done() else self._ended.result()

    def _run(self, loaded: asyncio.Future) -> None:
        end = EngineDead("its thread failed, see the traceback above")  # what is not EngineDead is printed by Python
        try:
            self._serve(loaded)
        except EngineDead as fault:
            end = fault
        finally:
            self._tell(self._ended, end)

    def _serve(self, loaded: asyncio.Future) -> None:
        model, sampling, options = self._arguments
        self._engine = engine = VLLMEngine(model, sampling, **options)
        self._tell(loaded, (engine.capacity, engine.facts()))
        waiting: dict[int, asyncio.Future] = {}
        keys = itertools.count()
        while True:
            while not (waiting and self._asks.empty()):  # sleeps here when there is nothing to do
                ask, answer = self._asks.get()
                waiting[key := next(keys)] = answer
                engine.submit(key, ask)
            for key, reply in engine.poll():
                self._tell(waiting.pop(key), reply)

    def _tell(self, future: asyncio.Future, value: object) -> None:
        self._loop.call_soon_threadsafe(future.set_result, value)


class Balance:
    """Which of several engines takes an ask: the one that had the last ask of this key, or else the least busy."""

    def __init__(self, engines: int) -> None:
        self.load = [0] * engines
        """Asks in flight at each engine."""
        self._homes: dict[int, int] = {}  # by key, the one asked last at the end

    @property
    def busy(self) -> bool:
        return any(self.load)

    def take(self, key: int) -> int:
        """The number of the engine that takes an ask of this key."""
        number = self._homes.pop(key, None)
        if number is None:
            number = self.load.index(min(self.load))
        self._homes[key] = number
        if len(self._homes) > KEYS_REMEMBERED:
            del self._homes[next(iter(self._homes))]
        self.load[number] += 1
        return number

    def release(self, number: int) -> None:
        """An ask came back from this engine."""
        self.load[number] -= 1


class RayEngine:
    """A `TeacherEngine` on `num_engines` of `VLLMEngine`, with `tensor_parallel_size` GPUs each.

    options: the other arguments of `VLLMEngine`. Raises EngineNotStarted.
    """

    def __init__(
        self, model: str, sampling: Sampling, *, num_engines: int, tensor_parallel_size: int = 1, **options: object
    ) -> None:
        check_weights(model)
        gpus = 0 if is_cpu_build() else tensor_parallel_size
        self._actors: list = []
        self._balance = Balance(num_engines)
        self._finished: queue.SimpleQueue[tuple[int, int, Future]] = queue.SimpleQueue()
        self._dead: EngineDead | None = None
        _start_ray(num_engines)
        try:
            _check_room(num_engines, gpus)
            actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=ASKS_AN_ACTOR)(EngineActor)
            options["tensor_parallel_size"] = tensor_parallel_size
            self._actors = [actor.remote(model, sampling, options) for _ in range(num_engines)]
            loaded = self._wait_for_loading()
        except BaseException:  # a signal included: the actors must not outlive the command
            self.close()
            raise
        self.capacity = sum(capacity for capacity, _ in loaded)
        self._facts = loaded[0][1]

    def _wait_for_loading(self) -> list[tuple[int, dict]]:
        """(capacity, facts) of each engine. Raises EngineNotStarted."""
        references = [actor.load.remote() for actor in self._actors]
        loaded: dict[int, tuple[int, dict]] = {}
        waiting = references
        while waiting:
            # One at a time: the first that fails ends the wait for the others.
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=TELL_SECONDS)
            for reference in ready:
                number = references.index(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    raise EngineNotStarted(self._gone(number, error)) from error
                if isinstance(result, EngineDead):
                    raise EngineNotStarted(str(result))
                loaded[number] = result
                if result[1] != loaded[min(loaded)][1]:
                    raise EngineNotStarted(f"two engines differ: {result[1]} and {loaded[min(loaded)][1]}")
            if not ready:
                print(f"{len(waiting)} engines are loading, or waiting for free GPUs", file=sys.stderr, flush=True)
        return [loaded[number] for number in range(len(references))]

    def submit(self, key: int, ask: Ask) -> None:
        """Hand one ask to an engine. A refusal comes back from `collect`, and so does the end of an engine."""
        number = self._balance.take(key)
        future = self._actors[number].answer.remote(ask).future()
        future.add_done_callback(lambda done: self._finished.put((key, number, done)))

    def collect(self) -> list[tuple[int, Completion | AskError]]:
        """Wait for at least one answer, return all there are. [] where nothing is in flight. Raises EngineDead."""
        results: list[tuple[int, Completion | AskError]] = []
        # Answers that came before an engine died are returned first: they are paid for.
        while not self._finished.empty() or (self._balance.busy and not results and not self._dead):
            key, number, future = self._finished.get()
            self._balance.release(number)
            try:
                answer = future.result()
            except RayError as error:
                self._dead = EngineDead(self._gone(number, error))
                continue
            if isinstance(answer, EngineDead):
                self._dead = EngineDead(f"engine {number + 1} of {len(self._actors)}: {answer}")
                continue
            results.append((key, answer))
        if self._dead and not results:
            raise self._dead
        return results

    def tokens(self) -> tuple[int, int] | None:
        """Written and read by all engines, replies under way included; None where one cannot tell any more. From any
        thread."""
        try:
            counts = ray.get([actor.tokens.remote() for actor in self._actors], timeout=COUNT_SECONDS)
        except RayError:  # `collect` says so
            return None
        return tuple(map(sum, zip(*counts, strict=True)))

    def _gone(self, number: int, error: RayError) -> str:
        said = " ".join(str(error).split())[:400]
        return (
            f"engine {number + 1} of {len(self._actors)}, an actor on Ray, is gone. Killed processes mostly lacked "
            f"memory. Ray says: {type(error).__name__}: {said}"
        )

    def close(self) -> None:
        """End the actors, and Ray where it was started here. May be called again."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        ray.shutdown()

    def facts(self) -> dict:
        """Those of the engines, which are alike; how many they are changes nothing."""
        return dict(self._facts)


def _start_ray(num_engines: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine. Raises EngineNotStarted."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report the run to its makers
    here = {
        "address": "local",  # without it Ray joins whatever cluster runs on this machine
        "num_cpus": num_engines,  # of which an actor takes one: none can wait for ever
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    handler = signal.getsignal(signal.SIGTERM)
    cluster = os.environ.get("RAY_ADDRESS")
    try:
        with _NotStarted():
            if cluster:
                _knock(cluster)
            ray.init(**({} if cluster else here), logging_level="error")
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which ends the process with exit code 1


def _knock(cluster: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray itself would go on trying for many minutes."""
    host, _, port = cluster.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # "auto" and "local" are addresses too
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


class _NotStarted:
    """Makes EngineNotStarted of what `ray.init` raises. On a machine too busy to start Ray within 30 seconds that is
    a bare `Exception`, of which no subclass may be caught with it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is Exception or isinstance(error, RayError | OSError | RuntimeError | ValueError):
            where = os.environ.get("RAY_ADDRESS")
            what = f"at RAY_ADDRESS={where} cannot be reached" if where else "could not be started on this machine"
            raise EngineNotStarted(f"Ray {what}: {error}") from error


def _check_room(num_engines: int, gpus: int) -> None:
    """Refuse what could never be scheduled, which Ray would wait for in silence. Raises EngineNotStarted."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get("CPU", 0), node.get("GPU", 0) // gpus if gpus else math.inf)) for node in nodes)
    if room < num_engines:
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise EngineNotStarted(
            f"--num_engines {num_engines} with {gpus} GPUs and a CPU each does not fit: Ray has {have} by machine, "
            f"which is room for {room}. Lower --num_engines or --tensor_parallel_size"
        )
