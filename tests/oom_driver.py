"""Train as `run_reward_train.py` does, on a device whose memory ends at a forward of the student.

python tests/oom_driver.py NUMBER ARGUMENTS...
"""

import sys

import torch

from RewardTrainer.train import run_reward_train
from RewardTrainer.train.student import RewardStudent

left, sys.argv = int(sys.argv[1]), [sys.argv[0], *sys.argv[2:]]
forward = RewardStudent.forward


def forward_while_there_is_memory(self, *arguments, **options):
    global left
    left -= 1
    if left < 0:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ... in total")
    return forward(self, *arguments, **options)


RewardStudent.forward = forward_while_there_is_memory
run_reward_train.program()
