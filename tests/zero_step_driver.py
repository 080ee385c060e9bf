"""Run by `deepspeed zero_step_driver.py CONFIGURATIONS`: steps under each, as DeepSpeed takes them and lightened.

Prints one JSON line on the first rank: by configuration, precision and size of the loss, whether it was lightened; the
norms of both; and the largest difference of fp32 weights and of first moments. Those are a tenth of the clipped
gradient after one step, which Adam's weights would hardly show.
"""

import json
import sys
from itertools import product
from pathlib import Path

import deepspeed
import torch
from torch import nn

from RewardTrainer.train.zero_step import lighten

CONFIGS = Path(__file__).resolve().parents[1] / "RewardTrainer/configs/deepspeed"
CLIP = 0.01


def train(config: dict, lightened: bool, scale: float) -> tuple[bool, list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    done = lighten(engine.optimizer) if lightened else False
    rows = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    norms = []
    for batch in rows.repeat(config["gradient_accumulation_steps"], 1, 1):
        engine.backward(scale * engine(batch.to(next(model.parameters()).dtype)).float().square().mean())
        engine.step()
        if engine.was_step_applied():
            norms.append(float(engine.get_global_grad_norm()))
    moments = [state["exp_avg"] for state in engine.optimizer.optimizer.state.values()]
    return done, norms, [*engine.optimizer.single_partition_of_fp32_groups, *moments]


def main() -> None:
    deepspeed.init_distributed()
    found = {}
    names = sys.argv[1].split(",")
    kinds = [("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16, accumulated in fp32", 2)]
    for name, (precision, accumulated), scale in product(names, kinds, (1e-4, 10.0)):
        if name == "zero1" and "accumulated" in precision:  # another optimizer of DeepSpeed's
            continue
        config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"gradient_clipping": CLIP}
        config |= {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": accumulated}
        if "accumulated" in precision:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["zero_optimization"]["stage"] = 2
        config = {key: value for key, value in config.items() if value != "auto" and key != "fp16"}
        config["bf16"] = config["bf16"] | {"enabled": precision != "fp32"}
        (_, norms, own), (done, light_norms, light) = (train(config, on, scale) for on in (False, True))
        apart = max((a - b).abs().max() / a.abs().max().clamp(min=1e-12) for a, b in zip(own, light, strict=True))
        found[f"{name} {precision} {accumulated} {scale}"] = {
            "lightened": done,
            "norms": norms,
            "light_norms": light_norms,
            "apart": float(apart),
            "clip": CLIP,
        }
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)


main()
