#!/usr/bin/env bash
# Train a baseline: Bradley-Terry on original pairs by default; `--loss_type` takes the others.
#
#   bash scripts/train_rm.sh                                                  # configs/train/example_bt.yaml
#   bash scripts/train_rm.sh --loss_type margin --train_file ../data/scored.jsonl --output_dir ../output/rm-margin
#   NUM_PROCESSES=2 bash scripts/train_rm.sh --config configs/train/paper_bt.yaml
#
# Variables and arguments are those of train_distilrm.sh.
set -euo pipefail
export TRAIN_CONFIG="${TRAIN_CONFIG:-configs/train/example_bt.yaml}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_distilrm.sh" "$@"
