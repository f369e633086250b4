#!/usr/bin/env bash
# Trains polar-mini on a GPU for at most ten minutes, on a machine with torch, transformers and accelerate.
#   recipes/mini/gpu.sh START GROUPS OUT [MINUTES]
# START: a reward model directory below 64 MB (release.py). GROUPS: what `gpu.py encode` wrote. OUT: a folder.
set -euo pipefail
start=$1 groups=$2 out=$3 minutes=${4:-8} here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
python "$here/gpu.py" train "$start" "$groups" "$out/trained.safetensors" --minutes "$minutes" 2>&1 | tee "$out/train.log"
