"""Where a student comes from and what it is saved as.

A checkpoint directory is a stock sequence-classification model, so that `transformers`, TRL, vLLM and `rewardbench`
load it with no code of ours:

    config.json             num_labels 1; problem_type "regression", or vLLM puts a sigmoid on the reward; pad_token_id
                            and, of a finished run, reward_mean and reward_std
    model*.safetensors      backbone and `score.weight`
    tokenizer files         chat template; a pad token that is not EOS, or pooling would skip a final EOS
    reward_student.json     what the stock files do not say: kind of head, where the LM head is
    lm_head/                the LM head where it is not the embedding; in a folder of its own, because vLLM reads every
                            *.safetensors file of the directory it is given
    lm/                     `--save_lm`: the student as a stock causal LM
    adapter/                `--use_peft`: adapters and reward head (`lora.py`), which the model above has merged

An MLP head has no stock class: such a checkpoint carries `modeling_mlp_reward.py`, and saving it says how it is loaded
(`MLP_NOTE`).
"""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from distiller.atomic import write_whole
from distiller.records import InputError
from distiller.tokens import with_fixed_date
from RewardTrainer.eval.engines.loading import from_pretrained
from RewardTrainer.train import modeling_mlp_reward
from RewardTrainer.train.fp32_head import with_masters
from RewardTrainer.train.lora import has_adapters, load_adapters, merged_state, plain_names, save_adapters
from RewardTrainer.train.modeling_mlp_reward import MLPRewardForSequenceClassification
from RewardTrainer.train.quantization import load_args_4bit, settle
from RewardTrainer.train.student import (
    MLP_WIDTH,
    LanguageHead,
    RewardStudent,
    plain_loading,
    reward_head,
    split_causal_lm,
)

logger = logging.getLogger(__name__)

