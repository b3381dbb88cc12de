"""Real text, a tokeniser learned from it, and eight long-context tasks over it.

Read in this order:
  1. documents, split        text that every Python carries, cut by document into four disjoint parts
  2. learn_bpe, tokenizer    byte-pair ranks from the training part, served by tiktoken
  3. Part, make_parts        what one part owns: its token stream and its words
  4. TASKS                   one short function each: a context to read, questions to answer afterwards
  5. batch, training_batch   prompts as tensors, and what to predict while the GPT is trained

A prompt of length L is a context of L - room(L) tokens, then questions of at most room(L) tokens. The cache is
compressed while the context is read, before any question is known. Letters: N prompts, L tokens, V vocabulary.
"""

import base64
import collections
import hashlib
import pathlib
import pydoc_data.topics
import re
import sysconfig
from dataclasses import dataclass, replace

import numpy as np
import tiktoken
import torch

# How text is cut before byte pairs are merged: words, single digits, runs of marks, line ends, other white space.
PATTERN = r" ?[^\W\d_]+| ?\d| ?[^\s\w]+|_+|\s*\n|\s+"
SUFFIXES = (".txt", ".md", ".rst", ".py")
SHARES = {"train": 0.64, "evolve": 0.14, "choose": 0.08, "report": 0.14}   # of the documents
WORDS = {"values": 0.25, "evolve": 0.25, "choose": 0.10, "report": 0.25}   # of the words; to train: all other tokens


# --- 1. Documents ----------------------------------------------------------------------------------------------------

def documents(corpus=None):
    """The texts to learn from, [str]: without `corpus` the language reference (one document a topic) and the sources of the
    standard library; with it a file, or a folder's SUFFIXES files, cut into pieces of some 4,000 characters at blank lines if there
    are few. Raises ValueError, with a line for the user, when there is nothing to read."""
    if corpus is None:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "pydoc_data", "__pycache__"}              # pydoc_data holds the reference once more
        files = sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
        return list(pydoc_data.topics.topics.values()) + [f.read_text("utf-8", "replace") for f in files]
    path = pathlib.Path(corpus)
    if not path.exists():
        raise ValueError(f"--corpus {corpus}: no such file or folder")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--corpus {corpus}: the folder holds no {', '.join(SUFFIXES)} file")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(f"--corpus {file}: not readable as UTF-8 text ({type(error).__name__})") from None
        if "\0" in texts[-1]:
            raise ValueError(f"--corpus {file}: binary, not text")
    if not any(text.strip() for text in texts):
        raise ValueError(f"--corpus {corpus}: empty")
    if len(texts) < 100:                                                   # a book or two: split inside the files
        texts = [piece for text in texts for piece in re.findall(r"(?s).{1,4000}(?:\n\s*\n|$)|.{4000}", text)]
    return texts


def split(texts):
    """Deal documents to the parts of SHARES, {part: [text]}, by a hash of the text: the same document always goes to
    the same part, in whatever order it comes, and two copies of one document never go to different parts."""
    edges, parts = np.cumsum(list(SHARES.values())), {name: [] for name in SHARES}
    for text in texts:
        draw = int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12], 16) / 16 ** 12
        parts[list(SHARES)[int(np.searchsorted(edges[:-1], draw, side="right"))]].append(text)
    return parts


# --- 2. Tokeniser ----------------------------------------------------------------------------------------------------

