"""What a GPU's memory holds, and a useful end where it does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distiller.records import InputError

GIB = 2**30


def weights_gib(model: nn.Module) -> float:
    """GiB of a model's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # ZeRO-3 holds a part of each here.
    return sum(getattr(t, "ds_numel", t.numel()) * t.element_size() for t in tensors.values()) / GIB


def memory_of(device: torch.device) -> str:
    """How much of a GPU's memory is taken, by whomever; empty for a CPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are taken"


@contextmanager
def memory_for(what: str, remedy: str, device: torch.device) -> Iterator[None]:
    """Turns running out of a GPU's memory within it into an InputError.

    what: for which there was none, as in "step 3, a forward of 9000 tokens"; remedy: flags that need less.
    """
    try:
        yield
    except torch.OutOfMemoryError as fault:
        said = str(fault).partition(". ")[0]
        taken = memory_of(device)
        raise InputError(f"out of memory: {what} ({said}{'; ' if taken else ''}{taken}). {remedy}") from fault
