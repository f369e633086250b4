#!/usr/bin/env bash
# Trains five sizes on the corpus of polar-nano and fits scaling laws. About 40 minutes of one CPU core.
#   recipes/scaling/run.sh CLONE WORK_DIRECTORY
# CLONE is a clone of https://github.com/Open-Assistant/oasst-model-eval at ce935dee6922.
set -euo pipefail
clone=$1 work=$2 here=$(cd "$(dirname "$0")" && pwd)
nano=$here/../nano
mkdir -p "$work"
python "$nano/oasst.py" "$clone" "$work/trajectories.parquet"

draw() { # draw FILE PROMPTS OPTIONS: triples of policies whose terms allow training, three negatives each
  polar pair "$work/trajectories.parquet" --output "$work/$1" --negatives 3 --policies "$nano/train-policies.txt" \
    --prompt-ids "$nano/$2" "${@:3}"
}
draw train.parquet train-prompts.txt --seed 1
draw heldout.parquet dev-prompts.txt --seed 3 --per-prompt 15

cd "$work" # the recipe names its data without a directory
python "$here/scaling.py" "$here/sizes.yaml" --output sweep
