#!/usr/bin/env bash
# The evidence from the first network to table and plot; what is done already is not done again.
#   recipes/rft/run.sh WORK_DIRECTORY [SEED...]
set -euo pipefail
work=$1 here=$(cd "$(dirname "$0")" && pwd)
shift
OMP_NUM_THREADS=1 python "$here/evidence.py" "$work" --seeds "${@:-0}"
python "$here/report.py" "$work" --output "$work/report"
