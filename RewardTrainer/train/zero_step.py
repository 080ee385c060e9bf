"""The end of a step under DeepSpeed's ZeRO-1 and -2: the same weights, without what costs a GPU a tenth of the step.

DeepSpeed 0.19 takes the norm of the gradients from a copy of them in fp64, clips them in a pass of its own, and has
the host wait for the norm before that, so that the device has nothing to do when the next step begins. Here the norm
is summed in fp32 from the gradients as they are and stays on the device, and the optimizer's kernel divides by it:
torch's fused ones take a `grad_scale`, as `torch.amp.GradScaler` gives it to them.

DeepSpeed's methods are replaced on the one optimizer.
"""

from collections.abc import Sequence

import torch
from transformers import TrainerCallback


class LightZeroStep(TrainerCallback):
    """Once the engine stands."""

    def on_train_begin(self, args, state, control, optimizer=None, **_) -> None:
        lighten(optimizer.optimizer)


def lighten(zero) -> bool:
    """zero: DeepSpeed's optimizer. False where it stays as it is: ZeRO-3, fp16 (whose scale the host must know),
    weights kept in the CPU's memory, or another optimizer than a fused one of torch."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # it chooses its accelerator when imported

    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.dtype == torch.float16 or zero.cpu_offload:
        return False
    if not all(group.get("fused") for group in zero.optimizer.param_groups):
        return False

    def norm_in_fp32(gradients: Sequence[torch.Tensor], params, norm_type: float = 2) -> torch.Tensor:
        """() fp32, over all ranks; -1 where it is not finite, as DeepSpeed has it."""
        squares = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in gradients]
        total = torch.stack(squares).sum()
        if ranks > 1:
            torch.distributed.all_reduce(total, group=zero.dp_process_group)
        return torch.where(total.isfinite(), total.sqrt(), -1.0)

    def clip_in_the_optimizer(gradients, norm: torch.Tensor | None) -> None:
        if zero.clip_grad > 0:
            scale = ((norm + 1e-6) / zero.clip_grad).clamp(min=1.0)
            zero.optimizer.grad_scale = torch.where(norm < 0, torch.inf, scale)

    ranks = torch.distributed.get_world_size(zero.dp_process_group)
    plain = zero.gradient_accumulation_dtype == zero.dtype  # another one is filled while gradients are reduced
    if ranks == 1 and plain and not (zero.contiguous_gradients or zero.overlap_comm):
        zero.reduce_ready_partitions_and_remove_grads = lambda param, group: None  # they are their own mean
    zero.get_grad_norm_direct = norm_in_fp32
    zero.unscale_and_clip_grads = clip_in_the_optimizer
    return True
