"""One training step of a saved student on two ranks under FSDP2, as `torchrun fsdp_driver.py START TEACHER ROWS OUT`.

Writes each parameter's whole gradient, and the loss, to OUT (safetensors).
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_train_step import WEIGHTS
from torch.distributed.fsdp import fully_shard
from train_fixtures import make_trainer

start, teacher, rows, out = map(Path, sys.argv[1:])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
trainer = make_trainer(
    start, out.parent, json.loads(rows.read_text()), teacher, **WEIGHTS
)  # only for what it prepares
pairs, student = trainer.train_dataset, trainer.model.train()
for layer in student.backbone.layers:
    fully_shard(layer)
fully_shard(student)
batch = trainer.collate(pairs[rank::ranks])
loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(len(pairs)))
loss.backward()
total = loss.detach().clone()
dist.all_reduce(total)
tensors = {name: parameter.grad.full_tensor().contiguous() for name, parameter in student.named_parameters()}
if rank == 0:
    save_file(tensors | {"loss": total / ranks}, out)
dist.destroy_process_group()
