#!/usr/bin/env bash
# Expected: nn.Embedding on the meta device, which has shapes and no numbers, costs nothing.
# Happens (torch 2.13.0): the first one imports torch._dynamo, through init.normal_. nn.Linear with
# its uniform_ does not, nor does an nn.Embedding on the CPU.
# Matters: building on the meta device and assigning a checkpoint is meant to save time; for a small
# model this import takes longer than the rest, and it lands in whatever is being timed.
# Seen 2026-11-30: nn.Linear 0 modules; nn.Embedding 823 modules, 1.5 s; a second one 0.
# One to two minutes, 1 GB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys
import time

import torch


def build(what, kind, device):
    """Builds a small layer; prints and returns how many modules that imported."""
    before, start = len(sys.modules), time.perf_counter()
    kind(4, 4, device=device)
    new, seconds = len(sys.modules) - before, time.perf_counter() - start
    print(f"{what:30} {new:4} modules {seconds:6.3f} s")
    return new


print("torch", torch.__version__)
cpu = build("nn.Embedding, CPU", torch.nn.Embedding, "cpu")
linear = build("nn.Linear, meta", torch.nn.Linear, "meta")
before = "torch._dynamo" in sys.modules
first = build("nn.Embedding, meta", torch.nn.Embedding, "meta")
after = "torch._dynamo" in sys.modules
build("nn.Embedding, meta, again", torch.nn.Embedding, "meta")
print("torch._dynamo imported before, after:", before, after)
if before or not after or first < 100 or cpu or linear:
    sys.exit("CHANGED: nn.Embedding on the meta device no longer imports the compiler alone")
PY
