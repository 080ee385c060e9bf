#!/usr/bin/env bash
# Train a reward model: scored pairs -> a stock sequence-classification model. The paper's whole loss (distilrm) by default.
#
#   bash scripts/train_distilrm.sh                                            # configs/train/example.yaml
#   NUM_PROCESSES=2 bash scripts/train_distilrm.sh --config configs/train/paper.yaml
#   ZERO=3 bash scripts/train_distilrm.sh --learning_rate 1e-4                # every argument goes to run_reward_train.py
#   bash scripts/train_distilrm.sh --resume_from_checkpoint last
#   HOSTFILE=hosts.txt bash scripts/train_distilrm.sh --config ...            # several nodes, DeepSpeed's hostfile format
#   bash scripts/train_distilrm.sh --help                                     # this, and the flags
#
# NUM_PROCESSES  processes on this machine; default: the number of GPUs, or 1. With a hostfile: on each node, default its slots
# ZERO           2 (default), 1, 3, 2_offload, 3_offload: which of configs/deepspeed/; a single process takes single.json.
#                `--deepspeed FILE` gives another
# MASTER_PORT    default: a free one (with a hostfile 29500)
# MASTER_ADDR    with a hostfile: the first node's address for the others; default: the first that its `hostname -I` gives
# TORCH_EXTENSIONS_DIR  where DeepSpeed keeps what it compiles; default: in the Python environment
# SIGTERM saves a checkpoint and ends with exit code 143, to this script, to a rank, or to all at once; so do SIGUSR1 and SIGHUP.
# Paths are relative to RewardTrainer/, from wherever this is called.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config="${TRAIN_CONFIG:-configs/train/example.yaml}"
if ! command -v deepspeed >/dev/null && [[ -x ../.venv/bin/deepspeed ]]; then
  PATH="$(cd .. && pwd)/.venv/bin:$PATH"
fi
PYTHONPATH="$(cd .. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PATH PYTHONPATH

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
processes="${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}"
if ((gpus == 0)); then
  export DS_ACCELERATOR=cpu
  # Cores that are idle now: threads wait for each other by spinning, and one whose core is taken makes a step many times
  # as long.
  cores="$(python -c 'from distiller.cpu import idle_cores; print(idle_cores())')"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
fi

# Not in the home directory, where a second environment would compile it again, in turn with this one.
if [[ -z "${TORCH_EXTENSIONS_DIR:-}" ]]; then
  environment="$(python -c 'import sys; print(sys.prefix)')"
  if [[ -w "$environment" ]]; then
    export TORCH_EXTENSIONS_DIR="$environment/torch_extensions"
  fi
