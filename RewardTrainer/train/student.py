"""The student: one backbone, a scalar reward head, and (for the generative terms) its language-model head.

Why one `forward` for everything. ZeRO-3, FSDP and DDP act through hooks around `forward`: a reward read from one call
and logits computed by hand from another would miss gathered parameters or gradient reduction. So one call takes every
row of the batch (chosen, rejected, generative, in that order), passes the backbone once and returns per-pair values;
the trainer only averages.

Four points that are easy to get wrong:

1. The reward is read at the last token whose attention mask is 1, wherever the padding is, and the head works in fp32
   with autocast off: a bf16 reward near 8 has steps of 1/32.
2. Rewards never touch the LM head, and the LM head sees response tokens only.
3. The LM head is one module with its own reference to the weight. Under ZeRO-3 a module gathers its own parameters
   once around its `forward`; calling `nn.Linear` once a chunk would gather once a chunk, and ranks with different
   numbers of chunks would wait for each other for ever.
4. Backbone and LM head of a tied model share one `nn.Parameter`; checkpoints write it once (`checkpoint.py`).
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from distiller.records import InputError
from RewardTrainer.train.losses import generative_losses

MLP_WIDTH = 1024  # hidden layer of the MLP head, as in the paper's code

# Config attributes with which a causal LM of the library changes its logits after the LM head.
LOGIT_SCALES = {"logit_scale": lambda value: value, "logits_scaling": lambda value: 1 / value}


class Float32Linear(nn.Linear):
    """A linear layer whose product is in fp32 under autocast too.

    Its weight is fp32, except where DeepSpeed's 16-bit modes hold a 16-bit working copy of every weight (the fp32 one
    is then in the optimizer). The casts are inside `forward` because ZeRO-3 gathers a module's weights only there.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, H) -> (tokens, V), as the whole causal LM would give them."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def forward(self, hidden: torch.Tensor, **terms) -> tuple[torch.Tensor, ...]:
        """`losses.generative_losses` on hidden (tokens, H): sft, kl, tokens, kl_tokens, each (pairs,)."""
        return tuple(generative_losses(hidden, self.logits, **terms))


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

    @property
    def tied(self) -> bool:
        """Whether the LM head's weight is the input embedding itself."""
        return (
            self.language_head is not None and self.language_head.weight is self.backbone.get_input_embeddings().weight
        )

    def gradient_checkpointing_enable(self, **options) -> None:
        """Called by the Trainer for `--gradient_checkpointing`; the options are those of `PreTrainedModel`."""
        self.backbone.gradient_checkpointing_enable(**options)

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(rows, L) -> (rows, L, H), after the final norm."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def read_rewards(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(rows, L, H), (rows, L) -> fp32 (rows,): the head at each row's last token that is not padding."""
        positions = torch.arange(attention_mask.shape[1], device=hidden.device)
        last = (positions * attention_mask.long()).argmax(-1)  # (rows,)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # (rows, H)
        return self.score(pooled).squeeze(-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_pairs: int | None = None,
        gen_mask: torch.Tensor | None = None,
        teacher_logits: Callable[[slice], torch.Tensor] | None = None,
        shared_ids: torch.Tensor | int | None = None,
        temperature: float = 1.0,
        chunk_size: int = 1024,
    ) -> dict[str, torch.Tensor]:
        """Rewards of every row, and the generative terms of every pair.

        input_ids, attention_mask (rows, L): with `num_pairs` = B, rows 0..B-1 are chosen, B..2B-1 rejected and
            2B..3B-1 the generative sequences; where there are only 2B rows, the chosen ones are the generative
            sequences.
        gen_mask (B, L): 1 at the response tokens of the generative sequences; None leaves their terms out.
        The other arguments go to `losses.generative_losses`, whose token axis is gen_mask read row by row.

        Returns {"rewards": fp32 (rows,) or (2B,)} and, with gen_mask, {"sft", "kl", "tokens", "kl_tokens"}, each (B,).
        """
        scored = input_ids.shape[0] if num_pairs is None else 2 * num_pairs
        hidden = self.hidden_states(input_ids, attention_mask)  # (rows, L, H)
        outputs = {"rewards": self.read_rewards(hidden[:scored], attention_mask[:scored])}
        if gen_mask is None:
            return outputs
        first = scored if input_ids.shape[0] > scored else 0
        rows, positions = gen_mask.nonzero(as_tuple=True)  # (tokens,), (tokens,)
        sft, kl, tokens, kl_tokens = self.language_head(
            hidden[first + rows, positions - 1],  # (tokens, H): the state before each response token predicts it
            targets=input_ids[first + rows, positions],
            pair_index=rows,
            num_pairs=num_pairs,
            teacher_logits=teacher_logits,
            shared_ids=shared_ids,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        return outputs | {"sft": sft, "kl": kl, "tokens": tokens, "kl_tokens": kl_tokens}


def split_causal_lm(lm: PreTrainedModel) -> tuple[PreTrainedModel, LanguageHead]:
    """Backbone and LM head of a causal LM. InputError if its logits are more than head, scale and soft cap."""
    backbone, output = lm.base_model, lm.get_output_embeddings()
    if backbone is lm or not isinstance(output, nn.Linear):
        raise InputError(f"{type(lm).__name__} is not a backbone with a linear LM head on top; it cannot be a student")
    language_head = LanguageHead(output.weight, output.bias, lm.config)
    if not hf_deepspeed.is_deepspeed_zero3_enabled():  # partitioned weights cannot be run before the engine exists
        ids = torch.arange(4, device=output.weight.device).unsqueeze(0) + lm.config.vocab_size // 2
        training = lm.training
        lm.eval()
        with torch.no_grad():
            ours = language_head.logits(backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
            theirs = lm(input_ids=ids, use_cache=False).logits.float()
        lm.train(training)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            raise InputError(
                f"{type(lm).__name__} changes its logits after the LM head in a way that is not known here; "
                "train it with a loss on rewards alone or choose another student"
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
            return cls(AutoModelForCausalLM.from_pretrained(path, **load_args).to(device))

    @torch.no_grad()
    def logits_for(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
    ) -> Callable[[slice], torch.Tensor]:
        """Teacher logits of every response token, on demand, for `losses.generative_losses`.

        All arguments are (pairs, L) in the teacher's own tokens and template; response_mask is 1 at the response
        tokens. The backbone runs here, once; the LM head runs when a slice of the tokens, read row by row, is asked
        for.
        """
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        rows, positions = response_mask.nonzero(as_tuple=True)
        picked = hidden[rows, positions - 1]  # (tokens, H)
        return lambda tokens: self.language_head.logits(picked[tokens])
