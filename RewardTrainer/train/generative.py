"""The language-model terms of a batch, without its logits: SFT and forward KL, chunk by chunk, gradient included.

For a response of n tokens, teacher p_T, student p_S with logits z, q = softmax(z), and q', p' the two softmaxes at
temperature T (`losses.py` has the terms):

    dL_sft/dz_t = (q - onehot(y_t)) / n          dL_kl/dz_t = T (q' - p') / n

A vocabulary of 151,936 makes logits the largest tensor of training by far. Automatic differentiation keeps them,
several times (logits, log-probabilities, gradients, of student and teacher), or computes them twice. Here each chunk
of tokens goes through the head once: its logits, its terms, and at once its gradient by the hidden states and by the
head's weight, which are all that is kept for the backward pass. Three things follow:

1. The terms are weighted and summed *inside*. A gradient that exists before the backward pass can only be multiplied
   by one number afterwards, so `loss` is a scalar, sum_pairs (sft_weight L_sft + kl_weight L_kl), and the terms
   themselves carry no gradient.
2. Everything is reduced in fp32 whatever the weights' precision, and the weight's gradient is added up in fp32.
3. Ids that only one vocabulary has are taken out of both distributions of the KL and the rest renormalized; positions
   whose token is one of them are left out of the KL and of its n. SFT is over the student's whole vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import nn

from RewardTrainer.train.top_k import REMOVED, TopK

# fp32 logits that elementwise work is done on at once: what the cache of a CPU's core holds; what keeps a GPU busy.
BLOCK_ELEMENTS = {"cpu": 2**18 * torch.get_num_threads(), "cuda": 2**25}

# Tokens whose logits exist at once. Each chunk adds to the whole gradient of the head's weight, (V, H) in fp32: fewer
# chunks pay on a GPU, and on a CPU what its caches hold.
CHUNK = {"cpu": 256, "cuda": 1024}

TeacherSignal = Callable[[slice], torch.Tensor | TopK]
"""A slice of a batch's response tokens -> what the teacher says of them: all its logits, (chunk, V_teacher), or the
most likely ids alone. Called without gradient."""


class Head(Protocol):
    """What `generative_losses` needs to know of an LM head (`student.LanguageHead`)."""

    weight: nn.Parameter  # (V, H)
    bias: nn.Parameter | None  # (V,)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(tokens, H) -> (tokens, V): the linear layer, then scale and soft cap."""

    def undo_cap(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient by the logits -> gradient by the linear layer's output, both (tokens, V)."""


class GenerativeTerms(NamedTuple):
    """Language-model terms of a batch."""

    loss: torch.Tensor  # fp32 scalar, with gradient: sum over pairs of sft_weight * sft + kl_weight * kl
    sft: torch.Tensor  # (pairs,) fp32, nats a token, no gradient
    kl: torch.Tensor  # (pairs,) fp32, nats a token times T^2, no gradient
    tokens: torch.Tensor  # (pairs,) long: response tokens, the n of `sft`
    kl_tokens: torch.Tensor  # (pairs,) long: response tokens whose target both vocabularies have, the n of `kl`


def generative_losses(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    pair_index: torch.Tensor,
    num_pairs: int,
    teacher: TeacherSignal | None = None,
    sft_weight: float | torch.Tensor = 1.0,
    kl_weight: float | torch.Tensor = 1.0,
    shared_ids: torch.Tensor | int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> GenerativeTerms:
    """SFT and forward KL per pair, and their weighted sum, `chunk_size` tokens at a time (None: `CHUNK`).

    hidden (tokens, H): the student's last hidden state *before* each response token (position t - 1 predicts token
        t); the caller picks and shifts, so prompt and padding never arrive here.
    targets (tokens,) long: the response token ids. pair_index (tokens,) long: the pair of each, in [0, num_pairs).
    teacher: called once a chunk; None leaves the KL term out: `kl` and `kl_tokens` are 0.
    sft_weight, kl_weight: of every pair, or one a pair, (pairs,).
    shared_ids: ids both vocabularies have, a bool mask over the first ids or a number n (ids below n). None says that
        the vocabularies are equal.
    temperature: divides both logits in the KL, whose value is multiplied by its square.

    A pair without response tokens has 0 for both terms. Under autocast the head's products are in its type. A weight
    that needs no gradient costs none. Raises ValueError for shapes that do not fit.
    """
    num_tokens = hidden.shape[0]
    if hidden.dim() != 2 or targets.shape != (num_tokens,) or pair_index.shape != (num_tokens,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)} and pair_index {tuple(pair_index.shape)} "
            "must be (tokens, H), (tokens,), (tokens,)"
        )
    chunk_size = chunk_size or CHUNK.get(hidden.device.type, CHUNK["cuda"])
    if not temperature > 0 or chunk_size < 1:
        raise ValueError(f"temperature {temperature} must be above 0 and chunk_size {chunk_size} at least 1")
    shared = _check_shared(shared_ids)
    counted = _counted(targets, shared) if teacher is not None else torch.zeros_like(targets, dtype=torch.bool)
    # Not `bincount`, nor a choice by `counted`: on a GPU the host would wait for what is under way.
    none = torch.zeros(num_pairs, dtype=torch.long, device=hidden.device)
    tokens = none.index_add(0, pair_index, torch.ones_like(targets))  # (pairs,)
    kl_tokens = none.index_add(0, pair_index, counted.long())  # (pairs,)

    # What a token's term weighs in `loss`: its pair's weight over its pair's n, with the T^2 of the definition.
    sft_share = (sft_weight / tokens.clamp(min=1))[pair_index].float()  # (tokens,)
    kl_share = (kl_weight * temperature**2 / kl_tokens.clamp(min=1))[pair_index].float() * counted  # (tokens,)
    loss, sft, kl = _LanguageTerms.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        teacher,
        targets,
        sft_share,
        kl_share,
        shared,
        temperature,
        chunk_size,
        torch.is_grad_enabled(),
    )
    zeros = torch.zeros(num_pairs, device=hidden.device)
    return GenerativeTerms(
        loss=loss,
        sft=zeros.index_add(0, pair_index, sft) / tokens.clamp(min=1),
        kl=zeros.index_add(0, pair_index, kl * counted) * temperature**2 / kl_tokens.clamp(min=1),
        tokens=tokens,
        kl_tokens=kl_tokens,
    )


