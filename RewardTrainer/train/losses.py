"""Every training loss, by name, as pure functions of tensors.

For a pair with rewards r_w (chosen) and r_l (rejected), gap = r_w - r_l, margin m and scores s_w, s_l:

    bt                  -log s(gap)
    margin              -log s(gap - m)
    steerlm             (r_w - s_w)^2 + (r_l - s_l)^2
    lsam                -a log s(gap) - (1 - a) log s(-gap)      with the soft label a = s(m)
    margin_regression   (gap - m)^2
    grm                 bt, plus L_sft on the chosen response
    distilrm            margin_regression, plus L_sft and L_kl on the teacher's answer

and, for a response of n tokens with student p_S and frozen teacher p_T at temperature T,

    L_sft = -1/n sum_t log p_S(y_t)              L_kl = T^2/n sum_t KL(p_T(.; T) || p_S(.; T))

The reward losses are below, the language-model terms in `generative.py`. Two things are easy to get wrong:

1. Gap and margin are both (pairs,). A (pairs,) minus a (pairs, 1) broadcasts to (pairs, pairs), compares every gap
   with every margin, and its mean trains the calibration away without an error. `reward_loss` refuses other shapes.
2. Nothing here averages over pairs: each function returns one value a pair, because the mean is over all pairs of the
   optimizer step, and only the trainer knows how many micro-batches and ranks that is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from distiller.records import InputError


@dataclass(frozen=True)
class LossSpec:
    """What one `--loss_type` is made of.

    needs: numeric record fields every pair must have.
    generative: the record field whose text the language-model terms are computed on; None for a loss on rewards alone.
    sft_weight, kl_weight: default weight of a term; None where the loss has no such term, which then takes no weight.
    """

    needs: tuple[str, ...] = ()
    generative: Literal["chosen", "teacher_response"] | None = None
    sft_weight: float | None = None
    kl_weight: float | None = None

    @property
    def uses_margin(self) -> bool:
        return "margin" in self.needs


LOSSES: dict[str, LossSpec] = {
    "bt": LossSpec(),
    "margin": LossSpec(needs=("margin",)),
    "steerlm": LossSpec(needs=("chosen_score", "rejected_score")),
    "lsam": LossSpec(needs=("margin",)),
    "margin_regression": LossSpec(needs=("margin",)),
    "grm": LossSpec(generative="chosen", sft_weight=1.0),
    "distilrm": LossSpec(needs=("margin",), generative="teacher_response", sft_weight=1.0, kl_weight=1.0),
}


def loss_spec(loss_type: str) -> LossSpec:
    """The entry of `LOSSES`; InputError listing the names if there is none."""
    if loss_type not in LOSSES:
        raise InputError(f"--loss_type {loss_type}: unknown; choose one of {', '.join(LOSSES)}")
    return LOSSES[loss_type]


def check_weights(
    loss_type: str, sft_weight: float | None = None, kl_weight: float | None = None, margin_scale: float = 1.0
) -> tuple[float, float]:
    """Weights (sft, kl) to train with; None means the loss's default, and a term the loss does not have weighs 0.

    Raises InputError for a weight or a margin scale that the chosen loss would ignore, and for a negative or infinite
    one.
    """
    spec = loss_spec(loss_type)
    weights = []
    for flag, value, default in (
        ("sft_weight", sft_weight, spec.sft_weight),
        ("kl_weight", kl_weight, spec.kl_weight),
    ):
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{flag} {value:g}: must be a finite number, 0 or above")
        if value and default is None:
            having = [name for name, other in LOSSES.items() if getattr(other, flag) is not None]
            raise InputError(
                f"--{flag} {value:g} would be ignored: --loss_type {loss_type} has no such term; "
                f"remove the flag or use --loss_type {' or '.join(having)}"
            )
        weights.append(float(value if value is not None else default or 0.0))
    if not 0 < margin_scale < float("inf"):
        raise InputError(f"--margin_scale {margin_scale:g}: must be a finite number above 0")
    if margin_scale != 1.0 and not spec.uses_margin:
        using = [name for name, other in LOSSES.items() if other.uses_margin]
        raise InputError(
            f"--margin_scale {margin_scale:g} would be ignored: --loss_type {loss_type} has no margin; "
            f"remove the flag or use --loss_type {' or '.join(using)}"
        )
    return weights[0], weights[1]


def reward_loss(
    loss_type: str,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | None = None,
    chosen_score: torch.Tensor | None = None,
    rejected_score: torch.Tensor | None = None,
    margin_scale: float = 1.0,
) -> torch.Tensor:
    """Per-pair reward loss, fp32.

    All tensors are (pairs,); fields the loss does not need may be given and are not read. `margin_scale` divides the
    margin in every loss that has one. Raises ValueError for a missing field, for any other shape, and for a scale the
    loss would ignore.
    """
    spec = loss_spec(loss_type)
    check_weights(loss_type, margin_scale=margin_scale)
    given = {"margin": margin, "chosen_score": chosen_score, "rejected_score": rejected_score}
    for name in spec.needs:
        if given[name] is None:
            raise ValueError(f"--loss_type {loss_type} needs `{name}` for every pair, and this batch has none")
    pairs = chosen_rewards.shape[:1]
    for name, tensor in {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, **given}.items():
        if tensor is not None and (tensor.dim() != 1 or tensor.shape != pairs):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected ({pairs[0] if pairs else 'pairs'},): "
                "one value a pair, or broadcasting would compare every pair with every other"
            )

    r_w, r_l = chosen_rewards.float(), rejected_rewards.float()  # (pairs,)
    gap = r_w - r_l  # (pairs,)
    m = margin.float() / margin_scale if spec.uses_margin else None  # (pairs,)
    if loss_type in ("bt", "grm"):
        return -F.logsigmoid(gap)
    if loss_type == "margin":
        return -F.logsigmoid(gap - m)
    if loss_type == "lsam":
        a = torch.sigmoid(m)
        return -a * F.logsigmoid(gap) - (1 - a) * F.logsigmoid(-gap)
    if loss_type == "steerlm":
        return (r_w - chosen_score.float()) ** 2 + (r_l - rejected_score.float()) ** 2
    if loss_type in ("margin_regression", "distilrm"):
        return (gap - m) ** 2
    raise NotImplementedError(f"--loss_type {loss_type} is listed in LOSSES and computed nowhere")


def center_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """(r_w + r_l)^2 of each pair, fp32 (pairs,): what pulls the mean reward to 0 (TRL has it too)."""
    return (chosen_rewards.float() + rejected_rewards.float()) ** 2
