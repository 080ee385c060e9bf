"""Which models take packed rows: what can be read from their configuration, and then a trial.

A model in bf16 gives every token a state that is a few per cent off, and packed rows are off otherwise than padded
ones. A bound on the difference alone takes that for a fault, or, wide enough for 36 layers, a fault for that. So the
trial asks three things, none of which depends on a bound chosen by hand:

1. *Nothing leaks.* When the tokens of one branch change, no token outside of it may move, not by one bit. (By as much
   as the model's own padded rows move when a neighbour changes: mixtures of experts count what they are given.)
2. *Positions are read.* When the position ids of a branch change, its tokens move, and again no others.
3. *The states are the padded ones, but for rounding.* The relative distance between packed and padded states, root
   mean square over all tokens, is at most `FACTOR` times the one that rounding of this model in its own dtype makes.
   That is measured: the same padded forward, each weight-bearing layer's output off by half a unit in the last place.

And every layer with a sliding window must have told attention of it (`packing.misread`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from RewardTrainer.packing import kernel_of, misread, pack, run_packed, serve_segments

SERVED_LAYERS = {"full_attention", "sliding_attention"}
FACTOR = 5.0


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


PROMPT = 70  # tokens that all rows of the trial begin with
CHANGED = 1  # the row whose own tokens change; packed, it stands between others


def trial_rows(vocabulary: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Five rows with a common prompt, two of which go on alike and one of which ends inside another; and the same with
    the own tokens of row `CHANGED` changed. Packed, they are more than two blocks of FlexAttention's."""
    ids = np.random.default_rng(0).integers(0, vocabulary, PROMPT + 190)
    prompt, answer, middle, tail, last, changed = np.split(ids, PROMPT + np.array([0, 60, 90, 110, 160]))
    middle[0], last[0], changed[0] = (
        (answer[0] + i) % vocabulary for i in (1, 2, 1)
    )  # or they would share with others
    rows = [answer, middle, np.concatenate([answer[:40], tail]), last, answer[:30]]
    rows = [np.concatenate([prompt, row]) for row in rows]
    return rows, [np.concatenate([prompt, changed]) if i == CHANGED else row for i, row in enumerate(rows)]


@torch.no_grad()
def _trial(backbone: PreTrainedModel, kernel: str) -> Verdict:
    name = type(backbone).__name__
    rows, changed = trial_rows(backbone.config.get_text_config().vocab_size)

    ids, position_ids, segments, places = _packed(rows, backbone.device)
    base = run_packed(backbone, ids, position_ids, segments)[0]  # (N, H)
    own = places[CHANGED][PROMPT:]
    elsewhere = torch.cat([place for i, place in enumerate(places) if i != CHANGED]).unique()

    def moved(states: torch.Tensor, where: torch.Tensor) -> float:
        return distance(states[where], base[where])

    padded, padded_changed = padded_states(backbone, rows), padded_states(backbone, changed)
    untouched = (torch.cat([s for i, s in enumerate(states) if i != CHANGED]) for states in (padded_changed, padded))
    usual = FACTOR * distance(*untouched)  # 0, but for experts
    if not moved(run_packed(backbone, *_packed(changed, backbone.device)[:3])[0], elsewhere) <= usual:
        return Verdict(f"{name} lets a row's tokens act on the states of other packed rows")
    shifted = position_ids.clone()
    shifted[0, own] += 3
    states = run_packed(backbone, ids, shifted, _packed(rows, backbone.device)[2])[0]
    if not moved(states, own) > 0 or not moved(states, elsewhere) <= usual:
        return Verdict(f"{name} does not go by the position ids that it is given")

    packed, whole = torch.cat([base[place] for place in places]), torch.cat(padded)
    with rounding(backbone):
        spread = distance(torch.cat(padded_states(backbone, rows)), whole)
    apart = distance(packed, whole)
    said = f"{apart:.2g} from padded states, of which rounding alone makes {spread:.2g}"
    if not apart <= FACTOR * spread:
        return Verdict(f"{name} gives other hidden states on packed rows than on padded ones ({said})")
    return Verdict(misread(backbone, segments), f"{kernel} attention; tried: {said}")


def _packed(rows: list[np.ndarray], device: torch.device) -> tuple:
    ids, position_ids, segments, places = pack([rows], share=True)
    return (
        ids.to(device),
        position_ids.to(device),
        segments,
        [torch.from_numpy(place).to(device) for place in places[0]],
    )


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
    """Root mean square of the difference over that of `of`; both (tokens, H)."""
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
