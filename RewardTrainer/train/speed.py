"""What a training step costs, counted, and how fast it goes: tokens a second and MFU.

MFU is the share of the GPU's dense peak that goes into operations which a step cannot do without: 2 a weight and token
in the forward pass, 4 in the backward pass (2 where the weight is frozen: its own gradient is not needed), and in
attention 4 times the heads' width a layer and pair of positions that see each other, three times that with the
backward pass. What rows of a pair begin with counts once, padding never, the LM head for response tokens only, experts
as many as a token goes through. Nothing that is computed again counts again (gradient checkpointing).
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from RewardTrainer.packing import prefix_tree
from RewardTrainer.train.batches import rows_of
from RewardTrainer.train.student import LiveTeacher, RewardStudent

# Dense bf16, from data sheets, by words of torch.cuda.get_device_name; the first that fits counts.
PEAK_TFLOPS = {
    **{"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0, "H200": 989.0, "GH200": 989.0},
    **{"H800 PCIe": 756.0, "H800": 989.0, "B200": 2250.0, "B100": 1750.0, "A100": 312.0, "A800": 312.0},
    **{"A10G": 70.0, "A10": 125.0, "A40": 149.7, "L40S": 362.0, "L40": 181.0, "L4": 121.0},
    **{"RTX 6000 Ada": 364.0, "RTX A6000": 155.0, "RTX 4090": 165.2},
}
OTHERS = re.compile(r"\b(MIG|Laptop|D)\b")
"""Of a part of such a card, or of a slower one under its name, no peak is known."""


def peak_flops(device: torch.device, low_precision: bool = True) -> float | None:
    """Operations a second of this GPU in bf16 or fp16; None for another precision, an unknown GPU or a CPU."""
    if device.type != "cuda" or not low_precision:
        return None
    name = torch.cuda.get_device_name(device)
    if OTHERS.search(name):
        return None
    # Whole words: an RTX A1000 is no A100.
    return next((1e12 * tflops for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


@dataclass(frozen=True)
class ModelCost:
    """Operations of one backbone and its LM head.

    weights, frozen: that a token goes through in the backbone, and how many of them are not trained. head: of the LM
    head. attention: a pair of positions, over all layers without a window; windows: {length: the same for theirs}.
    """

    weights: float
    frozen: float
    head: float
    head_frozen: bool
    attention: float
    windows: Mapping[int, float]

    def flops(self, tree: Sequence[tuple[int, int]], response: int, trained: bool) -> float:
        """Of one pair. tree: (start, stop) of every piece, by positions in its row; response: the LM head's tokens."""
        tokens = sum(stop - start for start, stop in tree)
        backbone = 2 * self.weights * tokens
        head = 2 * self.head * response
        attention = self.attention * sum(seen(*piece) for piece in tree)
        attention += sum(cost * sum(seen(*piece, window) for piece in tree) for window, cost in self.windows.items())
        if not trained:
            return backbone + head + attention
        head *= 2 if self.head_frozen else 3
        return 3 * (backbone + attention) - 2 * self.frozen * tokens + head


def seen(start: int, stop: int, window: int | None = None) -> float:
    """Pairs of positions in causal attention whose query is one of [start, stop), through a window of so many keys."""

    def up_to(length: int) -> int:
        inside = length if window is None else min(length, window)
        return inside * (inside + 1) // 2 + (length - inside) * inside

    return up_to(stop) - up_to(start)


