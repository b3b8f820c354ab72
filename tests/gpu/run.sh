#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in ten minutes at most; the most telling first.
#
#   bash tests/gpu/run.sh OUT                       writes OUT/gpu.md, OUT/gpu.json and OUT/gpu.log, row by row
#   bash tests/gpu/run.sh OUT --only speed,memory   these groups alone
#   bash tests/gpu/run.sh OUT --tiny                tiny models, on the CPU too: whether the script itself works
#
# PYTHON=… names the interpreter (python3). tests/gpu/fetch_wheels.py brings what it lacks where there is no internet.

set -euo pipefail

here="$(cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTORCH_ALLOC_CONF=expandable_segments:True # as job.sh does
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$here/check_gpu.py" "$@"
