#!/usr/bin/env bash
# From a bare machine to a trained, evaluated, visible temporal action localizer: environment, demo videos, shards,
# training, detections, mAP, pictures. Safe to run twice: finished steps are kept, training starts anew.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run=${RUN:-runs/quickstart}
re2tal demo --out demo_data
re2tal shards build --dataset demo --videos demo_data/videos --annotations demo_data/annotations.json \
    --out demo_data/shards

# One process per GPU; without a GPU, one process per two cores would idle half the machine, so one per core.
ranks=$(python -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count()))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
deepspeed --num_accelerators "$ranks" launch/train.py --recipe demo --ds ds_configs/zero2.json --out "$run" --overwrite "$@"
re2tal report --run "$run"
echo "Open $run/report/index.html"
