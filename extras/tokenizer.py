"""Tokenizers of real checkpoints as tiktoken.Encoding: the same tokens for any text, or a refusal.

They are byte-level BPE: a pattern cuts the text into pieces, then the bytes of a piece are merged,
pair by pair. Read in this order:
  1. PATTERNS         how a text is cut, by the names that GGUF files use
  2. Encoding         what happens to bytes that have no token
  3. from_merges      a list of merges as tiktoken's ranks, and when that is the same
  4. tokenizer_json   Hugging Face's file        tokenizer_model   Meta's file
"""

import base64
import json

import numpy as np
import regex                                     # tiktoken itself needs it
import tiktoken

# SmolLM first cuts off every digit, then applies GPT-2's pattern to each stretch between: such a
# stretch ends before a digit, and so does its white space.
PATTERNS = {
    "smollm": r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
# The same two as the steps in a tokenizer.json.
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERNS["llama-bpe"]}, "behavior": "Isolated",
         "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
STEPS = {"smollm": [DIGITS, BYTES | {"use_regex": True}],
         "llama-bpe": [SPLIT, BYTES | {"use_regex": False}]}


def check(fine, problem):
    """Raises ValueError with the line `problem` unless all is fine."""
    if not fine:
        raise ValueError(problem)


class Encoding(tiktoken.Encoding):
    """A tiktoken.Encoding in which some bytes may have no token: SmolLM2 lacks 21, six of them
    control characters. As the original does, it cuts the text into pieces, then drops such bytes
    without a word, and merges what is left of each piece. (tiktoken does not tell how it cuts; the
    package regex cuts the same, but for letters of a later Unicode than tiktoken's.)"""

    def __init__(self, name, **parts):
        super().__init__(name, **parts)
        ranks = parts["mergeable_ranks"]
        self.absent = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """As tiktoken's."""
        data = text.encode("utf-8", "replace")
        if len(data.translate(None, self.absent)) == len(data):        # nothing to drop
            return super().encode(text, allowed_special=allowed_special,
                                  disallowed_special=disallowed_special)
        every = self.special_tokens_set
        allowed = every if allowed_special == "all" else allowed_special
        refused = every - allowed if disallowed_special == "all" else disallowed_special
        check(not any(token in text for token in refused), "the text holds a special token")
        special = "|".join(map(regex.escape, allowed)) or "(?!)"       # (?!) is nowhere
        tokens = []
        for part in regex.split(f"({special})", text):
            if part in allowed:
                tokens.append(self._special_tokens[part])
                continue
            for piece in regex.findall(self._pat_str, part):
                kept = piece.encode().translate(None, self.absent)
                tokens += self._encode_single_piece(kept) if kept else []
        return tokens

    def encode_ordinary(self, text):
        """As tiktoken's."""
        return self.encode(text, disallowed_special=())

    def encode_to_numpy(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """As tiktoken's."""
        return np.array(self.encode(text, allowed_special=allowed_special,
                                    disallowed_special=disallowed_special), dtype=np.uint32)


def from_merges(pre, tokens, merges, special, whole):
    """The Encoding of tokens {letters: id}, merges [(letters, letters)], special tokens {text: id}.

    tiktoken merges any two neighbours that form a token, the lowest id first; the original merges
    the pairs of its list only, the earliest first. Every text comes out the same if ids rise along
    the list and the list merges the bytes of each token, on their own, to that token. (Proof: take
    the first pair that tiktoken merges and the list does not have. So far the bytes of those two
    were merged as if on their own. The list then goes on to the token: it does have the pair.)
    Where a piece that is a token is never merged, `whole`, it must have all pairs that form one.
    Raises ValueError if this does not hold, or `pre` is not in PATTERNS."""
    check(pre in PATTERNS, f"pre-tokenizer {pre} is not supported, only {', '.join(PATTERNS)}")
    for token in special:
        longer = [other for other in special if other.startswith(token) and other != token]
        check(not longer, f"special token {token} is the start of {longer}: not supported")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]     # bytes that are their letters
    others = sorted({*range(256)} - {*plain})
    letters = {chr(byte): byte for byte in plain}
    letters |= {chr(256 + i): byte for i, byte in enumerate(others)}

    def in_bytes(token):
        return bytes(letters[letter] for letter in token)

    ranks = {in_bytes(token): i for token, i in tokens.items()}
    order = {(in_bytes(a), in_bytes(b)): place for place, (a, b) in enumerate(merges)}
    ids = [ranks[a + b] for a, b in order]
    check(ids == sorted(ids), "tokens whose ids are not in the order of merges are not supported")
    for token in ranks:
        if whole:
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            same = all(cut in order for cut in cuts if cut[0] in ranks and cut[1] in ranks)
        else:
            same = by_list(token, order) == [token]
        check(same, f"token {token}, to which the merges do not lead, is not supported")
    return Encoding(pre, pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens=special)


def by_list(token, order):
    """What is left of a token's bytes when pairs are merged by a list {pair: place}: [bytes]."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        places = [order.get(pair, len(order)) for pair in zip(parts, parts[1:])]
        at = places.index(min(places))
        if places[at] == len(order):
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_json(path):
    """The Encoding of Hugging Face's file."""
    of = json.loads(path.read_text("utf-8"))
    bpe, cut, added = of["model"], of["pre_tokenizer"] or {}, of["added_tokens"]
    steps = cut.get("pretokenizers", [cut])
    for step in steps:
        step.pop("trim_offsets", None)           # says nothing about tokens
    pre = next((pre for pre in STEPS if STEPS[pre] == steps), json.dumps(steps))
    check(not of["normalizer"], f"normalizer {of['normalizer']} is not supported")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                "byte_fallback"):
        check(not bpe.get(key), f"{key} {bpe.get(key)} of a tokenizer is not supported")
    for token in added:
        strips = token["lstrip"] or token["rstrip"] or token["single_word"]
        check(not strips, f"added token {token} that looks at its neighbours is not supported")
    special = {token["content"]: token["id"] for token in added}
    tokens = {token: i for token, i in bpe["vocab"].items() if token not in special}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    return from_merges(pre, tokens, merges, special, bpe.get("ignore_merges", False))


def tokenizer_model(path, scaled):
    """The Encoding of Meta's file: a token in base64 and its rank in each line. The 256 special
    tokens are not in it. Their names are Llama 3's; with `scaled` rotary angles Llama 3.1's."""
    try:
        lines = [line.split() for line in path.read_text("ascii").splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError("tokenizer.model is not Llama 3's: not supported") from None
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    if scaled:
        names |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    unnamed = [i for i in range(256) if i not in names]
    names |= {i: f"reserved_special_token_{n}" for n, i in enumerate(unnamed)}
    special = {f"<|{name}|>": len(ranks) + i for i, name in names.items()}
    return Encoding("llama-bpe", pat_str=PATTERNS["llama-bpe"], mergeable_ranks=ranks,
                    special_tokens=special)
