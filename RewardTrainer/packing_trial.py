"""Which models take packed rows: what can be read from their configuration, and then a trial.

A model in bf16 gives every token a state that is a few per cent off, and packed rows are off otherwise than padded
ones. A bound on the difference alone takes that for a fault, or, wide enough for 36 layers, a fault for that. So the
trial asks for what rounding cannot touch, and then for as much nearness as rounding allows:

1. *Every token depends on its own row, and on nothing else.* When the tokens of a piece of the pack change (what all
   rows share, what some share, what is one row's own), that piece moves, and so does what comes next in each row that
   it is part of; in all other rows no token moves, not by one bit. (By as much as the model's own padded rows move
   when a neighbour changes: mixtures of experts count what they are given.)
2. *Positions are read.* When the position ids of a row's own tokens change, they move, and again no other row's.
3. *The states are the padded ones, but for rounding.* The relative distance between packed and padded states, root
   mean square over the tokens behind the prompt, is at most `FACTOR` times the one that rounding of this model in its
   own dtype makes. That is measured: the same padded forward, where what each layer with weights gives is off by up to
   half a unit in the last place.

And every layer with a sliding window must have told attention of it (`packing.misread`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from RewardTrainer.packing import kernel_of, misread, pack, run_packed, serve_segments

SERVED_LAYERS = {"full_attention", "sliding_attention"}
FACTOR = 3.0
# In fp32 a product of thousands of terms is off by several units, and by others for other numbers of rows.
FLOOR = 1e-5


@dataclass(frozen=True)
class Verdict:
    """reason: why a model cannot take packed batches, None where it can; note: how it takes them."""

    reason: str | None
    note: str = ""


def judge(backbone: PreTrainedModel, runnable: bool, device: torch.device | None = None) -> Verdict:
    """Whether this model can take packed batches, and how.

    runnable: whether the model can be called now, weights whole. It is then tried, under autocast where the caller is.
    device: where it is to run; None: where it is. Elsewhere it is not tried.
    """
    config, name = backbone.config, type(backbone).__name__
    device = device or backbone.device
    runnable = runnable and device.type == backbone.device.type
    kernel = kernel_of(config, device)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS)
    if other:
        return Verdict(f"{name} has layers of type {', '.join(other)}, which would run on across rows")
    if backbone._is_stateful or not backbone._supports_attention_backend:
        return Verdict(f"{name} does not compute attention through transformers' attention interface alone")
    if kernel is None:
        return Verdict(f"--attn_implementation {config._attn_implementation} cannot; sdpa and flash attention can")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return Verdict(f"{name} does not attend causally")
    if kernel == "flex" and getattr(config, "attention_dropout", 0.0):
        return Verdict(
            f"FlexAttention has no dropout, and {name} has one of {config.attention_dropout:g} in attention"
        )
    serve_segments(backbone)
    if not runnable:
        return Verdict(None, f"{kernel} attention, not tried: the weights are in parts, or elsewhere")
    training = backbone.training
    backbone.eval()
    try:
        return _trial(backbone, kernel)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as fault:  # it knows no `segments`, its kernel cannot be compiled here, ...
        said = str(fault).strip().partition("\n")[0]
        return Verdict(f"{name} failed on packed rows: {said or type(fault).__name__}")
    finally:
        backbone.train(training)


PROMPT = 20  # tokens that all rows of the trial begin with, times its scale


def trial_rows(vocabulary: int, scale: int = 1) -> list[np.ndarray]:
    """Five rows with a common prompt, of which two go on alike and one ends inside another; packed, they are about 60
    tokens times the scale."""
    cuts = scale * np.array([PROMPT, PROMPT + 16, PROMPT + 24, PROMPT + 30])
    prompt, answer, second, tail, third = np.split(
        np.random.default_rng(0).integers(0, vocabulary, scale * (PROMPT + 42)), cuts
    )
    long, short = scale * 12, scale * 8
    for branch, beside, by in ((second, answer[0], 1), (third, answer[0], 2), (tail, answer[long], 1)):
        branch[0] = (beside + by) % vocabulary  # or it might begin as that one does
    rows = (answer, second, np.concatenate([answer[:long], tail]), third, answer[:short])
    return [np.concatenate([prompt, row]) for row in rows]


@torch.no_grad()
def _trial(backbone: PreTrainedModel, kernel: str) -> Verdict:
    name = type(backbone).__name__
    vocabulary = backbone.config.get_text_config().vocab_size
    scale = 4 if kernel == "flex" else 1  # for FlexAttention's blocks to cut through pieces
    rows = trial_rows(vocabulary, scale)
    ids, position_ids, segments, [places] = pack([rows], share=True)
    ids, position_ids = ids.to(backbone.device), position_ids.to(backbone.device)

    def states(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        segments.calls = segments.windows = 0
        return run_packed(backbone, ids, position_ids, segments)[0]

    base, padded = states(ids, position_ids), padded_states(backbone, rows)
    neighbours = padded_states(backbone, [rows[0], rows[1][::-1].copy(), *rows[2:]])
    usual = max(distance(neighbours[i], padded[i]) for i in (0, 2, 3, 4))  # 0, but for experts
    usual = max(usual, distance(states(ids, position_ids), base))  # 0, but for kernels that add in any order

    pieces = list(pairwise(np.cumsum([0, *segments.lengths])))
    # Of all rows, of several, and of one, which stands between others.
    for start, stop in (pieces[0], pieces[1], pieces[-2]):
        holding = [place for place in places if start in place]  # rows that the piece is part of
        others = np.setdiff1d(np.arange(ids.shape[1]), np.concatenate(holding))
        next_tokens = [place[place >= stop][0] for place in holding if place[-1] >= stop]
        changed = ids.clone()
        changed[0, start:stop] = (changed[0, start:stop] + 1) % vocabulary
        moved = states(changed, position_ids)
        if not distance(moved[others], base[others]) <= FACTOR * usual:
            return Verdict(f"{name} lets a row's tokens act on the states of other packed rows")
        if not all(distance(moved[token], base[token]) > usual for token in (start, *next_tokens)):
            return Verdict(f"{name} keeps packed rows from the tokens that they share with others")
    shifted = position_ids.clone()
    shifted[0, start:stop] += 3  # that last one's
    moved = states(ids, shifted)
    if not distance(moved[start], base[start]) > usual or not distance(moved[others], base[others]) <= FACTOR * usual:
        return Verdict(f"{name} does not go by the position ids that it is given")

    def behind_the_prompt(states: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([row[scale * PROMPT :] for row in states])

    own = behind_the_prompt(padded)
    apart = distance(behind_the_prompt([base[torch.from_numpy(place).to(base.device)] for place in places]), own)
    with rounding(backbone):
        spread = FLOOR + distance(behind_the_prompt(padded_states(backbone, rows)), own)
    said = f"states are {apart:.2g} from those of padded rows, where rounding makes {spread:.2g}"
    if not apart <= FACTOR * spread:
        return Verdict(f"{name} gives other hidden states on packed rows than on padded ones ({said})")
    return Verdict(misread(backbone, segments), f"{kernel} attention; tried: {said}")


def padded_states(backbone: PreTrainedModel, rows: list[np.ndarray]) -> list[torch.Tensor]:
    """What the model's own forward on padded rows gives, (len(row), H) each."""
    longest = max(map(len, rows))
    ids = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows])).long()
    mask = torch.from_numpy(np.stack([np.arange(longest) < len(row) for row in rows])).long()
    hidden = backbone(
        input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), use_cache=False
    ).last_hidden_state
    return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]


def distance(states: torch.Tensor, of: torch.Tensor) -> float:
    """Root mean square of the difference over that of `of`; of one shape."""
    states, of = states.double(), of.double()
    return ((states - of).norm() / of.norm().clamp(min=torch.finfo(of.dtype).tiny)).item()


@contextmanager
def rounding(backbone: nn.Module) -> Iterator[None]:
    """Within it, what each layer with weights gives is off by up to half a unit in the last place of its dtype.

    Products in tf32 are rounded to its ten bits, whatever the dtype says.
    """
    generator = torch.Generator(backbone.device).manual_seed(0)
    tf32 = backbone.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"

    def perturb(module, inputs, output):
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        unit = max(torch.finfo(output.dtype).eps, 2**-10 if tf32 else 0.0)
        noise = torch.rand(output.shape, device=output.device, generator=generator) - 0.5
        return (output.float() * (1 + unit * noise)).to(output.dtype)

    leaves = [module for module in backbone.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_hook(perturb) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
