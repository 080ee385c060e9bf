"""The student: one backbone, a scalar reward head, and (for the generative terms) its language-model head.

Why one `forward` for everything. ZeRO-3, FSDP and DDP act through hooks around `forward`: a reward read from one call
and logits computed by hand from another would miss gathered parameters or gradient reduction. So one call takes every
row of the batch, passes the backbone once and returns rewards and the weighted generative loss; the trainer only
averages.

Four points that are easy to get wrong:

1. The reward is read at a row's last token, wherever the padding is, and the head works in fp32 with autocast off: a
   bf16 reward near 8 has steps of 1/32.
2. Rewards never touch the LM head, and the LM head sees response tokens only.
3. The LM head is one module with its own reference to the weight. Under ZeRO-3 a module gathers its own parameters
   once around its `forward`; calling `nn.Linear` once a chunk would gather once a chunk, and ranks with different
   numbers of chunks would wait for each other for ever.
4. Backbone and LM head of a tied model share one `nn.Parameter`; checkpoints write it once (`checkpoint.py`).
"""

import logging
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils.generic import is_flash_attention_requested

from distiller.records import InputError
from RewardTrainer.eval.engines.loading import from_pretrained
from RewardTrainer.packing import Segments, run_packed
from RewardTrainer.packing_trial import judge
from RewardTrainer.train.batches import Layout
from RewardTrainer.train.fp32_head import Float32Linear
from RewardTrainer.train.generative import GenerativeTerms, TeacherSignal, generative_losses

logger = logging.getLogger(__name__)

MLP_WIDTH = 1024  # hidden layer of the MLP head, as in the paper's code

# Config attributes with which a causal LM of the library changes its logits after the LM head.
LOGIT_SCALES = {"logit_scale": lambda value: value, "logits_scaling": lambda value: 1 / value}


def reward_head(kind: str, hidden_size: int, std: float = 0.02) -> nn.Module:
    """A fresh fp32 head, (rows, hidden_size) -> (rows, 1); `kind`: linear (no bias) or mlp (one hidden layer)."""
    if kind == "linear":
        head = Float32Linear(hidden_size, 1, bias=False, dtype=torch.float32)
    elif kind == "mlp":
        head = nn.Sequential(Float32Linear(hidden_size, MLP_WIDTH), nn.ReLU(), Float32Linear(MLP_WIDTH, 1)).float()
    else:
        raise InputError(f"--head {kind}: unknown; choose linear or mlp")
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return head


