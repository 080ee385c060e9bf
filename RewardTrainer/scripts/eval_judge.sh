#!/usr/bin/env bash
# Evaluate a generative LLM as a judge: verdicts in both orders, accuracy tables, position bias, a report.
#
#   bash scripts/eval_judge.sh                                 # the embedded teacher on the embedded benchmark
#   bash scripts/eval_judge.sh --config configs/eval/judge_paper.yaml --benchmarks judgebench-gpt,llmbar
#   bash scripts/eval_judge.sh --help                          # every flag, and what is written
#
# PYTHON  the interpreter; default: python, or ../.venv's where no environment is active
# Paths are relative to RewardTrainer/, from wherever this is called.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" && -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x ../.venv/bin/python ]]; then
  PYTHON=../.venv/bin/python
fi
PYTHONPATH="$(cd .. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
RM_DISTILLER_COMMAND="$PWD/scripts/eval_judge.sh" # what a message says to run again
export PYTHONPATH RM_DISTILLER_COMMAND

exec "${PYTHON:-python}" -m RewardTrainer.eval.run_eval_judge "$@"
