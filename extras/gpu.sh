#!/bin/bash
# bash extras/gpu.sh OUT [OPTION ...]: all that this project wants to know of a GPU, in ten minutes.
#   1. the gpu preset whole, with its tables   2. its speed   3. pre-training at a size that fills a GPU
# Options of evolve.py come last and win. To try the script itself on a CPU, in two minutes:
#   LARGE="--n_layer 4" bash extras/gpu.sh runs/try --preset smoke --device cpu
# All output is also in OUT/*.txt.
set -eo pipefail
out=${1:?usage: bash extras/gpu.sh OUT [OPTION of evolve.py ...]}
shift
mkdir -p "$out"
timeout 330 python evolve.py --preset gpu --out "$out/gpu" "$@" 2>&1 | tee "$out/run.txt"
timeout 90 python -m extras.bench "$out/gpu" --report_at 1,4 2>&1 | tee "$out/bench.txt"
least="--steps 1 --generations 1 --popsize 4 --prompts 1 --choose_prompts 1 --report_prompts 1
       --far_prompts 1 --report_at 1 --evolve_at 1 --methods namm,full"
wide="--n_layer 16 --n_embd 2048 --n_head 16 --n_kv_head 8 --head_dim 128 --n_hidden 5632 --rows 8"
large=${LARGE:-$wide}
timeout 110 python evolve.py --preset gpu $large --out "$out/large" "$@" $least 2>&1 \
  | tee "$out/large.txt"
timeout 60 python -m extras.bench "$out/large" --report_at 1 2>&1 | tee -a "$out/large.txt"
