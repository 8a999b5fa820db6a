#!/usr/bin/env bash
# From a bare machine to a trained, evaluated, visible temporal action localizer: environment, demo videos, shards,
# training, detections, mAP, pictures. Safe to run twice: finished steps are kept, training starts anew.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run=${RUN:-runs/quickstart}
# The recipe is tuned for two ranks of four clips: two processes, on two GPUs or two cores, or one where there is one.
ranks=$(python -c 'import os, torch; print(min(2, torch.cuda.device_count() or os.cpu_count()))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where there are no demo shards yet, this first does what these two commands do:
#   re2tal demo --out demo_data
#   re2tal shards build --dataset demo --videos demo_data/videos --annotations demo_data/annotations.json --out demo_data/shards
deepspeed --num_accelerators "$ranks" launch/train.py --recipe demo --ds ds_configs/zero2.json --out "$run" --overwrite "$@"
re2tal report --run "$run"
echo "Open $run/report/index.html"
