"""Fused norms, MLPs and rotary embeddings on a GPU: liger-kernel's, tried on the very model before they are relied on.

A decoder layer's norms, SwiGLU and rotary embeddings are many small kernels that move memory and compute next to
nothing; each becomes one. Losses are not liger's: ours never hold the logits (`train/generative.py`).
"""

import logging
import sys

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from distiller.records import InputError
from RewardTrainer.packing_trial import FACTOR, FLOOR, distance, padded_states, rounding, trial_rows

# Of kernels for other devices, which it tries to import one after the other, it says as a warning what each lacks.
logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)
NO_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_fused_layers(
    backbone: PreTrainedModel,
    device: torch.device,
    wanted: bool | None = None,
    options: dict | None = None,
    runnable: bool = True,
) -> str:
    """Put liger-kernel's layers into the model where they can be had; what was done, for the log.

    device: where the model is to run. wanted: None takes them on a GPU where liger-kernel is installed and knows the
    model. options: its own switches (rope, rms_norm, swiglu, ...). runnable: whether it can be called there now.
    Where they fail, or give other states than the model's own layers do, the model is as it was. Raises InputError
    where they are wanted all the same.
    """
    if wanted is False:
        return "the model's own layers, as asked"
    reason = _why_not(backbone, device)
    if reason is not None:
        if wanted:
            raise InputError(f"--use_liger_kernel: {reason}; train without it")
        return f"the model's own layers ({reason})"
    rows = trial_rows(backbone.config.get_text_config().vocab_size)
    training, before = backbone.training, _as_it_is(backbone)
    backbone.eval()
    try:
        if runnable:
            own = _states(backbone, rows)
            with rounding(backbone):
                spread = FLOOR + distance(_states(backbone, rows), own)
        apply_liger_kernel(backbone, (options or {}) | NO_LOSSES)
        done = "liger-kernel's layers"
        if runnable:
            apart = distance(_states(backbone, rows), own)
            done += f", {apart:.2g} from the model's own (rounding: {spread:.2g})"
            if not apart <= FACTOR * spread:
                reason = f"liger-kernel changes what {type(backbone).__name__} computes: {apart:.2g}, not {spread:.2g}"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ImportError) as fault:  # it does not fit this model, or machine
        reason = f"liger-kernel failed on {type(backbone).__name__}: {str(fault).strip().partition(chr(10))[0]}"
    finally:
        backbone.train(training)
    if reason is None:
        # The instance has them. Their classes, which liger-kernel also puts into the model's file, would be in every
        # model made later; of functions, which are looked up when they are called, there is one for all.
        for space, old in before:
            space.update({name: value for name, value in old.items() if isinstance(value, type)})
        return done
    _restore(before)
    if wanted:
        raise InputError(f"--use_liger_kernel: {reason}; train without it")
    return f"the model's own layers ({reason})"


def _as_it_is(backbone: PreTrainedModel) -> list[tuple[dict, dict]]:
    """What liger-kernel changes in place, each with a copy: the modules' attributes, and the names in their file."""
    modules = [*backbone.modules()]
    files = {id(vars(file)): vars(file) for module in modules if (file := sys.modules.get(type(module).__module__))}
    return [(space, dict(space)) for space in (*(module.__dict__ for module in modules), *files.values())]


def _restore(before: list[tuple[dict, dict]]) -> None:
    for space, old in before:
        for name in space.keys() - old.keys():
            del space[name]
        space.update(old)


def _why_not(backbone: PreTrainedModel, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "liger-kernel needs a GPU"
    if not is_liger_kernel_available():
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # asks for a GPU when imported

    if backbone.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel does not know {backbone.config.model_type}"
    return None


@torch.no_grad()
def _states(backbone: PreTrainedModel, rows: list) -> torch.Tensor:
    """(tokens of all rows, H) of the model's own padded forward."""
    return torch.cat(padded_states(backbone, rows))