fi
# A build that was killed leaves its lock, for which every later training would wait without a word. Who holds one has it
# open. But another machine that shares the directory is not seen here, hence the minutes.
remove_dead_locks() { # MINUTES of age at least
  local held
  [[ -d "${TORCH_EXTENSIONS_DIR:-}" ]] || return 0
  held="$(find /proc/[0-9]*/fd -type l -printf '%l\n' 2>/dev/null || true)"
  find "$TORCH_EXTENSIONS_DIR" -maxdepth 2 -name lock -mmin "+$1" 2>/dev/null | while read -r lock; do
    grep -qxF "$(realpath "$lock")" <<<"$held" || rm -f "$lock" || true
  done || true
}
remove_dead_locks 10
if ((gpus == 0)) && [[ -n "${TORCH_EXTENSIONS_DIR:-}" && ! -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/deepspeed_shm_comm.so" ]]; then
  echo "DeepSpeed compiles its extension for CPUs: once, about half a minute" >&2 || true
fi

if [[ -n "${ZERO:-}" && ! -f "configs/deepspeed/zero$ZERO.json" ]]; then
  echo "error: ZERO=$ZERO: not one of 1, 2, 3, 2_offload, 3_offload" >&2
  exit 2
fi

launch=(--log_level critical) # of the launchers: what they say is of no use to who trains
hosts=()
if [[ -n "${HOSTFILE:-}" ]]; then
  if [[ ! -f "$HOSTFILE" ]]; then # DeepSpeed would train on this machine alone
    echo "error: HOSTFILE=$HOSTFILE: no such file from $PWD; give its absolute path" >&2
    exit 1
  fi
  mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$HOSTFILE")
  if ((${#hosts[@]} > 1)) && ! command -v pdsh >/dev/null; then
    echo "error: pdsh is not installed here, and DeepSpeed starts the ranks of other nodes through it (Debian's package: pdsh)" >&2
    exit 1
  fi
  MASTER_PORT="${MASTER_PORT:-29500}"
  launch+=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT")
  [[ -n "${MASTER_ADDR:-}" ]] && launch+=(--master_addr "$MASTER_ADDR")
  [[ -n "${NUM_PROCESSES:-}" ]] && launch+=(--num_accelerators "$NUM_PROCESSES")
else
  free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
  MASTER_PORT="${MASTER_PORT:-$(python -c "$free_port")}"
  launch+=(--master_port "$MASTER_PORT")
  if ((gpus > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    # Given a number of processes, the launcher would forget the variable and take the first GPUs of the machine.
    if [[ ! "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
      echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher wants numbers, as in 2,3" >&2
      exit 1
    fi
    launch+=(--include "localhost:$(cut -d, -f"1-$processes" <<<"$CUDA_VISIBLE_DEVICES")")
  else
    launch+=(--num_accelerators "$processes")
  fi
fi

# What the recipe or the command line says comes before the defaults here.
defaults=(--config "$config")
zero_config=(--deepspeed "configs/deepspeed/zero${ZERO:-2}.json")
if [[ -z "${ZERO:-}${HOSTFILE:-}" ]] && ((processes == 1)); then # nothing to share out
  zero_config=(--deepspeed configs/deepspeed/single.json)
fi
arguments=("$@")
for i in "${!arguments[@]}"; do
  case "${arguments[i]}" in
    --config) config="${arguments[i + 1]:-}" defaults=() ;;
    --config=*) config="${arguments[i]#*=}" defaults=() ;;
    --deepspeed | --deepspeed=*) zero_config=() ;;
    -h | --help) exec python -m RewardTrainer.train.run_reward_train --help ;; # once, not on every rank
  esac
done
if [[ -f "$config" ]] && grep -q '^deepspeed:' "$config"; then
  zero_config=()
fi
defaults+=("${zero_config[@]}")

# In a session of its own: a signal to the process group (`timeout`, a scheduler) reaches this script, which tells the
# ranks, and not DeepSpeed's launchers, which would kill them.
session=()
command -v setsid >/dev/null && session=(setsid)
(
  trap '' USR1
  exec ${session[@]+"${session[@]}"} deepspeed "${launch[@]}" --no_local_rank --module RewardTrainer.train.run_reward_train \
    ${defaults[@]+"${defaults[@]}"} "$@"
) &
launcher=$!
stopped=
if [[ -n "${session[*]-}" ]]; then # killed outright (SIGKILL to its group), this script can tell nobody: this one can
  (setsid bash -c 'while kill -0 "$1" && kill -0 "$2"; do sleep 1; done; kill -0 "$1" || ! kill -0 "$2" || pkill -KILL -s "$2"' watcher \
    $$ "$launcher" </dev/null >/dev/null 2>&1 &)
fi

# Pre-emption: the ranks save a checkpoint and end. DeepSpeed's launchers would not let them: the one of a single node dies
# and leaves them running, that of several kills them. So the signal goes to the children of each node's launcher.
stop() {
  stopped=1
  if ((${#hosts[@]} > 1)); then
    local ranks="pgrep -d, -f '^[^ ]+ -u -m deepspeed[.]launcher[.]launch .* --node_rank=%n .* --master_port=$MASTER_PORT '"
    local told
    told="$(PDSH_RCMD_TYPE=ssh pdsh -w "$(IFS=, && echo "${hosts[*]}")" "pkill -TERM -P \$($ranks) && echo told" || true)"
    [[ "$told" == *told* ]] || kill -TERM "$launcher" # no rank anywhere yet: nothing to save
  else
    python - "$launcher" <<'PYTHON' || kill -TERM "$launcher" 2>/dev/null || true
import contextlib
import sys

import psutil  # DeepSpeed's own dependency

with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
    runner = psutil.Process(int(sys.argv[1]))
    ranks = [rank for node in runner.children() for rank in node.children()]
    for process in ranks or [*runner.children(), runner]:  # no rank yet: nothing to save
        process.terminate()
PYTHON
  fi
}
trap stop TERM USR1 HUP
interrupted=
trap 'interrupted=130; [[ -z "${session[*]-}" ]] || kill -INT -- "-$launcher" 2>/dev/null || true' INT # the launcher ends the ranks

code=0
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done
if [[ -n "$stopped" && -n "${session[*]-}" ]]; then # a launcher that was told as well may be gone before its ranks
  while ps -o stat= -s "$launcher" 2>/dev/null | grep -q '^[^Z]'; do sleep 0.5; done
fi
((code == 241)) && code=143 # no step yet, no checkpoint: how DeepSpeed says that a signal ended the ranks
((code == 0)) || remove_dead_locks 0
if ((gpus == 0)) && [[ -z "${HOSTFILE:-}" ]]; then
  rm -f /dev/shm/deepspeed_*_"$MASTER_PORT"_* # 66 MB a rank, which DeepSpeed leaves behind on a CPU
fi
case $code in
  0 | 1 | 2 | 130 | 143) ;; # said by the ranks themselves
  *) echo "error: training ended with exit code $code (137 and 247: a process was killed, mostly for want of memory)" >&2 ;;
esac
exit "${interrupted:-$code}"
