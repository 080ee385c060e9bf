"""One training step of a saved student on two ranks, as `torchrun fsdp_driver.py VERSION START TEACHER ROWS OUT`.

VERSION is FSDP's, 1 or 2. Writes each parameter's whole gradient, and the loss, to OUT (safetensors).
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_train_step import WEIGHTS
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from train_fixtures import make_trainer

version = sys.argv[1]
start, teacher, rows, out = map(Path, sys.argv[2:])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
trainer = make_trainer(start, out.parent, json.loads(rows.read_text()), teacher, **WEIGHTS)  # for what it prepares
pairs, student = trainer.train_dataset, trainer.model.train()
layers = student.backbone.layers
if version == "1":
    # Mixed precision, as training with --bf16 has it, goes through everything that a layer is given.
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    options["mixed_precision"] = MixedPrecision(param_dtype=torch.float32)
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, **options)
    student = FullyShardedDataParallel(student, **options)
else:
    for layer in layers:
        fully_shard(layer)
    fully_shard(student)
batch = trainer.collate(pairs[rank::ranks])
loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(len(pairs)))
loss.backward()
total = loss.detach().clone()
dist.all_reduce(total)
if version == "1":
    with FullyShardedDataParallel.summon_full_params(student, with_grads=True):
        tensors = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.clone()
            for name, parameter in student.named_parameters()
        }
else:
    tensors = {name: parameter.grad.full_tensor().contiguous() for name, parameter in student.named_parameters()}
if rank == 0:
    save_file(tensors | {"loss": total / ranks}, out)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # a thread of torch's may abort the interpreter's own end, as in `run_reward_train.program`