def model_cost(backbone: PreTrainedModel, head: nn.Module | None) -> ModelCost:
    """Counted from the modules; attention from the configuration. head: what holds the LM head's `weight` (V, H)."""
    config = backbone.config.get_text_config()
    share = 1.0  # of its experts that a token goes through
    experts = next((n for name in ("num_experts", "num_local_experts") if (n := getattr(config, name, None))), None)
    if experts and getattr(config, "num_experts_per_tok", None):
        share = config.num_experts_per_tok / experts
    embeddings = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    weights = frozen = 0.0
    for name, parameter in backbone.named_parameters():
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or id(parameter) in embeddings:
            continue
        count = _numbers(parameter) * (share if ".experts." in name else 1.0)
        weights += count
        frozen += 0.0 if parameter.requires_grad else count
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    sliding = types.count("sliding_attention")
    return ModelCost(
        weights=weights,
        frozen=frozen,
        head=0.0 if head is None else _numbers(head.weight),
        head_frozen=head is not None and not head.weight.requires_grad,
        attention=4.0 * width * (len(types) - sliding),
        windows={window: 4.0 * width * sliding} if sliding else {},
    )


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers it stands for: whole where ZeRO-3 holds a part here, and two a byte in 4 bits."""
    return math.prod(getattr(parameter, "ds_shape", parameter.shape)) * (2 if parameter.dtype == torch.uint8 else 1)


class Speed(TrainerCallback):
    """Counts a run's steps, tokens and operations on this rank, and the time they took.

    The first step, in which much is compiled, is told apart. Evaluations and saves take no step's time.
    """

    def __init__(self, student: RewardStudent, teacher: LiveTeacher | None):
        self.student = model_cost(student.backbone, student.language_head)
        self.teacher = None if teacher is None else model_cost(teacher.backbone, teacher.language_head)
        self.began = False  # whether the run's first step is over
        self.latest = 0.0  # when the latest step, evaluation or save ended
        self.first: float | None = None  # seconds of the run's first step, until they are logged
        self.resumed_at = 0  # step of the checkpoint that the run goes on from
        self._begin()

    def _begin(self) -> None:
        self.steps, self.seconds, self.slowest = 0, 0.0, 0.0
        self.tokens, self.student_flops, self.teacher_flops = 0, 0.0, 0.0

    def count(self, features: Sequence[Mapping]) -> None:
        """These pairs have been handed to the device."""
        if not self.began:
            return
        for feature in features:
            tokens, student, teacher = pair_cost(feature, self.student, self.teacher)
            self.tokens += tokens
            self.student_flops += student
            self.teacher_flops += teacher

    def take(self) -> tuple[float, int, float, int, float, float]:
        """Seconds, steps, seconds of the slowest of them, tokens, and operations of the student's forward and backward
        pass and of a live teacher's forward pass since the last time; counting begins anew."""
        taken = (self.seconds, self.steps, self.slowest, self.tokens, self.student_flops, self.teacher_flops)
        self._begin()
        return taken

    def on_train_begin(self, args, state, control, **_) -> None:
        self.latest = time.perf_counter()
        self.resumed_at = state.global_step

    def on_step_end(self, args, state, control, **_) -> None:
        now = time.perf_counter()  # a GPU is at the same point of its work in every step
        seconds, self.latest = now - self.latest, now
        if not self.began:
            self.began, self.first = True, seconds
            return
        self.steps += 1
        self.seconds += seconds
        self.slowest = max(self.slowest, seconds)

    def on_evaluate(self, args, state, control, **_) -> None:
        self.latest = time.perf_counter()

    def on_save(self, args, state, control, **_) -> None:
        self.latest = time.perf_counter()


def summary(history: Sequence[Mapping], device: torch.device) -> dict[str, float]:
    """For `metrics.json`: first_step_seconds; the other figures of `DistilTrainer.speed_since_last_log` from the log
    whose step_seconds are the median, so that they fit each other; and the first rank's peak_memory_bytes on a GPU."""
    firsts = [log["first_step_seconds"] for log in history if "first_step_seconds" in log]
    figures = {"first_step_seconds": firsts[-1]} if firsts else {}
    logs = sorted((log for log in history if "step_seconds" in log), key=lambda log: log["step_seconds"])
    if logs:
        names = ("step_seconds", "tokens_per_second", "mfu", "mfu_with_teacher")
        median = logs[(len(logs) - 1) // 2]
        figures |= {name: median[name] for name in names if name in median}
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures


def whole_run(metrics: Mapping[str, float], history: Sequence[Mapping], steps: int, resumed_at: int) -> dict:
    """metrics, which the Trainer gives at the end of a run of so many steps, for one that went on from `resumed_at`.

    Its loss is the mean over the steps taken here; in its place comes that over all logged steps of the run (a log is
    of `loss_steps`, where that is not all since the one before). Speeds stay those of the steps taken here, and are
    left out where there were none.
    """
    if not resumed_at:
        return dict(metrics)
    speeds = () if steps > resumed_at else ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    figures = {name: value for name, value in metrics.items() if name not in ("train_loss", *speeds)}
    total, logged, latest = 0.0, 0, 0
    for log in history:
        if "loss" in log:
            count = log.get("loss_steps", log["step"] - latest)
            total += log["loss"] * count
            logged += count
            latest = log["step"]
    if logged:
        figures["train_loss"] = total / logged
    return figures | {"resumed_at_step": resumed_at}


def pair_cost(feature: Mapping, student: ModelCost, teacher: ModelCost | None) -> tuple[int, float, float]:
    """Tokens of a pair's student rows, its operations in the student, forward and backward, and in the teacher.

    feature: of `data.encode_pairs`. Tokens count as `data.py` makes them, each row whole.
    """
    rows = rows_of(feature)
    pieces = [(piece.start, piece.stop) for piece in prefix_tree(rows)[0]]
    response = 0 if feature["gen_input_ids"] is None else len(feature["gen_input_ids"]) - feature["gen_response_start"]
    of_teacher = 0.0
    if teacher is not None and feature["teacher_input_ids"] is not None:
        of_teacher = teacher.flops([(0, len(feature["teacher_input_ids"]))], response, trained=False)
    return sum(map(len, rows)), student.flops(pieces, response, trained=True), of_teacher
