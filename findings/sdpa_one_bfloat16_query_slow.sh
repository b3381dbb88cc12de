#!/usr/bin/env bash
# Expected: scaled_dot_product_attention is not slower for one query than for two, nor in bfloat16
# than in float32, on a processor with bfloat16 instructions (without avx512_bf16: exit code 2).
# Happens (torch 2.13.0, CPU, one thread, 16 heads, 4096 keys): it is, by more than 2 and 3 times,
# and by 8 times against two matrix products and a softmax.
# Matters: decoding is one query at a time. Such times are this kernel's, and they overstate what a
# smaller cache saves.
# Seen 2026-11-30, ms: bfloat16 7.6, two queries 3.2, by hand 1.0; float32 2.1, by hand 1.8.
# Half a minute, 1 GB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if ! grep -q -w avx512_bf16 /proc/cpuinfo; then
    echo "this processor has no avx512_bf16: nothing to see here" >&2
    exit 2
fi
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, CACHED, SIZE = 16, 4096, 64


def milliseconds(function, repeats=30):
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def by_hand(q, k, v):
    """Attention without a mask."""
    return (q * SIZE ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v


torch.manual_seed(0)
torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
times = {}
for kind in (torch.float32, torch.bfloat16):
    k, v = torch.randn(2, 1, HEADS, CACHED, SIZE).to(kind)
    for queries in (1, 2, 16):
        q = torch.randn(1, HEADS, queries, SIZE).to(kind)
        fused = milliseconds(lambda: scaled_dot_product_attention(q, k, v))
        hand = milliseconds(lambda: by_hand(q, k, v))
        gap = (scaled_dot_product_attention(q, k, v) - by_hand(q, k, v)).abs().max().item()
        times[kind, queries] = fused, hand
        print(f"{kind!s:15} queries {queries:2}: {fused:6.2f} ms, by hand {hand:6.2f} ms, "
              f"apart by {gap:.0e}")
one, hand = times[torch.bfloat16, 1]
two, _ = times[torch.bfloat16, 2]
if one < 1.5 * two or one < 3 * hand:
    sys.exit("CHANGED: one bfloat16 query is no longer slow")
PY
