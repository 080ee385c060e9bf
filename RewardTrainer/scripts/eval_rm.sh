#!/usr/bin/env bash
# Evaluate a reward model: accuracy tables, scores and a report.
#
#   bash scripts/eval_rm.sh                                    # ../output/distilrm on the embedded benchmark
#   bash scripts/eval_rm.sh --model org/reward-model --benchmarks example,../data/test_pairs.jsonl
#   bash scripts/eval_rm.sh --help                             # every flag, and what is written
#
# NUM_PROCESSES  processes that share the rows; default: one a GPU, or 1
# PYTHON         the interpreter; default: python, or ../.venv's where no environment is active
# Paths are relative to RewardTrainer/, from wherever this is called.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" && -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x ../.venv/bin/python ]]; then
  PYTHON=../.venv/bin/python
fi
PYTHONPATH="$(cd .. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

exec "${PYTHON:-python}" -m RewardTrainer.eval.run_eval_rm ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} "$@"
