#!/usr/bin/env bash
# Run everything that needs a GPU: test the kernels against float64 and the paged optimizer against PyTorch's, compare
# the memory plan with a training step, tune the kernels, time products and a training step beside their peers, and run a
# sweep with its report.
# Usage: experiments/gpu.sh [FOLDER]. JSON, tables and figures go into FOLDER, by default reports/gpu.
# On a machine without a network, install the checkout with --no-deps, or put it on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-reports/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$out/device.csv"
$python -m pytest tests/qbench/ops tests/formats/test_bitsandbytes.py tests/qbench/training/optim tests/qbench/runs/test_isolated.py --hypothesis-seed=0 2>&1 | tee "$out/tests.txt"
for checkpointing in false true; do
  $python -m qbench plan model=smollm-135m +format=nf4 dq=true tune.checkpointing=$checkpointing check=true \
    "json=$out/plan-$checkpointing.json" 2>&1 | tee "$out/plan-$checkpointing.txt"
done
$python -m qbench bench products --models 7B --rows 1 16 128 1024 --formats nf4 --out "$out/untuned"
$python -m qbench bench tune --out "$out/choices.json"
export QBENCH_TUNED=$out/choices.json
$python -m qbench bench products --out "$out"
$python -m qbench bench step --out "$out"
$python -m qbench +experiments=quick "hydra.sweep.dir=$out/quick"
$python -m qbench report "$out/quick"