def learn_bpe(text, vocab_size):
    """Byte-pair ranks, {bytes: rank}: the 256 bytes, the ten " digit" pairs (so that a number is one token a digit),
    then the most frequent pair of neighbours again and again. Pair counts are kept up to date instead of recounted."""
    words = collections.Counter(re.findall(PATTERN, text))
    pieces, counts = [[bytes([byte]) for byte in word.encode()] for word in words], list(words.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)     # pair -> count, pair -> words that hold it
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" %d" % digit: 256 + digit for digit in range(10)}
    while len(ranks) < vocab_size and any(pairs.values()):
        best = max(pairs, key=pairs.get)
        merged = best[0] + best[1]
        ranks.setdefault(merged, len(ranks))
        for i in where.pop(best):
            old, new = pieces[i], []
            for token in old:                                              # greedy, left to right
                if new and (new[-1], token) == best:
                    new[-1] = merged
                else:
                    new.append(token)
            for pair in zip(old, old[1:]):
                pairs[pair] -= counts[i]
            for pair in zip(new, new[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
            pieces[i] = new
        del pairs[best]
    return ranks


def tokenizer(name, vocab_size, path, texts):
    """A tiktoken.Encoding. `name` "learned": the ranks in the file `path` (see ranks_file) or, without it, those of
    `vocab_size` tokens learned from `texts`; any other name is tiktoken's. Raises ValueError when tiktoken does not know
    the name or cannot fetch its ranks."""
    if name != "learned":
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:                                         # unknown name, no network, bad download
            raise ValueError(f"--tokenizer {name}: tiktoken cannot load it ({type(error).__name__}); it needs the "
                             f"network once, or use --tokenizer learned") from None
    path = pathlib.Path(path)
    if path.exists():
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
        except ValueError:
            raise ValueError(f"{path}: damaged, or not a file of this program; take that of the run it belongs to") from None
    else:
        ranks = learn_bpe("\n".join(text[:2000] for text in texts)[:2_000_000], vocab_size)
    return tiktoken.Encoding("learned", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def ranks_file(encoding):
    """The ranks as tiktoken writes them: a token in base64 and its rank, one a line."""
    rank = encoding.encode_single_token
    return "".join(f"{base64.b64encode(t).decode()} {rank(t)}\n" for t in encoding.token_byte_values())


# --- 3. Parts --------------------------------------------------------------------------------------------------------

@dataclass
class Part:
    """What one part owns: no document and no key of it is in another part."""
    tokens: np.ndarray           # (many,) its documents, one after the other
    words: np.ndarray            # (some,) its words, each one token: the keys of the tasks
    values: np.ndarray           # (some,) words for the answers, one token each, the same in all parts
    ends_line: np.ndarray        # (V,) bool: this token ends a line
    blank: np.ndarray            # (V,) bool: this token is white space
    looks_back: np.ndarray       # (V,) bool: in training the heads may be asked to recall at this token
    encode: callable             # str -> [token]
    decode: callable             # [token] -> str

    def text(self, rng, n):
        """n consecutive tokens from anywhere, not all of them white space, (n,)."""
        while True:
            start = rng.integers(len(self.tokens) - n + 1)
            if n == 0 or not self.blank[self.tokens[start:start + n]].all():
                return self.tokens[start:start + n]

    def pick(self, rng, count):
        """`count` different words of this part, as tokens."""
        return rng.choice(self.words, count, replace=False).tolist()

    def answers(self, rng, count):
        """`count` different words for answers, as tokens."""
        return rng.choice(self.values, count, replace=False).tolist()


def make_parts(texts, encoding, longest, learned_from=None):
    """{part: Part} from split(texts). learned_from: the texts that a GPT was trained on, where these are others: the words are
    dealt by those, so that its answers are words that it has learned to answer with.

    Words are the tokens that read " word", without the 64 most frequent, dealt to the parts, and some to all as answers. The keys
    to train on are all other tokens but numbers and white space: a GPT that sees few different keys learns those, and not how to look
    one up. Raises ValueError when a part is too short for prompts of `longest` tokens, or when there are too few words.
    """
    stream_of = lambda part: np.array([token for row in encoding.encode_ordinary_batch([text + "\n" for text in part])
                                       for token in row], dtype=np.int32)
    streams = {name: stream_of(part) for name, part in texts.items()}
    for name, stream in streams.items():
        if len(stream) < 2 * longest:
            raise ValueError(f"the corpus is too short: its part to {name} has {len(stream)} tokens, and prompts of "
                             f"{longest} tokens need {2 * longest}; give more text, or shorter prompts")
    learned = streams["train"] if learned_from is None else stream_of(learned_from)
    frequency, met = np.bincount(learned, minlength=encoding.n_vocab), set(np.concatenate([learned, *streams.values()]).tolist())
    spelled = [encoding.decode_single_token_bytes(t) if t in met else b"" for t in range(encoding.n_vocab)]
    words = [t for t in np.argsort(-frequency, kind="stable") if frequency[t] and re.fullmatch(rb" [A-Za-z]{3,}", spelled[t])]
    words = np.random.default_rng(0).permutation(words[64:2064])           # shuffled, then dealt to the parts
    words = np.split(words, (np.cumsum(list(WORDS.values())) * len(words)).astype(int))
    if min(map(len, words)) < 16:
        raise ValueError(f"only {sum(map(len, words))} tokens of the vocabulary, beyond the 64 most frequent, are words of the "
                         "letters a to z; use a larger --vocab_size, or text with more such words")
    words, dealt = dict(zip(WORDS, words)), set(np.concatenate(words[:len(WORDS)]))
    words["train"] = np.array([t for t in np.flatnonzero(frequency) if t not in dealt and spelled[t].strip(b" \n0123456789")])
    ends_line = np.array([b.endswith(b"\n") for b in spelled])
    blank = np.array([not b.strip() for b in spelled])
    looks_back = np.array([not re.search(rb"[A-Za-z]{3}", b) for b in spelled])
    return {name: Part(stream, words[name], words["values"], ends_line, blank, looks_back, encoding.encode_ordinary,
                       encoding.decode) for name, stream in streams.items()}


# --- 4. Tasks. Each is f(part, rng, n, room) -> context of n tokens, [(question, answer), ...] whose tokens fit in `room` ---

def weave(part, rng, lines, n):
    """Put `lines` (token lists), in their order, at random line ends of real text; n tokens in all."""
    text = part.text(rng, n - sum(map(len, lines)))
    ends = np.flatnonzero(part.ends_line[text]) + 1
    cuts = np.sort(rng.integers(len(text) + 1, size=len(lines)))
    if len(ends):                                                          # move each back to where a line ends
        cuts = np.concatenate([[0], ends])[np.searchsorted(ends, cuts, side="right")]
    pieces = np.split(text, cuts)
    return np.concatenate([pieces[0]] + [x for line, piece in zip(lines, pieces[1:]) for x in (line, piece)])


def facts(n, size, most=8):
    """How many facts of `size` tokens go into a context of n tokens: `most`, or as many as fill seven eighths of it. All
    tasks have their `most` from 192 tokens on. Short contexts, of early training, are nearly nothing but facts: a GPT that
    always sees them in much text comes to need the text, and is lost when a manager takes it away."""
    return max(1, min(most, n * 7 // (8 * size)))


def lm(part, rng, n, room):
    """Real text, read on: StreamingLLM's test. The score is 1 / perplexity.
    Context: `...for key in sorted(self.keys()):` question: `\\n` answer: the `room` - 1 tokens that really follow."""
    text = part.text(rng, n + room)
    return text[:n], [(text[n:n + 1], text[n + 1:])]


def needle(part, rng, n, room):
    """One sentence in real text: RULER's niah_single.
    Context: `... The name of header is optional. ...` question: `The name of header is` answer: ` optional`."""
    [key], [value] = part.pick(rng, 1), part.answers(rng, 1)
    ask = part.encode("The name of") + [key] + part.encode(" is")
    return weave(part, rng, [ask + [value] + part.encode(".\n")], n), [(part.encode("\n") + ask, [value])]


def multikey(part, rng, n, room):
    """Eight notes scattered in real text, any of which may be asked for: RULER's niah_multikey.
    Context: `... note header optional ... note linear kinds ...` question: `note linear` answer: ` kinds`."""
    note, end = part.encode("note"), part.encode("\n")
    total = facts(n, len(note) + 3)
    pairs = list(zip(part.pick(rng, total), part.answers(rng, total)))
    context = weave(part, rng, [note + [key, value] + end for key, value in pairs], n)
    return context, [(end + note + [key], [value]) for key, value in rng.permutation(pairs)]


def kv(part, rng, n, room):
    """A dictionary of sixteen pairs in one place: InfiniteBench's kv_retrieval.
    Context: `... { header: optional, linear: kinds, ...}` question: `, linear:` answer: ` kinds`."""
    colon, comma = part.encode(":"), part.encode(",")
    total = facts(n, len(colon) + len(comma) + 4, 16)
    pairs = list(zip(part.pick(rng, total), part.answers(rng, total)))
    line = sum(([key] + colon + [value] + comma for key, value in pairs), part.encode("{"))
    context = weave(part, rng, [line + part.encode("}\n")], n)
    return context, [(comma + [key] + colon, [value]) for key, value in rng.permutation(pairs)]


def passage(part, rng, n, room):
    """Named passages of real text and the last words of one: which is it? LongBench's passage_retrieval.
    Context: `...is run in a loop[ header] ...` question: `is run in a loop[` answer: ` header`."""
    opening, closing = part.encode("["), part.encode("]")
    marks = len(opening) + len(closing) + 1                                # and the name
    total = facts(n, marks + 9)
    names = part.answers(rng, total)
    text = part.text(rng, n - marks * total)
    plain = np.flatnonzero(~part.blank[text]) + 1                          # a passage ends in a word or a mark
    ends = (np.arange(total) + rng.uniform(0.3, 0.9, total)) * len(text) / total
    ends = plain[np.searchsorted(plain, ends.astype(int)).clip(max=len(plain) - 1)]
    pieces = np.split(text, ends)
    context = [x for piece, name in zip(pieces, names) for x in (piece, opening, [name], closing)] + [pieces[-1]]
    quotes = [np.concatenate([part.encode("\n"), piece[-6:], opening]) for piece in pieces]
    return np.concatenate(context), [(quotes[i], [names[i]]) for i in rng.permutation(total)]


def count(part, rng, n, room):
    """Votes scattered in real text, one word with most of them: RULER's common words.
    Context: `... one vote header ... one vote optional ... one vote header ...` question: `most vote` answer: ` header`."""
    vote, end = part.encode("one vote"), part.encode("\n")
    line = len(vote) + 2
    winner, *others = part.answers(rng, 1 + facts(n - line, 2 * line, 4))
    cast = rng.permutation([winner] * (len(others) + 1) + others)
    return weave(part, rng, [vote + [word] + end for word in cast], n), [(part.encode("\nmost vote"), [winner])]


def trace(part, rng, n, room):
    """Variables set to words, then others set to those variables; the value of one of each two, one hop away or two: RULER's
    variable tracking. Context: `... let header = optional ... let linear = header ...` question: `value linear =` answer:
    ` optional`. To ask for both would give the second answer away: the first would stand in the prompt."""
    let, equals, end = part.encode("let"), part.encode(" ="), part.encode("\n")
    total = facts(n, 2 * (len(let) + len(equals) + 3), 4)
    words, values = part.pick(rng, 2 * total), part.answers(rng, total)
    first, second = words[:total], words[total:]
    lines = [let + [a] + equals + [b] + end for a, b in list(zip(first, values)) + list(zip(second, first))]
    asks = [(part.encode("\nvalue") + [rng.choice([first[i], second[i]])] + equals, [values[i]]) for i in rng.permutation(total)]
    return weave(part, rng, lines, n), asks


def copy(part, rng, n, room):
    """Marked lines of real text, one to be repeated: RULER's and NIAH's control.
    Context: `... line header> in order to ...` question: `line header>` answer: ` in order to`."""
    line, mark, end = part.encode("line"), part.encode(">"), part.encode("\n")
    asks = [line + [key] + mark for key in part.pick(rng, facts(n, len(line) + len(mark) + 6, 4))]
    values = [[token for token in part.text(rng, 64) if not part.blank[token]][:3] for _ in asks]
    context = weave(part, rng, [ask + value + end for ask, value in zip(asks, values)], n)
    return context, [(end + asks[i], values[i]) for i in rng.permutation(len(asks))]


def quote(part, rng, n, room):
    """Six tokens from anywhere in the text, and the two after them. Not in TASKS: nothing tells in advance what to keep.
    Context: `...for key in sorted(self.keys()):` question: `\\nfor key in sorted(self` answer: `.keys`."""
    text, end = part.text(rng, n), part.encode("\n")
    return text, [(np.concatenate([end, text[at:at + 6]]), text[at + 6:at + 8]) for at in rng.integers(n - 8, size=4)]


TASKS = {task.__name__: task for task in (lm, needle, multikey, kv, passage, count, trace, copy)}


# --- 5. Prompts as tensors -------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """N prompts of one length."""
    tokens: torch.Tensor         # (N, L) context, questions and answers, line ends after the last
    answer: torch.Tensor         # (N, L) 0 outside answers, 1 in the first answer, 2 in the second, ...
    context: int                 # the first `context` tokens are read and compressed before any question is known
    tasks: list                  # the task of each prompt

    def each(self, f):
        """f applied to tokens and to answer, (N, L) each: other rows, another device. `tasks` stays."""
        return replace(self, tokens=f(self.tokens), answer=f(self.answer))


def room(length):
    """Tokens kept for the questions in a prompt of `length`: half, at most 64."""
    return min(64, length // 2)


def batch(part, tasks, rng, length):
    """One prompt for each of `tasks`, a name in TASKS or a function like them, as a Batch. Questions are asked one after
    the other while they fit. Raises ValueError for a task whose first does not."""
    n, pad = length - room(length), part.encode("\n")[0]
    tokens, answer = (np.full((len(tasks), length), fill, dtype=np.int64) for fill in (pad, 0))
    for i, task in enumerate(tasks):
        make = TASKS.get(task, task)
        tokens[i, :n], questions = make(part, rng, n, room(length))
        end = n
        for which, (question, reply) in enumerate(questions, 1):
            start, end = end, end + len(question) + len(reply)
            if end > length:
                break
            tokens[i, start:end] = np.concatenate([question, reply])
            answer[i, end - len(reply):end] = which
        if not answer[i].any():
            raise ValueError(f"task {make.__name__}: its first question and answer do not fit in {room(length)} tokens")
    return Batch(torch.from_numpy(tokens), torch.from_numpy(answer), n, list(tasks))


def depth(batch):
    """Where in the context the needle of each prompt is, in fifths, (N,), 0 to 4."""
    found = []
    for tokens, answer in zip(batch.tokens, batch.answer):
        at = int(answer.nonzero()[0])
        same = (tokens[:batch.context - 2] == tokens[at - 2]) & (tokens[2:batch.context] == tokens[at])
        found.append(int(same.nonzero()[-1]) * 5 // batch.context)
    return torch.tensor(found)


def told(tokens, answer, n):
    """Where a context of n tokens says what will be asked for: the places of each answer's tokens, wherever they follow the
    same token as in the question. tokens, answer (L,) of one prompt -> (places,), ascending."""
    found = []
    for which in range(1, answer.max() + 1):
        at = np.flatnonzero(answer == which)
        asked = tokens[at[0] - 1:at[-1] + 1]                               # the question's last token and the answer
        starts = np.flatnonzero(np.logical_and.reduce([tokens[i:n - len(asked) + 1 + i] == x for i, x in enumerate(asked)]))
        found.append((starts[:, None] + np.arange(1, len(asked))).ravel())
    return np.unique(np.concatenate(found))


def training_batch(part, rng, rows, length, recall):
    """`rows` prompts of random tasks, and words to recall, (N, L-1): at a share `recall` of the places in a context where no word
    of three letters or more stands, any word that was read before and will be asked for; -1 elsewhere. A tiny GPT's attention does
    not return to what was said unless told to, and attention that nobody pays shows no manager what to keep."""
    prompts = batch(part, rng.choice(list(TASKS), rows), rng, length)
    tokens, answer, words = prompts.tokens.numpy(), prompts.answer.numpy(), np.full((rows, length - 1), -1)
    for i, task in enumerate(prompts.tasks):
        if task == "lm":
            continue
        said = told(tokens[i], answer[i], prompts.context)
        places = np.flatnonzero((rng.random(prompts.context) < recall) & part.looks_back[tokens[i, :prompts.context]])
        before = np.searchsorted(said, places)                             # how many such words were read by then
        places, before = places[before > 0], before[before > 0]
        words[i, places] = tokens[i, said[(rng.random(len(places)) * before).astype(int)]]
    return prompts, torch.from_numpy(words)
