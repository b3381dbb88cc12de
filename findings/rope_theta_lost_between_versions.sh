#!/usr/bin/env bash
# Expected: a Llama's config.json that transformers 5 saved means the same to 4, or is refused.
# Happens (5.24.0 writes, 4.57.6 reads): 5 writes rope_theta only inside "rope_parameters"; 4 keeps
# that entry unused and takes its default, 10000. No warning.
# Matters: a checkpoint that was just saved again turns its keys at another speed than in training,
# and a test of long prompts blames the cache. Any reader of a top-level rope_theta does the same.
# Seen 2026-11-30: 500000.0 saved, none at the top level, 10000.0 read.
# One to two minutes, 600 MB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for number in 5.24.0 4.57.6; do
    python3 -m venv "$dir/$number"
    "$dir/$number/bin/pip" install -q --no-compile "transformers==$number"
done
cat > "$dir/write.py" <<'PY'
import sys

from transformers import LlamaConfig

LlamaConfig(rope_theta=500000.0).save_pretrained(sys.argv[1])
PY
cat > "$dir/read.py" <<'PY'
import json
import sys

import transformers
from transformers import AutoConfig

saved = json.load(open(sys.argv[1] + "/config.json"))
config = AutoConfig.from_pretrained(sys.argv[1])
print("saved by", saved["transformers_version"], "   ", saved["rope_parameters"])
print("rope_theta at the top level:", saved.get("rope_theta"))
print("read by", transformers.__version__, "    rope_theta", config.rope_theta, config.model_type)
if "rope_theta" in saved or config.rope_theta != 10000.0:
    sys.exit("CHANGED: the rotary base of a new config.json reaches the old reader")
PY
"$dir/5.24.0/bin/python" "$dir/write.py" "$dir/saved"
"$dir/4.57.6/bin/python" "$dir/read.py" "$dir/saved"
