"""Each architecture of transformers with a causal LM and a sequence classifier trains, or is refused in a line.

Random weights, tiny shapes, one step on rewards alone, then the export is loaded and gives a reward. And each teaches
a student of another architecture, or is refused.
"""

import json

import pytest
import torch
from train_fixtures import pair_rows, tiny_tokenizer, write_rows
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from distiller.records import InputError
from RewardTrainer.eval.engines.hf import load_scorer
from RewardTrainer.train import run_reward_train

KINDS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
# Whose smallest configuration is another world: encoder-decoders' configs, layer plans that must fit each other.
OTHER_WORLDS = {"bigbird_pegasus", "cohere_compass_text", "reformer", "zamba", "zamba2"}
# Under all names that configurations have for them; each takes those that it knows.
SHAPE = (
    dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"], 32)
    | dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"], 64)
    | dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"], 2)
    | dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"], 4)
    | dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "mamba_n_heads"], 4)
    | dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 256)
    | dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"], 8)
    | dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "rotary_dim", "time_step_rank"], 4)
    | dict.fromkeys(["kv_lora_rank", "q_lora_rank", "mamba_d_head"], 16)
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mamba_n_groups": 1, "mamba_d_state": 8}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "attention_dropout": 0.0}
)
MORE = {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}}
MUST_TRAIN = {
    *(
        "bloom",
        "deepseek_v3",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
    ),
    *("llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("qwen3_next", "smollm3", "starcoder2"),
}


def save_tiny(kind: str, path) -> None:
    tokenizer = tiny_tokenizer()
    base = AutoConfig.for_model(kind)
    text = base.get_text_config()
    known = {*text.to_dict(), *type(text).attribute_map}
    shape = {name: value for name, value in SHAPE.items() if name in known} | MORE.get(kind, {})
    shape |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    if text is not base:
        shape = {next(name for name, part in base.sub_configs.items() if "vision" not in name): shape}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {name: vision for name in base.sub_configs if "vision" in name}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def train(tmp_path, config: str, **more) -> None:
    given = {
        "config": run_reward_train.CONFIGS / config,
        "train_file": write_rows(tmp_path / "pairs.jsonl", pair_rows(6)),
        "output_dir": tmp_path / "rm",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "eval_ratio": 0,
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    run_reward_train.main([str(part) for name, value in (given | more).items() for part in (f"--{name}", value)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OTHER_WORLDS])
def test_every_architecture_trains_or_is_refused_in_a_line(kind, tmp_path):
    save_tiny(kind, tmp_path / "student")
    try:
        train(tmp_path, "example_bt.yaml", model_name_or_path=tmp_path / "student")
    except InputError as refusal:
        assert kind not in MUST_TRAIN and "\n" not in str(refusal)
        pytest.skip(str(refusal))
    scorer = load_scorer(str(tmp_path / "rm"), dtype="float32")
    chat = [{"role": "user", "content": "name"}, {"role": "assistant", "content": "tin"}]
    [(_, _, reward)] = scorer.score(scorer.encode([[chat]]))
    assert reward == reward


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OTHER_WORLDS])
def test_every_architecture_teaches_or_is_refused_in_a_line(kind, tmp_path):
    save_tiny("qwen2", tmp_path / "student")
    save_tiny(kind, tmp_path / "teacher")
    models = {"model_name_or_path": tmp_path / "student", "teacher_model": tmp_path / "teacher"}
    try:
        train(tmp_path, "example.yaml", logging_steps=1, **models)
    except InputError as refusal:
        assert kind not in MUST_TRAIN and "\n" not in str(refusal) and "teacher" in str(refusal)
        pytest.skip(str(refusal))
    (log, *_) = json.loads((tmp_path / "rm/trainer_state.json").read_text())["log_history"]
    assert log["loss_kl"] > 0 if kind != "qwen2" else log["loss_kl"] == pytest.approx(0, abs=1e-5)