class _LanguageTerms(torch.autograd.Function):
    """hidden (tokens, H), weight, bias -> loss (scalar) and, without gradient, sft (tokens,), kl (tokens,)."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head, teacher, targets, sft_share, kl_share, shared, temperature, chunk, grad
    ):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        need_hidden, need_weight, need_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        grad = need_hidden or need_weight or need_bias
        # Gradients are made for shares of at most 1 and multiplied by `unit` in fp32 in the backward pass: in fp16 a
        # token's share of a step's loss would make them vanish.
        unit = torch.stack([sft_share.abs().max(), kl_share.abs().max()]).max() if len(targets) else sft_share.sum()
        unit = torch.where(unit > 0, unit, 1.0)

        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        sft, kl = torch.empty_like(sft_share), torch.zeros_like(kl_share)  # (tokens,)
        with torch.autocast(device, enabled=False):
            low, low_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
            low_bias = None if bias is None else bias.detach().to(dtype)
            block = max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"]) // weight.shape[0])
            for start in range(0, len(targets), chunk):
                rows = slice(start, min(start + chunk, len(targets)))
                logits = head.logits(low[rows], low_weight, low_bias)  # (chunk, V)
                said = None if teacher is None else teacher(rows)  # (chunk, V_teacher), or a TopK
                for first in range(0, rows.stop - start, block):
                    part = slice(first, min(first + block, rows.stop - start))
                    own = slice(start + part.start, start + part.stop)
                    sft[own], kl[own], gradient = token_terms(
                        logits[part].float(),
                        None if said is None else said[part],
                        targets[own],
                        sft_share[own] / unit if grad else None,
                        kl_share[own] / unit,
                        shared,
                        temperature,
                    )
                    if grad:
                        logits[part] = head.undo_cap(gradient, logits[part])
                if need_hidden:
                    grad_hidden[rows] = logits @ low_weight
                if need_bias:
                    grad_bias += logits.sum(0, dtype=torch.float32)
                if need_weight:
                    _add_product(grad_weight, logits.t(), low[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, unit)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(sft, kl)
        return (sft * sft_share).sum() + (kl * kl_share).sum(), sft, kl

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        *gradients, unit = ctx.saved_tensors
        scaled = (
            None if gradient is None else gradient.mul_(grad_loss * unit).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, *(None for _ in range(9))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in fp32; without a temporary where all are fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def token_terms(
    student: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    targets: torch.Tensor,
    sft_share: torch.Tensor | None,
    kl_share: torch.Tensor | None,
    shared: torch.Tensor | int | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | None]:
    """A few tokens' terms and the gradient of their weighted sum by the student's logits, all fp32.

    student (tokens, V), teacher (tokens, V_teacher), `TopK` or None, targets (tokens,). sft_share, kl_share (tokens,):
    weight of each term in the sum; sft_share None asks for no gradient.
    Returns -log p_S(y) (tokens,), KL(p_T || p_S) at the temperature (tokens,) or 0.0, gradient (tokens, V) or None.
    """
    log_q = student.log_softmax(-1)  # (tokens, V)
    sft = -log_q.gather(1, targets[:, None]).squeeze(1)
    kl, kl_gradient = 0.0, None
    if teacher is not None:
        whole = not isinstance(shared, torch.Tensor) and shared in (None, student.shape[1])
        known = log_q if whole and temperature == 1 else None
        kl, kl_gradient = forward_kl(student, teacher, shared, temperature, known, value_only=sft_share is None)
    if sft_share is None:
        return sft, kl, None
    gradient = log_q.exp_().mul_(sft_share[:, None])
    gradient.scatter_add_(1, targets[:, None], -sft_share[:, None])
    if kl_gradient is not None:
        gradient[:, : kl_gradient.shape[1]].addcmul_(kl_gradient, (kl_share / temperature)[:, None])
    return sft, kl, gradient


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor | TopK,
    shared: torch.Tensor | int | None,
    temperature: float,
    log_q: torch.Tensor | None = None,
    value_only: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(p_T || p_S) at the temperature over the shared ids, (tokens,), and p_S - p_T, (tokens, width).

    student (tokens, V_student): fp32 logits. teacher: logits (tokens, V_teacher), or a `TopK`, which has a KL and
    gradient of its own. log_q: the student's log-probabilities, where the caller has them already (all ids shared,
    temperature 1).
    """
    dense = isinstance(teacher, torch.Tensor)
    width = student.shape[1] if shared is None else shared if isinstance(shared, int) else shared.numel()
    sizes = {student.shape[1], teacher.shape[1]} if dense else {student.shape[1]}
    fits = sizes == {width} if shared is None else width <= min(sizes)
    if not fits or teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher's {tuple(teacher.shape)} do not fit together"
            + (": give shared_ids" if shared is None else f" with {width} shared ids")
        )

    def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = logits[:, :width] if temperature == 1 else logits[:, :width] / temperature
        if isinstance(shared, torch.Tensor):
            logits = logits.masked_fill(~shared, REMOVED)
        return logits.log_softmax(-1)

    log_s = log_probabilities(student) if log_q is None else log_q
    if not dense:
        return teacher.kl(log_s, shared, temperature, value_only)
    log_p = log_probabilities(teacher.float())
    p = log_p.exp()
    kl = torch.linalg.vecdot(p, log_p.sub_(log_s))  # log_p is now log p - log s: exactly 0 where they agree
    return kl, None if value_only else log_s.exp().sub_(p)


def compact_shared(shared_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | int | None:
    """`shared_ids` for many calls: a mask whose True values are a prefix becomes their number, which costs no masking.

    Once a run, because it reads the mask.
    """
    if shared_ids is None:
        return None
    count = int(_check_shared(shared_ids).sum())
    return count if bool(shared_ids[:count].all()) else shared_ids.to(device)


def _check_shared(shared_ids: torch.Tensor | int | None) -> torch.Tensor | int | None:
    if isinstance(shared_ids, torch.Tensor) and (shared_ids.dim() != 1 or shared_ids.dtype != torch.bool):
        raise ValueError(f"shared_ids must be a 1-d bool mask, got {shared_ids.dtype} {tuple(shared_ids.shape)}")
    return shared_ids


def _counted(targets: torch.Tensor, shared: torch.Tensor | int | None) -> torch.Tensor:
    """(tokens,) bool: the target is an id that both vocabularies have."""
    if shared is None:
        return torch.ones_like(targets, dtype=torch.bool)
    if isinstance(shared, int):
        return targets < shared
    return (targets < shared.numel()) & shared[targets.clamp(max=shared.numel() - 1)]
