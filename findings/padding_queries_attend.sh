#!/usr/bin/env bash
# Expected: with an attention_mask, padding has no part in attention.
# Happens (transformers 5.24.0, attn_implementation="eager"): real queries are right, but a padding
# query attends to all keys alike, real and later ones too; its mask is finite, so that the softmax
# of a row masked everywhere is 1 / length, not 0.
# Matters: rules that score cached tokens by the attention received, summed over queries, count
# these rows: in a left-padded batch a score depends on the other prompts. Mask the queries first.
# Seen 2026-11-30, 4 heads: four tokens' sums 8.34 4.31 2.35 1.00 alone, each 2.00 more behind four
# of padding, which has 2.00 each too. Two minutes, 1.3 GB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$dir/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 64, (1, 4))
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
places = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 3]])
with torch.no_grad():
    alone = model(prompt, output_attentions=True)
    behind = model(padded, attention_mask=mask, position_ids=places, output_attentions=True)
rows, padded_rows = alone.attentions[0], behind.attentions[0]      # (1, heads, queries, keys)
received = rows.sum(dim=(0, 1, 2))
padded_received = padded_rows.sum(dim=(0, 1, 2))
repaired = (padded_rows * mask[:, None, :, None]).sum(dim=(0, 1, 2))

torch.set_printoptions(precision=2, sci_mode=False)
print("transformers", transformers.__version__, "torch", torch.__version__)
print("largest difference of the logits:", (alone.logits - behind.logits[:, 4:]).abs().max().item())
print("row of the first padding query:  ", padded_rows[0, 0, 0])
print("attention received, alone:       ", received)
print("attention received, padded:      ", padded_received)
print("the same, padding queries removed:", repaired[4:])
same_rows = torch.allclose(rows, padded_rows[:, :, 4:, 4:], atol=1e-6)
uniform = torch.allclose(padded_rows[:, :, :4], torch.full((), 1 / 8))
if not same_rows or not uniform or not torch.allclose(repaired[4:], received, atol=1e-5):
    sys.exit("CHANGED: padding queries no longer attend to everything")
PY
