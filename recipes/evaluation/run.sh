#!/usr/bin/env bash
# Fine-tunes polar-nano and the same network from random weights, evaluates all of them, and writes the report.
#   recipes/evaluation/run.sh DATA WORK [EMBEDDING_MODEL]
# DATA is described in prepare.py. EMBEDDING_MODEL is a sentence-transformers directory or hub name for one more baseline.
set -euo pipefail
data=$1 work=$2 embedding=${3:-} here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python "$here/prepare.py" "$data" "$work"
pair() { # pair FILE OPTIONS: triples of the dev prompts
  polar pair "$data/policies/oasst_model_eval.parquet" --output "$work/$1" --seed 3 \
    --prompt-ids "$here/../nano/dev-prompts.txt" "${@:2}"
}
pair discrimination.parquet --per-prompt 15
pair neighbours.parquet --per-prompt 4 --strategy checkpoint --policies-table "$work/runs.jsonl"

finetune() { # finetune MODEL DATA OUTPUT
  polar finetune --config "$here/finetune.yaml" --model "$1" --data "$work/$2" --output "$work/$3"
}
python "$here/random_start.py" polar-nano "$work/random"
finetune polar-nano train.jsonl finetuned
finetune "$work/random" train.jsonl without-pretraining
finetune "$work/random" train-without-reference.jsonl without-pretraining-and-reference

evaluate() { # evaluate MODEL OUTPUT OPTIONS
  polar eval "$here/suite.yaml" --data "$work" --model "$1" --output "$work/runs/$2" --limit 500 \
    --max-length 1024 --max-response-length 256 "${@:3}"
}
evaluate polar-nano polar-nano --without-reference ${embedding:+--embedding "$embedding"}
evaluate "$work/finetuned" finetuned
evaluate "$work/without-pretraining" without-pretraining
evaluate "$work/without-pretraining-and-reference" without-pretraining-and-reference --reference-free
polar eval report "$work"/runs/{polar-nano,finetuned,without-pretraining,without-pretraining-and-reference} \
  --output "$work/report/report.html" --without-texts
