"""`run_reward_train.py` as a rank of any launcher runs it; what this rank holds goes to <output_dir>/rank-N.json."""

import json
from functools import partial
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType
from transformers import TrainerCallback

from RewardTrainer.train import run_reward_train
from RewardTrainer.train.trainer import DistilTrainer


class Probe(TrainerCallback):
    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        whole = held = 0
        for parameter in model.parameters():
            if hasattr(parameter, "ds_tensor"):  # ZeRO-3
                whole, held = whole + parameter.ds_numel, held + parameter.ds_tensor.numel()
            else:  # FSDP2 has DTensors
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                whole, held = whole + parameter.numel(), held + local.numel()
        inner = getattr(optimizer, "optimizer", optimizer)
        states = held
        if hasattr(inner, "single_partition_of_fp32_groups"):  # ZeRO-1, ZeRO-2
            states = sum(part.numel() for part in inner.single_partition_of_fp32_groups)
        file = Path(args.output_dir) / f"rank-{args.process_index}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"whole": whole, "parameters": held, "optimizer": states}))


def fsdp_on_a_cpu() -> None:
    """Accelerate takes FSDP to be for GPUs alone and would train without it; torch does not mind."""
    plain = AcceleratorState.__init__

    def init(self, *arguments, **options):  # called again and again on one shared state
        plain(self, *arguments, **options)
        self.fsdp_plugin = options.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    fsdp_on_a_cpu()
    run_reward_train.DistilTrainer = partial(DistilTrainer, callbacks=[Probe()])
    run_reward_train.program()