STUDENT_FILE = "reward_student.json"
LM_HEAD_FILE = "lm_head/model.safetensors"
ADAPTER_DIR = "adapter"
LM_DIR = "lm"
# What a saved directory has of some models and tokenizers and not of others.
SOME_MODELS_ONLY = ("modeling_mlp_reward.py", "lm_head", ADAPTER_DIR, LM_DIR, "chat_template.jinja")
NEW_PAD_TOKEN = "<|pad|>"
MLP_NOTE = (
    "It loads with trust_remote_code=True only, and in vLLM with pooler_config seq_pooling_type=LAST besides "
    "(its default for such models is the first token, which gives every conversation the same reward)"
)
# Names under which tokenizers ship a token that is meant for padding or for nothing, best first.
PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|reserved_special_token_0|>",
)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give the tokenizer a pad token different from EOS, and drop token_type_ids, in place.

    An existing special token that neither the chat template nor another role uses is preferred to a new one. Returns a
    sentence about what changed, None if nothing did. The caller resizes the embeddings when `len(tokenizer)` outgrew
    them.
    """
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    before = f"pad token {tokenizer.pad_token!r} {'is EOS' if tokenizer.pad_token else 'is missing'}"
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in PAD_CANDIDATES:
        used = name in (tokenizer.bos_token, tokenizer.eos_token) or name in (tokenizer.chat_template or "")
        if name in special and not used:
            tokenizer.pad_token = name
            return f"{before}: using the existing special token {name!r} (id {tokenizer.pad_token_id})"
    tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
    return f"{before}: added {NEW_PAD_TOKEN!r} (id {tokenizer.pad_token_id})"


def load_tokenizer(path: str, **load_args) -> PreTrainedTokenizerBase:
    """The tokenizer of `path`, prepared. InputError if it has no chat template."""
    tokenizer = from_pretrained(AutoTokenizer, path, **load_args)
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {path} has no chat template, and a reward model scores conversations; "
            "save one into its tokenizer (tokenizer.chat_template = ...)"
        )
    change = prepare_tokenizer(with_fixed_date(tokenizer))
    if change:
        logger.warning("%s: %s", path, change)
    return tokenizer


def read_student_file(path: str | Path) -> dict:
    """The student file of a checkpoint directory of ours, {} for any other model."""
    file = Path(path) / STUDENT_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise InputError(f"{file} is damaged ({fault}): its model was not saved whole, take it away") from fault


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The sequence-classification class of this architecture. InputError if the library has none."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"transformers has no sequence-classification class for {type(config).__name__}: a reward model of this "
            "architecture could not be loaded by anything"
        )
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def load_student(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    head: str = "linear",
    language_head: bool = True,
    dtype: torch.dtype = torch.float32,
    in_4bit_on: torch.device | None = None,
    **load_args,
) -> RewardStudent:
    """A student from a causal LM, from a reward model, or from a checkpoint of either kind of head saved here.

    path: directory or hub name. tokenizer: prepared; embeddings grow when it outgrew them. language_head: whether the
    loss has generative terms; without them an untied LM head is kept but frozen. in_4bit_on: put the backbone there,
    its linear layers in 4 bits (`quantization.py`). load_args go to `from_pretrained`.

    Raises ValueError for a generative loss on a model without LM head, for a model whose head is not one scalar, for
    weights that are stored quantized, and for an architecture that could not be exported.
    """
    config = from_pretrained(AutoConfig, path, **load_args)
    if "quantization_config" in vars(config):
        raise InputError(
            f"{path} has quantized weights, which cannot be trained: start from the model that it was made of, with "
            "--use_peft --load_in_4bit where memory is short"
        )
    if in_4bit_on is not None:
        load_args |= load_args_4bit(in_4bit_on)
    ours = read_student_file(path)
    is_reward_model = any(name.endswith("ForSequenceClassification") for name in config.architectures or []) or ours
    if is_reward_model:
        backbone, score, lm_head, head = _from_reward_model(path, config, ours, head, dtype, load_args)
        if in_4bit_on is not None:
            settle(backbone)
        if lm_head is None and language_head:
            raise InputError(
                f"{path} is a reward model without an LM head, and this loss has generative terms: set --sft_weight 0 "
                "--kl_weight 0 (or --loss_type margin_regression), or start from a causal LM"
            )
        if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
            if lm_head is not None and lm_head.weight is not backbone.get_input_embeddings().weight:
                raise InputError(f"the tokenizer of {path} outgrew its embeddings; save it with a pad token first")
            backbone.resize_token_embeddings(len(tokenizer))
            if lm_head is not None:
                lm_head.weight = backbone.get_input_embeddings().weight
    else:
        lm = from_pretrained(AutoModelForCausalLM, path, dtype=dtype, **load_args)
        if in_4bit_on is not None:
            settle(lm.base_model)
        if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
            lm.resize_token_embeddings(len(tokenizer))
            logger.warning("%s: embeddings resized to %d tokens", path, len(tokenizer))
        backbone, lm_head = split_causal_lm(lm)
        text = config.get_text_config()
        std = getattr(text, "initializer_range", getattr(text, "init_std", 0.02))  # OPT has the other name
        score = reward_head(head, text.hidden_size, std=std)
    backbone.config.pad_token_id = tokenizer.pad_token_id
    if is_deepspeed_zero3_enabled():
        # It loads the backbone in its own 16-bit type, keeps fp32 in the optimizer, and wants one type in the model.
        for own in (score, lm_head) if lm_head is not None else (score,):
            own.to(next(backbone.parameters()).dtype)
    student = RewardStudent(backbone, score, lm_head, head)
    if lm_head is not None and not language_head and not student.tied:
        lm_head.requires_grad_(False)  # no gradient would reach it, which DDP takes for an error
    stock_model(student)  # an architecture that cannot be exported is refused before training
    return student


def _from_reward_model(
    path: str, config: PreTrainedConfig, ours: dict, head: str, dtype: torch.dtype, load_args: dict
) -> tuple[PreTrainedModel, nn.Module, LanguageHead | None, str]:
    """Backbone, reward head, LM head (None without one) and kind of reward head of a saved reward model."""
    kind = ours.get("head", "linear")
    if kind != head:
        raise InputError(f"{path} has a {kind} head: start from it with --head {kind}")
    if kind == "linear":
        model = from_pretrained(AutoModelForSequenceClassification, path, dtype=dtype, **load_args)
        stored = model.score if isinstance(getattr(model, "score", None), nn.Linear) else None
        if stored is None or stored.out_features != 1 or stored.bias is not None:
            raise InputError(f"{path} ({type(model).__name__}) has no linear `score` head with one label and no bias")
        backbone = model.base_model
        weights = {"weight": _whole(stored.weight)}
    else:
        backbone = from_pretrained(AutoModel, path, dtype=dtype, **load_args)
        prefix = "classifier."
        weights = {k.removeprefix(prefix): v for k, v in read_weights(path).items() if k.startswith(prefix)}
    score = reward_head(kind, config.get_text_config().hidden_size)
    score.load_state_dict(weights)

    lm_head = None
    if ours.get("lm_head") == "tied":
        lm_head = LanguageHead(backbone.get_input_embeddings().weight, None, backbone.config)
    elif ours.get("lm_head") == "own":
        stored = load_file(Path(path) / LM_HEAD_FILE)
        weight_dtype = backbone.get_input_embeddings().weight.dtype  # what `dtype` "auto" came to
        parameters = {name: nn.Parameter(tensor.to(weight_dtype)) for name, tensor in stored.items()}
        lm_head = LanguageHead(parameters["weight"], parameters.get("bias"), backbone.config)
    return backbone, score, lm_head, kind


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter that ZeRO-3 may hold in parts."""
    if not is_deepspeed_zero3_enabled():
        return weight.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's model*.safetensors files, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise FileNotFoundError(f"{path} has no model*.safetensors file")
    return tensors


