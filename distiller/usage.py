"""Tokens: what a run has used, what it cost, and whether another row may start under a cap (`--max_tokens_total`)."""

from __future__ import annotations

from dataclasses import dataclass

from distiller.engine import AskError, Completion


@dataclass
class Usage:
    """The tokens of all runs of one output, as the engine counted them."""

    asks: int = 0
    """Those that came back, refused ones included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that came from a prefix cache; None where the engine never said."""
    price_per_million: list[float] | None = None
    """Price of a million tokens: prompt, completion and, where it differs, cached prompt; in any currency."""

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        """What all these tokens cost at the prices given; None without prices."""
        if self.price_per_million is None:
            return None
        prompt, completion, *cached = self.price_per_million
        from_cache = self.cached_tokens or 0
        price = (self.prompt_tokens - from_cache) * prompt + from_cache * (cached or [prompt])[0]
        return (price + self.completion_tokens * completion) / 1e6

    def add(self, reply: Completion | AskError) -> int:
        """Count one answer; returns its tokens."""
        self.asks += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if reply.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + reply.cached_tokens
        return reply.prompt_tokens + reply.completion_tokens

    @property
    def tokens(self) -> dict:
        """As a Completion or an AskError takes them."""
        return {name: getattr(self, name) for name in COUNTS[1:]}

    def as_dict(self) -> dict:
        """For the manifest."""
        counts = {name: getattr(self, name) for name in COUNTS}
        priced = {"price_per_million": self.price_per_million, "cost": self.cost} if self.price_per_million else {}
        return counts | priced

    def go_on_from(self, earlier: dict) -> None:
        """Take over the counts of earlier runs, as `as_dict` gave them. Prices are always those of this run."""
        for name in COUNTS:
            setattr(self, name, earlier.get(name, getattr(self, name)))

    def __str__(self) -> str:
        cached = "" if self.cached_tokens is None else f" ({self.cached_tokens:,} from the cache)"
        cost = "" if self.cost is None else f"; cost {self.cost:,.4g} at --price_per_million"
        return (
            f"{self.prompt_tokens:,} prompt{cached} + {self.completion_tokens:,} completion = {self.total:,} tokens "
            f"in {self.asks:,} asks{cost}"
        )


COUNTS = ("asks", "prompt_tokens", "completion_tokens", "cached_tokens")


class Budget:
    """Holds a run under a cap on its tokens, those of earlier runs of the same output included.

    A row that has started is finished, so it is the start of a row that is refused: it starts only while the tokens
    used, and as many for each row in flight as the costliest row so far took, stay under the cap. So the number in
    flight shrinks as the cap draws near, and the cap is passed by one row, or by what rows cost beyond the costliest
    one before them. Until a first row's cost is known, one row is in flight.
    """

    def __init__(self, usage: Usage, limit: int | None) -> None:
        self.usage, self.limit = usage, limit
        self.costliest = 0

    def allows(self, flying: int) -> bool:
        """Whether another row may start beside those in flight."""
        if self.limit is None:
            return True
        if flying and not self.costliest:
            return False
        return self.usage.total + flying * self.costliest < self.limit

    def finished(self, tokens: int) -> None:
        """A row is finished that took so many tokens in this run."""
        self.costliest = max(self.costliest, tokens)
