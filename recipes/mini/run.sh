#!/usr/bin/env bash
# Trains polar-mini from a small language model, evaluates it, and makes the checkpoint that ships. Every stage goes on
# where it was stopped: start the same command again.
#   recipes/mini/run.sh DATA SOURCE WORK
# DATA holds the Parquet files that recipes/evaluation/prepare.py describes; SOURCE is what base.py reads.
set -euo pipefail
data=$1 source=$2 work=$3 here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work"
# glibc gives large freed blocks back to the kernel, which then clears every page anew
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000

[ -f "$work/base/config.json" ] || python "$here/base.py" "$source" "$work/base"

families=$work/families.parquet
[ -f "$families" ] || python -c "
import duckdb
duckdb.sql(\"copy (select policy, family from '$data/policy_index.parquet' where source = 'oasst_model_eval'
and family is not null) to '$families'\")"
draw() { # draw FILE OPTIONS: triples of the training prompts and policies of polar-nano
  [ -f "$work/$1" ] || polar pair "$data/policies/oasst_model_eval.parquet" --output "$work/$1" --policies-table "$families" "${@:2}"
}
nano=$here/../nano
for strategy in random family; do
  draw "triples-$strategy.parquet" --negatives 2 --per-prompt 8 --strategy "$strategy" --seed 1 \
    --prompt-ids "$nano/train-prompts.txt" --policies "$nano/train-policies.txt"
done
draw discrimination.parquet --per-prompt 15 --seed 3 --prompt-ids "$nano/dev-prompts.txt"
for draw in first:1 second:2 second:3 chat:11 chat:12 chat:13; do # the held-out part is that of the last kind of draw
  name=${draw%:*} seed=${draw#*:}
  [ -f "$work/mixture-$seed.parquet" ] ||
    python "$here/mixture.py" "$data" "$work/mixture-$seed.parquet" "$work/held-out.parquet" --seed "$seed" --draw "$name"
done

stage() { # stage NAME MODEL FILES...: one phase of training
  local name=$1 model=$2 files=() && shift 2
  for file in "$@"; do files+=(--data "$work/$file"); done
  [ -f "$work/$name/polar.json" ] ||
    polar pretrain --config "$here/pretrain-$name.yaml" --model "$work/$model" "${files[@]}" --output "$work/$name"
}
stage policies base triples-random.parquet triples-family.parquet
stage mixture policies mixture-1.parquet
stage second mixture mixture-2.parquet
stage third second mixture-3.parquet
stage chat third mixture-11.parquet mixture-12.parquet mixture-13.parquet
stage last chat mixture-11.parquet mixture-12.parquet mixture-13.parquet

python "$here/release.py" "$work/last" "$work/polar-mini"
python "$here/evaluation.py" "$data" "$work/held-out.parquet" "$work/sets"
cp "$work/discrimination.parquet" "$work/sets/"
python "$here/verdicts.py" "$work/polar-mini" "$work/sets/verify-bench-hard.jsonl"
polar eval "$here/suite.yaml" --data "$work/sets" --model "$work/polar-mini" --output "$work/results/polar-mini"
