"""Fused norms, MLPs and rotary embeddings on a GPU: liger-kernel's, tried on the very model before they are relied on.

A decoder layer's norms, SwiGLU and rotary embeddings are many small kernels that move memory and compute next to
nothing; each becomes one. Losses are not liger's: ours never hold the logits (`train/generative.py`).
"""

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from distiller.records import InputError
from RewardTrainer.packing_trial import FACTOR, distance, padded_states, rounding, trial_rows

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
    Raises InputError where they are wanted and cannot be had, or give other states than the model's own layers do.
    """
    if wanted is False:
        return "the model's own layers, as asked"
    reason = _why_not(backbone, device)
    if reason is not None:
        if wanted:
            raise InputError(f"--use_liger_kernel: {reason}; train without it")
        return f"the model's own layers ({reason})"
    rows = trial_rows(backbone.config.get_text_config().vocab_size)
    training = backbone.training
    backbone.eval()
    if runnable:
        own = _states(backbone, rows)
        with rounding(backbone):
            spread = distance(_states(backbone, rows), own)
    apply_liger_kernel(backbone, (options or {}) | NO_LOSSES)
    if runnable:
        apart = distance(_states(backbone, rows), own)
        if not apart <= FACTOR * spread:
            raise InputError(
                f"liger-kernel changes what {type(backbone).__name__} computes: its states are {apart:.2g} off, and "
                f"rounding alone makes {spread:.2g}; use --use_liger_kernel false"
            )
    backbone.train(training)
    return "liger-kernel's layers" + (
        f", {apart:.2g} from the model's own (rounding: {spread:.2g})" if runnable else ""
    )


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
