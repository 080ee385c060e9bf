#!/usr/bin/env bash
# Every figure that needs a GPU, on one card (80 GB or more), in about 8 minutes: speed first and one after the other,
# then what only has to work, side by side.
#
#   bash benchmarks/gpu.sh                       # logs in output/gpu/, a table at the end
#   TEACHER_14B=1 bash benchmarks/gpu.sh         # also a 3B student beside a teacher of 14B: 28 GB on the disk, 3 minutes
#   MODEL=path/of/an/instruct/model bash benchmarks/gpu.sh        # also tries packed rows on real weights in bf16
#
#   SHAPE=small bash benchmarks/gpu.sh           # the same on a small model, a CPU included: a rehearsal
#
# OUT     where logs and figures.jsonl go; default output/gpu
# WORK    for models of random weights, 8 GB; default a temporary directory, which is removed
# PYTHON  default .venv/bin/python, else python
# What fails or runs out of its time is said so in the table, and the rest goes on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$(realpath -m "${OUT:-output/gpu}")"
mkdir -p "$out"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || command -v python || command -v python3)}"
PATH="$(dirname "$python"):$PATH"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [[ -z "${WORK:-}" ]]; then
  WORK="$(mktemp -d)"
  trap 'rm -rf "$WORK"' EXIT
fi
shape="${SHAPE:-3b}"
patience="$([[ "$shape" == 3b ]] && echo 1 || echo 10)" # seconds are a GPU's
: >"$out/figures.jsonl"

# NAME SECONDS COMMAND...: its output in a log, its last line of JSON, if there is one, among the figures
take() {
  local name="$1" limit="$2" code=0 start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout --kill-after=10 $((limit * patience)) "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 12 "$out/$name.log" | cut -c1-300
  "$python" - "$name" "$code" $((SECONDS - start)) "$out/$name.log" >>"$out/figures.jsonl" <<'PYTHON'
import json
import sys

name, code, seconds, log = sys.argv[1:]
figures = {}
for line in open(log, encoding="utf-8", errors="replace"):
    if line.startswith('{"benchmark"'):
        figures = json.loads(line)
print(json.dumps({"name": name, "exit_code": int(code), "seconds": int(seconds), **figures}))
PYTHON
}

take versions 60 "$python" -c '
import importlib.metadata as metadata
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), *(round(n / 2**30, 1) for n in torch.cuda.mem_get_info()), "GiB free, in all")
for name in "torch triton transformers trl deepspeed accelerate liger-kernel flash-attn vllm".split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
'
train="$python benchmarks/train_run.py --shape $shape --work_dir $WORK"
evaluate="$python benchmarks/eval_rm.py --pairs $WORK/pairs.jsonl --repeats 2"
[[ "$shape" == 3b ]] && evaluate+=" --shape 3b --dtype bfloat16 --rows 100" || evaluate+=" --rows 20"
take train_run 210 $train --steps 40
take train_run_checkpointing 120 $train --steps 20 -- --gradient_checkpointing true
take eval_rm 90 $evaluate
take train_step 90 "$python" benchmarks/train_step.py --shape "$shape" --pairs 16 --rounds 3 --steps competent fast --lengths answers
if [[ "${TEACHER_14B:-0}" != 0 ]]; then
  take teacher_14b 240 $train --steps 20 --teacher_shape 14b
fi

take tests 240 "$python" -m pytest -q -m cuda tests/test_cuda.py &
# The embedded example: stages 1 and 2 where vLLM is, else a loss that needs neither.
example=(train_rm.sh)
if "$python" -c 'import vllm' 2>/dev/null; then
  take refine 120 "$python" refine/refine_response_vllm.py --limit 300 --output "$WORK/refined.jsonl"
  take score 120 "$python" score/cali_score_vllm.py --input "$WORK/refined.jsonl" --output "$WORK/scored.jsonl"
  example=(train_distilrm.sh --train_file "$WORK/scored.jsonl")
fi
for precision in false true; do
  take "example_bf16_$precision" 90 bash RewardTrainer/scripts/"${example[@]}" --max_steps 200 --bf16 "$precision" \
    --output_dir "$WORK/example_$precision" --save_strategy no
  take "example_eval_bf16_$precision" 90 bash RewardTrainer/scripts/eval_rm.sh --model "$WORK/example_$precision" \
    --output_dir "$WORK/example_eval_$precision"
done
if [[ -n "${MODEL:-}" ]]; then
  take real_model 60 "$python" -c '
import sys

import torch
from transformers import AutoModel

from RewardTrainer.packing_trial import judge

for dtype in (torch.float32, torch.bfloat16):
    print(dtype, judge(AutoModel.from_pretrained(sys.argv[1], dtype=dtype, device_map="auto"), runnable=True))
' "$MODEL"
fi
wait

echo
"$python" - "$out/figures.jsonl" <<'PYTHON'
import json
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    figures = json.loads(line)
    ratios = "  ".join(f"{name} {value:.3f}" for name, value in figures.get("ratios", {}).items())
    kept = ("pairs_per_second", "first_step_seconds", "peak_memory_bytes", "tokens_per_second")
    more = "  ".join(f"{name} {figures[name]:.4g}" for name in kept if name in figures)
    state = "" if figures["exit_code"] == 0 else f"FAILED ({figures['exit_code']})  "
    print(f"{figures['name']:28}{figures['seconds']:5} s  {state}{ratios}  {more}")
PYTHON