def stock_model(student: RewardStudent, state: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """The student as the model its checkpoints load as, sharing the tensors of `state`; None: on the meta device.

    state: `student.state_dict()` or what a ZeRO engine gathered. Raises InputError if backbone and head do not fill
    the stock class exactly.
    """
    config = copy.deepcopy(student.config)
    config.num_labels = 1
    config.problem_type = "regression"
    for name in ("reward_mean", "reward_std"):  # those of the reward model that a student began as
        config.__dict__.pop(name, None)
    with plain_loading(), torch.device("meta"):
        if student.head == "linear":
            model = stock_class(config)(config)
        else:
            config.reward_head_width = MLP_WIDTH
            config.auto_map = {
                "AutoModelForSequenceClassification": "modeling_mlp_reward.MLPRewardForSequenceClassification"
            }
            model = MLPRewardForSequenceClassification(config)
    head = "score" if student.head == "linear" else "classifier"
    names = {f"backbone.{name}": f"{model.base_model_prefix}.{name}" for name in plain_names(student.backbone)}
    names |= {f"score.{name}": f"{head}.{name}" for name in student.score.state_dict()}
    if set(names.values()) != set(model.state_dict()):
        odd = sorted(set(names.values()) ^ set(model.state_dict()))
        raise InputError(f"{type(model).__name__} is not this backbone and a `{head}` head: {odd[:6]}")
    if state is not None:
        model.load_state_dict({theirs: state[ours] for ours, theirs in names.items()}, assign=True)
    return model


class RewardScale(NamedTuple):
    """Mean and standard deviation of measured rewards."""

    mean: float
    std: float


def normalized(
    state: dict[str, torch.Tensor], head: str, scale: RewardScale
) -> tuple[dict[str, torch.Tensor], RewardScale]:
    """Weights whose rewards have standard deviation 1 where `scale` was measured, and the scale of those rewards.

    The last layer of an MLP head has a bias: its rewards become (r - mean) / std. A linear head has none, in the stock
    classes of transformers, and can carry no shift: its rewards become r / std, with mean mean / std. Rewards that are
    all the same are left alone.
    """
    if scale.std == 0:
        logger.warning("every measured reward is %g: they cannot be normalized", scale.mean)
        return state, scale
    names = {"linear": ("score.weight",), "mlp": ("score.2.weight", "score.2.bias")}[head]
    shift = {"score.2.bias": scale.mean}
    folded = {name: ((state[name].float() - shift.get(name, 0.0)) / scale.std).to(state[name].dtype) for name in names}
    return state | folded, RewardScale(scale.mean / scale.std if head == "linear" else 0.0, 1.0)


def _of_an_earlier_model(output_dir: Path) -> list[Path]:
    """What a model saved here before has left, of which the next one may have no like; nothing else that goes by such
    a name, such as the directory of another run."""
    facts = read_student_file(output_dir)
    parts = facts.get("parts", SOME_MODELS_ONLY) if facts else []
    return [output_dir / name for name in parts if name in SOME_MODELS_ONLY]


def check_output_dir(output_dir: str | Path, models: Sequence[str | None]) -> None:
    """Raises InputError where saving a model in `output_dir` would take one of these models away."""
    for path in _of_an_earlier_model(Path(output_dir)):
        for model in filter(None, models):
            if Path(model).exists() and path.resolve() in (Path(model).resolve(), *Path(model).resolve().parents):
                raise InputError(
                    f"{model} is part of {output_dir}, which this run replaces: give another --output_dir"
                )


def save_student(
    student: RewardStudent,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    state: dict[str, torch.Tensor] | None = None,
    save_lm: bool = False,
    scale: RewardScale | None = None,
    normalize: bool = False,
) -> None:
    """Write a checkpoint directory (module docstring), on one rank. `state` as for `stock_model`, None: its own.

    scale: the student's rewards as measured, for config.json; normalize: fold it into the exported head.
    """
    output_dir = Path(output_dir)
    for path in _of_an_earlier_model(output_dir):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    others = [name for name in SOME_MODELS_ONLY if (output_dir / name).exists()]
    state = with_masters(student, student.state_dict() if state is None else state)
    if scale is not None and normalize:
        state, scale = normalized(state, student.head, scale)
    if has_adapters(student):
        save_adapters(student, output_dir / ADAPTER_DIR, state)
        state = merged_state(student, state)
    model = stock_model(student, state)
    if scale is not None:
        model.config.reward_mean, model.config.reward_std = scale
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    if student.head == "mlp":
        shutil.copy(modeling_mlp_reward.__file__, output_dir)
        logger.warning("%s has an MLP head: not a stock model. %s", output_dir, MLP_NOTE)

    lm_head = "none" if student.language_head is None else "tied" if student.tied else "own"
    if lm_head == "own":
        prefix = "language_head."
        weights = {k.removeprefix(prefix): v.contiguous() for k, v in state.items() if k.startswith(prefix)}
        (output_dir / LM_HEAD_FILE).parent.mkdir(exist_ok=True)
        save_file(weights, output_dir / LM_HEAD_FILE, metadata={"format": "pt"})
    if save_lm:
        save_causal_lm(student, tokenizer, output_dir / LM_DIR, state)
    parts = [name for name in SOME_MODELS_ONLY if (output_dir / name).exists() and name not in others]
    facts = {"head": student.head, "lm_head": lm_head, "parts": parts}
    write_whole(output_dir / STUDENT_FILE, json.dumps(facts, indent=2) + "\n")


def save_causal_lm(
    student: RewardStudent, tokenizer: PreTrainedTokenizerBase, output_dir: Path, state: dict[str, torch.Tensor]
) -> None:
    """Write the student's language model as a stock causal LM. ValueError without an LM head."""
    if student.language_head is None:
        raise InputError("--save_lm: this student started from a reward model and has no LM head")
    config = copy.deepcopy(student.config)
    with plain_loading(), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    prefix = lm.base_model_prefix
    weights = {f"{prefix}.{name}": state[f"backbone.{name}"] for name in plain_names(student.backbone)}
    output = next(name for name, module in lm.named_modules() if module is lm.get_output_embeddings())
    weights[f"{output}.weight"] = state[
        "backbone." + _embedding_name(student.backbone) if student.tied else "language_head.weight"
    ]
    if student.language_head.bias is not None:
        weights[f"{output}.bias"] = state["language_head.bias"]
    lm.load_state_dict(weights, assign=True)
    lm.tie_weights()
    lm.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _embedding_name(backbone: PreTrainedModel) -> str:
    embedding = backbone.get_input_embeddings()
    return next(name for name, module in backbone.named_modules() if module is embedding) + ".weight"


def load_weights(student: RewardStudent, path: str | Path) -> None:
    """Put a checkpoint of the same student back into it, LM head included. RuntimeError if it does not fit."""
    if has_adapters(student):
        load_adapters(student, path)
        return
    stored = read_weights(path)
    model = stock_model(student)
    head = "score" if student.head == "linear" else "classifier"
    state = {}
    for name, tensor in stored.items():
        if name.startswith(f"{head}."):
            state["score." + name.removeprefix(f"{head}.")] = tensor
        else:
            state["backbone." + name.removeprefix(f"{model.base_model_prefix}.")] = tensor
    if student.language_head is not None:
        if student.tied:
            state["language_head.weight"] = state["backbone." + _embedding_name(student.backbone)]
        else:
            state |= {f"language_head.{name}": tensor for name, tensor in load_file(Path(path) / LM_HEAD_FILE).items()}
    student.load_state_dict(state)