class LanguageHead(nn.Module):
    """Hidden states -> per-pair generative terms; holds the LM head's weight (V, H), bias and logit scaling."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, config: PreTrainedConfig):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.scale = 1.0
        for name, scale in LOGIT_SCALES.items():  # Cohere, Granite
            if getattr(config, name, None) is not None:
                self.scale = scale(getattr(config, name))

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(tokens, H) -> (tokens, V), as the whole causal LM would give them; weight and bias None: the head's own."""
        if weight is None:
            weight, bias = self.weight, self.bias
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def undo_cap(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient by `logits` -> gradient by the linear layer's output, in place; both (tokens, V)."""
        if self.cap is not None:
            gradient.mul_(1 - (logits.float() / self.cap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def forward(self, hidden: torch.Tensor, **terms) -> tuple[torch.Tensor, ...]:
        """`generative.generative_losses` on hidden (tokens, H), as a plain tuple: hooks look for tensors in those."""
        return tuple(generative_losses(hidden, self, **terms))


class RewardStudent(nn.Module):
    """See the module docstring. `language_head` may be None (no LM head); `head` is the reward head's kind."""

    accepts_loss_kwargs = False  # the trainer, not this forward, averages over pairs

    def __init__(
        self, backbone: PreTrainedModel, score: nn.Module, language_head: LanguageHead | None, head: str = "linear"
    ):
        super().__init__()
        self.backbone = backbone
        self.score = score
        self.language_head = language_head
        self.head = head
        self.config = backbone.config
        self._no_split_modules = backbone._no_split_modules  # the layers that FSDP shards one by one

    @property
    def tied(self) -> bool:
        """Whether the LM head's weight is the input embedding itself."""
        return (
            self.language_head is not None and self.language_head.weight is self.backbone.get_input_embeddings().weight
        )

    def train(self, mode: bool = True) -> "RewardStudent":
        """As `nn.Module.train`; the Trainer asks for it before every forward, and where all is in that mode already a
        walk through hundreds of modules would let a GPU wait."""
        return self if mode == self.training == self.backbone.training else super().train(mode)

    def gradient_checkpointing_enable(self, **options) -> None:
        """Called by the Trainer for `--gradient_checkpointing`; the options are those of `PreTrainedModel`."""
        self.backbone.gradient_checkpointing_enable(**options)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        """(rows, L) -> (rows, L, H), after the final norm; packed (1, N) -> (1, N, H)."""
        return _hidden_states(self.backbone, input_ids, attention_mask, position_ids, segments)

    def read_rewards(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(rows, L, H), (rows, L) -> fp32 (rows,): the head at each row's last token that is not padding."""
        positions = torch.arange(attention_mask.shape[1], device=hidden.device)
        last = (positions * attention_mask.long()).argmax(-1)  # (rows,)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # (rows, H)
        return self.score(pooled).squeeze(-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segments: Segments | None = None,
        reward_index: torch.Tensor | None = None,
        gen_index: torch.Tensor | None = None,
        gen_targets: torch.Tensor | None = None,
        gen_pairs: torch.Tensor | None = None,
        **terms,
    ) -> dict[str, torch.Tensor]:
        """Rewards, and the generative terms.

        The rows are those of `batches.PairCollator`, in either layout: padded (rows, L) with attention_mask, or (1, N)
        with position_ids and segments.
        reward_index (rewards,): where rewards are read in the flattened rows; None: at each row's last token.
        gen_index, gen_targets, gen_pairs (tokens,): the response tokens, see `batches.py`; None leaves their terms
            out. `terms` goes to `generative.generative_losses`.

        Returns {"rewards": fp32 (rewards,)} and, with gen_index, the fields of `generative.GenerativeTerms`.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, segments)
        flat = hidden.flatten(0, 1)  # (rows * L, H)
        if reward_index is None:
            outputs = {"rewards": self.read_rewards(hidden, attention_mask)}
        else:
            outputs = {"rewards": self.score(flat[reward_index]).squeeze(-1)}
        if gen_index is None:
            return outputs
        values = self.language_head(flat[gen_index], targets=gen_targets, pair_index=gen_pairs, **terms)
        return outputs | dict(zip(GenerativeTerms._fields, values, strict=True))


def _hidden_states(backbone, input_ids, attention_mask, position_ids, segments) -> torch.Tensor:
    """Last hidden states of padded rows, or of a packed batch where there are segments."""
    if segments is not None:
        return run_packed(backbone, input_ids, position_ids, segments)
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def runnable(backbone: PreTrainedModel) -> bool:
    """Whether the model can be tried now: not with its weights in parts (ZeRO-3), nor flash attention on a CPU."""
    flash = is_flash_attention_requested(backbone.config) and backbone.device.type == "cpu"
    return not flash and not hf_deepspeed.is_deepspeed_zero3_enabled()


def choose_layout(
    name: str, backbone: PreTrainedModel, wanted: Layout | None, device: torch.device | None = None
) -> Layout:
    """`--layout`, or the best one that this model allows, with the reason logged; `name` is for what is said about it.

    device: where the model is to run, None where it is; only there can it be tried. Raises InputError with the reason
    where a wanted layout cannot be served.
    """
    if wanted == "padded":
        logger.info("%s: rows are padded, as asked", name)
        return wanted
    verdict = judge(backbone, runnable(backbone), device)
    if verdict.reason is None:
        layout = wanted or "shared_prefix"
        logger.info("%s: layout %s, %s", name, layout, verdict.note)
        return layout
    if wanted is not None:
        raise InputError(f"--layout {wanted}: the {name} cannot be run so: {verdict.reason}; use --layout padded")
    logger.info("%s: rows are padded, because %s", name, verdict.reason)
    return "padded"


def split_causal_lm(lm: PreTrainedModel) -> tuple[PreTrainedModel, LanguageHead]:
    """Backbone and LM head of a causal LM. InputError if its logits are more than head, scale and soft cap."""
    backbone, output = lm.base_model, lm.get_output_embeddings()
    name = type(lm).__name__
    try:
        backbone.get_input_embeddings()
    except NotImplementedError:  # a decoder in a wrapper of its own, as BART's
        backbone = lm
    if backbone is lm or not isinstance(output, nn.Linear):
        raise InputError(f"{name} is not a backbone with a linear LM head on top: neither student nor live teacher")
    language_head = LanguageHead(output.weight, output.bias, lm.config)
    if runnable(backbone):
        ids = torch.arange(4, device=output.weight.device).unsqueeze(0) + lm.config.get_text_config().vocab_size // 2
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad():
                theirs = lm(input_ids=ids, use_cache=False).logits.float()
                ours = language_head.logits(backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
        except (RuntimeError, ValueError, TypeError) as fault:
            said = str(fault).strip().partition("\n")[0]
            raise InputError(
                f"{name} cannot be a student or a live teacher: its LM head on its hidden states fails ({said})"
            ) from fault
        finally:
            lm.train(training)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            raise InputError(
                f"{name} makes its logits of hidden states in a way not known here: neither student nor live teacher"
            )
    return backbone, language_head


@contextmanager
def plain_loading():
    """Load or build models whole, though a ZeRO-3 config is active: the frozen teacher, models on the meta device."""
    active = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = None if active is None else active()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


class LiveTeacher:
    """A frozen causal LM beside the trained model, never inside it: no optimizer or ZeRO engine sees its weights."""

    def __init__(self, lm: PreTrainedModel):
        lm.requires_grad_(False).eval()
        self.backbone, self.language_head = split_causal_lm(lm)
        self.config = lm.config

    @classmethod
    def load(cls, path: str, device: torch.device, **load_args) -> "LiveTeacher":
        """Whole on `device`, in the dtype of `load_args`, whatever the ZeRO stage."""
        with plain_loading():
            return cls(from_pretrained(AutoModelForCausalLM, path, **load_args).to(device))

    @torch.no_grad()
    def signal_for(
        self,
        input_ids: torch.Tensor,
        index: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segments: Segments | None = None,
    ) -> TeacherSignal:
        """Teacher logits of the response tokens, on demand, for `generative.generative_losses`.

        The rows are in the teacher's own tokens and template, padded or packed; index (tokens,) is `teacher_index` of
        `batches.py`. The backbone runs here, once; the LM head runs when a slice of the tokens is asked for, so no
        (tokens, V) tensor exists here either.
        """
        hidden = _hidden_states(self.backbone, input_ids, attention_mask, position_ids, segments)
        picked = hidden.flatten(0, 1)[index]  # (tokens, H)
        return lambda tokens: self.language_head.logits(picked[tokens])
