"""How many tokens a forward may hold on a GPU: measured in the first steps, where `--max_tokens_per_batch` is unset.

What a token takes depends on the model, gradient checkpointing, adapters, the kernels that happen to be there. So it
is not reckoned but seen: the first forwards hold `FIRST` tokens at most, and each of the first steps says what its
largest forward took beyond what stood there before. From then on a forward may take `SHARE` of what is free. The
step's pairs and their mean do not change (`trainer.py`).
"""

from dataclasses import dataclass

import torch

FIRST = 4096
MOST = 32_768  # more tokens do not make a GPU faster
STEPS = 10  # after which the budget stands
SHARE = 0.8  # of free memory: lengths differ, and the allocator leaves gaps


def fitting(free: float, taken: float, tokens: int) -> int:
    """Tokens that fit into `free` bytes where `tokens` of them took `taken` bytes, at most `MOST`."""
    return int(min(SHARE * free * tokens / max(taken, 1), MOST))


@dataclass
class TokenBudget:
    """tokens: what a forward may hold now. Without a GPU, or with `fixed`, it stays as it is; None is no bound."""

    fixed: int | None
    device: torch.device
    steps: int = 0  # seen
    before: int = 0  # bytes allocated when the step began

    def __post_init__(self):
        self.measured = self.fixed is None and self.device.type == "cuda"
        self.tokens = FIRST if self.measured else self.fixed

    def begin(self) -> None:
        """Before a step's first forward."""
        if self.measured and self.steps < STEPS:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def end(self, tokens: int) -> int | None:
        """After a step whose largest forward held so many tokens. The new budget, if it has changed.

        The first step is left out: what an optimizer makes then, it keeps.
        """
        if not self.measured or self.steps >= STEPS:
            return None
        self.steps += 1
        if self.steps == 1:
            return None
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + reserved - allocated
        taken = torch.cuda.max_memory_allocated(self.device) - self.before
        # Never less than what has run already: gradients and the optimizer's own needs are counted as the tokens'.
        old, self.tokens = self.tokens, max(self.tokens, fitting(free, taken, tokens))
        return self.tokens if self.tokens != old else None
