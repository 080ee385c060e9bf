"""The reward head in fp32, whatever precision trains the rest.

A reward near 8 has steps of 1/32 in bf16, and weights of 0.02 do not move by steps of 1e-5. Under autocast that is
mended by leaving the head out of it. DeepSpeed's 16-bit modes cast every parameter of a model and hold the fp32 one,
which learns, in the optimizer. So there the head computes with copies of the optimizer's weights, taken anew after
each step: `hold_masters` before the engine casts, `MastersAtStart` before the first step, `follow_masters` after each
one. Gradients pass through 16 bits, as everywhere.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


class Float32Linear(nn.Linear):
    """A linear layer in fp32 under autocast too.

    masters: by parameter name, fp32 values to compute with in place of the parameters', which get the gradient. No
    parameters nor buffers, so that nothing but this file moves or casts them. The casts are inside `forward` because
    ZeRO-3 gathers a module's weights only there.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.masters: dict[str, torch.Tensor] = {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self._fp32("weight"), None if self.bias is None else self._fp32("bias"))

    def _fp32(self, name: str) -> torch.Tensor:
        own = getattr(self, name).float()
        if name not in self.masters:
            return own
        # The master's value and the parameter's gradient; the difference is exact, one being the other rounded.
        return own + (self.masters[name].to(own.device) - own).detach()


def float32_layers(student: nn.Module) -> dict[str, Float32Linear]:
    """The reward head's layers, by their names in the student."""
    # Looked for there alone: it is done once a step, and a student has many modules.
    modules = student.score.named_modules(prefix="score")
    return {name: module for name, module in modules if isinstance(module, Float32Linear)}


def hold_masters(student: nn.Module) -> None:
    """Keep the head's weights as they are now, and compute with them."""
    for layer in float32_layers(student).values():
        layer.masters = {n: p.detach().float().clone() for n, p in layer.named_parameters(recurse=False)}


def with_masters(student: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's state, as DeepSpeed gathers it in 16 bits, with the masters in place of their rounded copies."""
    state = dict(state)
    for name, layer in float32_layers(student).items():
        state |= {
            f"{name}.{part}": master.to(state[f"{name}.{part}"].device) for part, master in layer.masters.items()
        }
    return state


class MastersAtStart(TrainerCallback):
    """Once the engine stands, and has loaded its checkpoint where there is one, whether or not a step follows."""

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        if not state.global_step and not is_deepspeed_zero3_enabled():  # which has them in 16 bits from the beginning
            set_masters(model)
        follow_masters(model)


def set_masters(student: nn.Module) -> None:
    """Give DeepSpeed's optimizer the weights that are held, in place of those it rounded. All ranks together."""
    from deepspeed.utils import safe_set_full_fp32_param  # it chooses its accelerator when first imported

    for layer in float32_layers(student).values():
        for name, master in layer.masters.items():
            parameter = getattr(layer, name)
            safe_set_full_fp32_param(parameter, master.to(parameter.device))


def follow_masters(student: nn.Module) -> None:
    """Compute with what DeepSpeed's optimizer has now; nothing where no masters are held. All ranks together."""
    for layer in float32_layers(student).values():
        for name in layer.masters:
            from deepspeed.utils import safe_get_full_fp32_param  # here, because most runs have no DeepSpeed

            layer.masters[name] = safe_get_full_fp32_param(getattr(layer, name)).detach().clone()
