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

Three things are easy to get wrong and are settled here:

1. Gap and margin are both (pairs,). A (pairs,) minus a (pairs, 1) broadcasts to (pairs, pairs), compares every gap
   with every margin, and its mean trains the calibration away without an error. `reward_loss` refuses other shapes.
2. Nothing here averages over pairs: each function returns one value a pair, because the mean is over all pairs of the
   optimizer step, and only the trainer knows how many micro-batches and ranks that is.
3. Language-model terms are reduced in fp32 whatever the weights' precision, chunk by chunk: logits of more than
   `chunk_size` tokens never exist, neither in the forward nor, being recomputed, in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from distiller.records import InputError

# Logit of an id taken out of a distribution: its probability is exactly 0, and unlike -inf it leaves 0 * (a - b) = 0.
REMOVED = -1e30


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
    return (gap - m) ** 2  # margin_regression, distilrm


class GenerativeTerms(NamedTuple):
    """Language-model terms of a batch; every field is (pairs,)."""

    sft: torch.Tensor  # fp32, nats a token
    kl: torch.Tensor  # fp32, nats a token times T^2
    tokens: torch.Tensor  # long: response tokens, the n of `sft`
    kl_tokens: torch.Tensor  # long: response tokens whose target both vocabularies have, the n of `kl`


def generative_losses(
    student_hidden: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    pair_index: torch.Tensor,
    num_pairs: int,
    teacher_logits: Callable[[slice], torch.Tensor] | None = None,
    shared_ids: torch.Tensor | int | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> GenerativeTerms:
    """SFT and forward KL per pair from the hidden states that predict response tokens, `chunk_size` tokens at a time.

    student_hidden (tokens, H): the student's last hidden state *before* each response token (position t - 1 predicts
        token t); the caller picks and shifts, so prompt and padding never arrive here.
    lm_head: (chunk, H) -> (chunk, V_student) logits, with whatever scaling or soft cap the model applies to them.
    targets (tokens,) long: the response token ids.
    pair_index (tokens,) long: the pair each token belongs to, in [0, num_pairs).
    teacher_logits: a slice of the same token axis -> (chunk, V_teacher); called without gradient, and once more for
        every chunk in the backward pass. None leaves the KL term out: `kl` and `kl_tokens` are 0.
    shared_ids: ids both vocabularies have, a bool mask over the first ids or a number n (ids below n). All others
        are removed from both distributions, the rest renormalized; a position whose target is not shared is left out
        of the KL and of its n. None says that the vocabularies are equal. SFT is over the student's whole vocabulary
        and counts every token.
    temperature: divides both logits in the KL, whose value is multiplied by its square.

    A pair without response tokens has 0 for both terms. Raises ValueError for shapes that do not fit.
    """
    num_tokens = student_hidden.shape[0]
    if student_hidden.dim() != 2 or targets.shape != (num_tokens,) or pair_index.shape != (num_tokens,):
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)}, targets {tuple(targets.shape)} and pair_index "
            f"{tuple(pair_index.shape)} must be (tokens, H), (tokens,), (tokens,)"
        )
    if not temperature > 0 or chunk_size < 1:
        raise ValueError(f"temperature {temperature} must be above 0 and chunk_size {chunk_size} at least 1")
    shared = _shared_mask(shared_ids, targets.device)
    counted = _counted(targets, shared) if teacher_logits is not None else torch.zeros_like(targets, dtype=torch.bool)

    sft_sum = torch.zeros(num_pairs, device=student_hidden.device)  # (pairs,)
    kl_sum = torch.zeros(num_pairs, device=student_hidden.device)  # (pairs,)
    # With no token at all the head still sees one empty chunk, so that its parameters are in the graph of every rank.
    for start in range(0, max(num_tokens, 1), chunk_size):
        rows = slice(start, min(start + chunk_size, num_tokens))

        def chunk_terms(hidden: torch.Tensor, rows: slice = rows) -> tuple[torch.Tensor, torch.Tensor]:
            logits = lm_head(hidden).float()  # (chunk, V_student)
            sft = F.cross_entropy(logits, targets[rows], reduction="none")  # (chunk,)
            if teacher_logits is None:
                return sft, torch.zeros_like(sft)
            with torch.no_grad():
                teacher = teacher_logits(rows).float()  # (chunk, V_teacher)
            kl = _forward_kl(logits, teacher, shared, temperature)  # (chunk,)
            return sft, torch.where(counted[rows], kl, 0.0)

        # The heads have no dropout: there is no random state to keep for the recomputation.
        sft, kl = checkpoint(chunk_terms, student_hidden[rows], use_reentrant=False, preserve_rng_state=False)
        sft_sum = sft_sum.index_add(0, pair_index[rows], sft)
        kl_sum = kl_sum.index_add(0, pair_index[rows], kl)

    tokens = torch.bincount(pair_index, minlength=num_pairs)  # (pairs,)
    kl_tokens = torch.bincount(pair_index[counted], minlength=num_pairs)  # (pairs,)
    return GenerativeTerms(
        sft=sft_sum / tokens.clamp(min=1),
        kl=kl_sum * temperature**2 / kl_tokens.clamp(min=1),
        tokens=tokens,
        kl_tokens=kl_tokens,
    )


def _shared_mask(shared_ids: torch.Tensor | int | None, device: torch.device) -> torch.Tensor | int | None:
    """A mask whose True values are a prefix becomes their number: slicing is cheaper than masking."""
    if not isinstance(shared_ids, torch.Tensor):
        return shared_ids
    if shared_ids.dim() != 1 or shared_ids.dtype != torch.bool:
        raise ValueError(f"shared_ids must be a 1-d bool mask, got {shared_ids.dtype} {tuple(shared_ids.shape)}")
    count = int(shared_ids.sum())
    return count if bool(shared_ids[:count].all()) else shared_ids.to(device)


def _counted(targets: torch.Tensor, shared: torch.Tensor | int | None) -> torch.Tensor:
    """(tokens,) bool: the target is an id that both vocabularies have."""
    if shared is None:
        return torch.ones_like(targets, dtype=torch.bool)
    if isinstance(shared, int):
        return targets < shared
    return (targets < shared.numel()) & shared[targets.clamp(max=shared.numel() - 1)]


def _forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, shared: torch.Tensor | int | None, temperature: float
) -> torch.Tensor:
    """KL(p_T || p_S) over the shared ids: fp32 logits (chunk, V_student) and (chunk, V_teacher) -> (chunk,)."""
    width = student.shape[1] if shared is None else shared if isinstance(shared, int) else shared.numel()
    fits = student.shape[1] == teacher.shape[1] if shared is None else width <= min(student.shape[1], teacher.shape[1])
    if not fits or teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} do not fit together"
            + (": give shared_ids" if shared is None else f" with {width} shared ids")
        )
    student, teacher = student[:, :width] / temperature, teacher[:, :width] / temperature  # (chunk, width)
    if isinstance(shared, torch.Tensor):
        student, teacher = student.masked_fill(~shared, REMOVED), teacher.masked_fill(~shared, REMOVED)
    log_p_student, log_p_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)
