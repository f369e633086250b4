#!/usr/bin/env bash
# Reinforcement fine-tuning with verl and the rewards of a POLAR server.
#
#   recipes/verl/run.sh DATA ALGORITHM POLICY [key=value ...]     DATA: hh-rlhf, general, math; ALGORITHM: ppo, grpo
#   recipes/verl/run.sh math grpo Qwen/Qwen2.5-7B-Instruct
#
#   POLAR_DATA             directory of DATA/train.parquet (polar rft-data); default ~/data/polar
#   POLAR_REWARD_ADDRESS   of the reward server; default 127.0.0.1:30000
#   POLAR_REWARD_MODEL     the checkpoint that it serves, a directory that all nodes see; default: polar serve tells it
#   NNODES, NODE_RANK, MASTER_ADDR   for a Ray cluster: run the same line on every node
set -euo pipefail

if (($# < 3)); then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
data=$1 algorithm=$2 policy=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
directory=${POLAR_DATA:-$HOME/data/polar}/$data
nodes=${NNODES:-1} rank=${NODE_RANK:-0}

if ((nodes > 1)); then
  : "${MASTER_ADDR:?the address of the first node}"
  # Ray asks nodes that join for a token, ~/.ray/auth_token or RAY_AUTH_TOKEN, the same on all of them.
  export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
  if ((rank > 0)); then
    for ((try = 0; try < 600; try++)); do # the first node may come up later
      (exec 3<> "/dev/tcp/$MASTER_ADDR/6379") 2> /dev/null && break
      sleep 1
    done
    exec ray start --address "$MASTER_ADDR:6379" --disable-usage-stats --block # until the cluster ends
  fi
  ray start --head --node-ip-address "$MASTER_ADDR" --port 6379 --dashboard-host 127.0.0.1 --disable-usage-stats
  trap 'ray stop' EXIT
  "$python" "$here/wait_for_nodes.py" "$nodes"
  export RAY_ADDRESS=$MASTER_ADDR:6379
fi

if [[ -e $directory/test.parquet ]]; then
  set -- "data.val_files=$directory/test.parquet" "$@"
fi
if [[ -n ${POLAR_REWARD_MODEL:-} ]]; then
  set -- "reward.custom_reward_function.reward_kwargs.model='$POLAR_REWARD_MODEL'" "$@"
fi
"$python" -m verl.trainer.main_ppo --config-path "$here" --config-name "$data" \
  by="$algorithm" \
  data.train_files="$directory/train.parquet" \
  actor_rollout_ref.model.path="$policy" \
  reward.custom_reward_function.reward_kwargs.address="'${POLAR_REWARD_ADDRESS:-127.0.0.1:30000}'" \
  trainer.nnodes="$nodes" \
  "$@"
