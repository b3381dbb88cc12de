#!/bin/bash
# bash extras/gpu.sh OUT [OPTION ...]: all that this project wants to know of a GPU, in ten minutes.
#   1. the gpu preset whole, with its tables   2. its speed   3. pre-training at a size that fills a GPU
# Options of evolve.py come last and win: `bash extras/gpu.sh /tmp/try --preset smoke --device cpu`
# tries the script itself on a CPU. All output is also in OUT/*.txt.
set -eo pipefail
out=${1:?usage: bash extras/gpu.sh OUT [OPTION of evolve.py ...]}
shift
mkdir -p "$out"
timeout 400 python evolve.py --preset gpu --out "$out/gpu" "$@" 2>&1 | tee "$out/run.txt"
timeout 100 python -m extras.bench "$out/gpu" --report_at 1,4 2>&1 | tee "$out/bench.txt"
least="--steps 1 --generations 1 --popsize 4 --prompts 1 --choose_prompts 1 --report_prompts 1
       --far_prompts 1 --report_at 1 --evolve_at 1 --methods namm,full"
large="--n_layer 16 --n_embd 2048 --n_head 16 --n_kv_head 8 --head_dim 128 --n_hidden 5632"
timeout 200 python evolve.py --preset gpu $large --out "$out/large" "$@" $least 2>&1 | tee "$out/large.txt"
timeout 100 python -m extras.bench "$out/large" --report_at 1 2>&1 | tee -a "$out/large.txt"
