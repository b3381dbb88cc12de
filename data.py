"""Real text, a tokeniser learned from it, and twelve long-context tasks over it.

  1. documents, deal      text that every Python carries, cut and dealt to four disjoint parts
  2. learn_bpe, tokenizer byte-pair ranks from the training part, served by tiktoken
  3. Part, make_parts     what one part owns: its tokens and its words
  4. TASKS                a context to read, questions to answer afterwards, a short function each
  5. prompts, lesson      prompts as tensors, and what the GPT is trained on

A prompt of length L is a context of L - question_tokens(L) tokens, then the questions. The cache is
managed while the context is read, before any question is known. Letters: N prompts, V vocabulary.
"""

import base64
import collections
import hashlib
import heapq
import pathlib
import pydoc_data.topics
import re
import sysconfig
from dataclasses import dataclass, replace

import numpy as np
import tiktoken
import torch

# How text is cut before byte pairs are merged: words, digits, runs of marks, line ends, blanks. At
# most 16 characters: in scripts without spaces a word is as long as a sentence.
PATTERN = r" ?[^\W\d_]{1,16}| ?\d| ?[^\s\w]{1,16}|_{1,16}|\s{0,15}\n|\s{1,16}"
SUFFIXES = (".txt", ".md", ".rst", ".py")
SHARES = {"train": 0.64, "evolve": 0.14, "choose": 0.08, "report": 0.14}  # of the text
WORDS = {"values": 0.25, "evolve": 0.25, "choose": 0.10, "report": 0.25}  # to train: all others


# --- 1. Documents --------------------------------------------------------------------------------

def documents(corpus=None):
    """The texts to learn from, [str]: a file, or the SUFFIXES files of a folder and the folders in
    it (not of linked ones). None: Python's language reference and standard library. Raises
    ValueError, with a line for the user, when there is no text to read."""
    if corpus is None:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "pydoc_data"}  # the reference once, not twice
        files = [f for f in root.rglob("*.py") if skip.isdisjoint(f.relative_to(root).parts)]
        texts = [f.read_text("utf-8", "replace") for f in files]
        return texts + list(pydoc_data.topics.topics.values())
    texts, files = [], [pathlib.Path(corpus)]
    if files[0].is_dir():
        found = files[0].rglob("*")
        files = [f for f in found if f.suffix.lower() in SUFFIXES and f.is_file()]
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            why = getattr(error, "strerror", "not UTF-8 text")
            raise ValueError(f"--corpus {file}: {why}") from None
        if "\0" in texts[-1]:
            raise ValueError(f"--corpus {file}: binary, not text")
    if not any(text.strip() for text in texts):
        raise ValueError(f"--corpus {corpus}: empty, or no {', '.join(SUFFIXES)} file in it")
    return texts


def cut(text, most):
    """A text in pieces of at most `most` characters, cut at a blank line, else at a line end, else
    anywhere."""
    pieces, start = [], 0
    while len(text) - start > most:
        middle, end = start + most // 2, start + most
        blank, line = text.rfind("\n\n", middle, end), text.rfind("\n", middle, end)
        stop = blank + 2 if blank >= 0 else line + 1 if line >= 0 else end
        pieces.append(text[start:stop])
        start = stop
    return pieces + [text[start:]]


def deal(texts, saved=None):
    """Cut documents into pieces and deal these to the parts of SHARES, of equal pieces one. Returns
    {part: [piece]}, and a record: "piece", the most characters of a piece (a text makes about 500);
    "split", {digest of a piece: its part}; "fingerprint" of the whole text. saved: the record of a
    run; its pieces go to the same parts again, and only new ones are dealt."""
    size = sum(map(len, texts))
    most = saved["piece"] if saved else 2 ** min(16, max(10, round(np.log2(size / 512))))
    known = saved["split"] if saved else {}
    pieces = {}
    for text in texts:
        for piece in cut(text, most):
            pieces[hashlib.sha256(piece.encode("utf-8", "replace")).hexdigest()[:16]] = piece
    parts, filled, split = {name: [] for name in SHARES}, dict.fromkeys(SHARES, 0), {}
    for digest in sorted(pieces, key=lambda digest: (digest not in known, digest)):
        emptiest = min(SHARES, key=lambda name: filled[name] / SHARES[name])
        split[digest] = known.get(digest, emptiest)
        parts[split[digest]].append(pieces[digest])
        filled[split[digest]] += len(pieces[digest])
    fingerprint = hashlib.sha256(" ".join(sorted(pieces)).encode()).hexdigest()[:16]
    return parts, {"fingerprint": fingerprint, "piece": most, "split": split}


# --- 2. Tokeniser --------------------------------------------------------------------------------

def sample(texts, most=2_000_000, window=2000):
    """About `most` characters from all over the texts, in windows; if there are fewer, all."""
    whole = "\n".join(texts)
    if len(whole) <= most:
        return whole
    starts = np.random.default_rng(0).integers(len(whole) - window, size=most // window)
    return "\n".join(whole[start:start + window] for start in np.sort(starts))


def learn_bpe(text, vocab_size):
    """Byte-pair ranks, {bytes: rank}: the 256 bytes, the ten " digit" pairs (a number is one token
    a digit), then again and again the most frequent pair of neighbours. Counts are kept up to date,
    and a heap gives the largest: a merge costs what it changes."""
    words = collections.Counter(re.findall(PATTERN, text))
    pieces = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in words]
    counts, heap, changed = list(words.values()), [], set()
    pairs, where = collections.Counter(), collections.defaultdict(set)  # of a pair: count, words

    def add(i, times):
        """Count the pairs of word i, `times` each."""
        for pair in zip(pieces[i], pieces[i][1:]):
            pairs[pair] += times
            where[pair].add(i)
            changed.add(pair)

    for i, count in enumerate(counts):
        add(i, count)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" %d" % i: 256 + i for i in range(10)}
    while len(ranks) < vocab_size and (changed or heap):
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        count, best = heapq.heappop(heap)
        if count == 0 or pairs[best] != -count:  # an old count
            continue
        merged = best[0] + best[1]
        ranks.setdefault(merged, len(ranks))
        for i in where.pop(best):
            add(i, -counts[i])
            new = []
            for token in pieces[i]:  # greedy, left to right
                if new and (new[-1], token) == best:
                    new[-1] = merged
                else:
                    new.append(token)
            pieces[i] = new
            add(i, counts[i])
    return ranks


def tokenizer(vocab_size, path, texts):
    """A tiktoken.Encoding of the ranks in the file `path` (see ranks_file); if there is none, of
    `vocab_size` tokens learned from `texts`. Raises ValueError for another kind of file."""
    path = pathlib.Path(path)
    if path.exists():
        try:
            lines = [line.split() for line in path.read_text("utf-8").splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            if not ranks or sorted(ranks.values()) != list(range(len(lines))):
                raise ValueError
        except ValueError:
            raise ValueError(f"{path}: damaged, or not a file of this program; take that of the "
                             "run it belongs to") from None
    else:
        ranks = learn_bpe(sample(texts), vocab_size)
    return tiktoken.Encoding("learned", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def ranks_file(encoding):
    """The ranks in tiktoken's format: on each line a token in base64, and its rank."""
    rank, tokens = encoding.encode_single_token, encoding.token_byte_values()
    return "".join(f"{base64.b64encode(token).decode()} {rank(token)}\n" for token in tokens)


# --- 3. Parts ------------------------------------------------------------------------------------

@dataclass
class Part:
    """What one part owns; no piece of its text and none of its keys is in another part."""
    tokens: np.ndarray  # (many,) its text, one piece after the other
    words: np.ndarray  # (some,) tokens that are its keys
    values: np.ndarray  # (some,) tokens that are answers, the same in all parts
    ends_line: np.ndarray  # (V,) bool: the token ends a line
    blank: np.ndarray  # (V,) bool: it is white space
    looks_back: np.ndarray  # (V,) bool: it holds no word; here a head may be asked to recall one
    encode: callable  # str -> [token]
    decode: callable  # [token] -> str
    functions: list  # [[token]]: names of functions in its text, of at most four tokens
    most_asked: int = 64  # tokens for the questions of a prompt, at most

    def text(self, rng, n):
        """n consecutive tokens from anywhere, not all of them white space, (n,). Always takes one
        random number: so a prompt's words do not depend on the text around them."""
        if n < 0:
            raise ValueError("a task's lines are longer than its context; see `facts`")
        last = len(self.tokens) - n + 1
        start = int(rng.random() * last)
        while n and self.blank[self.tokens[start:start + n]].all():
            start = (start + n) % last
        return self.tokens[start:start + n]

    def fill(self, text, *gaps):
        """`text` as tokens, each {} in it filled with a token or a list of tokens:
        fill("note{}{}\\n", key, value)."""
        first, *others = [self.encode(piece) for piece in text.split("{}")]
        tokens = list(first)
        for gap, piece in zip(gaps, others):
            tokens += (gap if isinstance(gap, list) else [gap]) + piece
        return tokens

    def pick(self, rng, count):
        """`count` different keys of this part, [token]."""
        return rng.choice(self.words, count, replace=False).tolist()

    def answers(self, rng, count):
        """`count` different answers, [token]."""
        return rng.choice(self.values, count, replace=False).tolist()


def deal_words(frequency, spelled):
    """{name: [token]}: the keys of each part, and the answers of all ("values").

    frequency (V,): how often a token is in the training part; spelled [V]: its bytes. Words are
    tokens that read " word", of three letters or more; where they are few, as in scripts without
    spaces, other tokens of letters too. The 64 most frequent are left out, the next 2,000 dealt.
    All other tokens but numbers and white space are keys to train on: a GPT that sees few keys
    learns those, and not how to look one up. Raises ValueError when there are too few words."""
    words, letters = [], []
    for token in np.argsort(-frequency, kind="stable"):
        text = spelled[token].decode("utf-8", "replace")
        if frequency[token] and text.strip(" ").isalpha():
            if text[0] == " " and len(text) > 3:
                words.append(token)
            if len(text) > 2 or not text.isascii():
                letters.append(token)
    needed = 64 + int(16 / min(WORDS.values()))  # 16 for the smallest share
    words = words if len(words) >= needed else letters
    if len(words) < needed:
        raise ValueError(f"only {len(words)} tokens of the vocabulary are words, and {needed} are "
                         "needed; use a larger --vocab_size, or more text")
    words = np.random.default_rng(0).permutation(words[64:2064])
    ends = (np.cumsum(list(WORDS.values())) * len(words)).astype(int)
    dealt = {name: own.tolist() for name, own in zip(WORDS, np.split(words, ends))}
    taken = set(sum(dealt.values(), []))
    dealt["train"] = [token for token in np.flatnonzero(frequency).tolist()
                      if token not in taken and spelled[token].strip(b" \n0123456789")]
    return dealt


def make_parts(texts, encoding, longest, words=None, used=tuple(SHARES)):
    """({part: Part}, words) from the parts of `deal`. words: those that a GPT was trained with, so
    that it is asked for answers that it knows; if None, they are dealt now. Raises ValueError when
    one of the parts to be `used` is too short for prompts of `longest` tokens."""
    streams = {}
    for name, own in texts.items():
        rows = [encoding.encode_to_numpy(text + "\n", disallowed_special=()) for text in own]
        size = sum(map(len, rows))
        if name in used and size < 2 * longest:
            raise ValueError(f"the corpus is too short: its part to {name} has {size} tokens, and "
                             f"prompts of {longest} need {2 * longest}; give more text, or shorter "
                             "prompts (--report_at, --evolve_at)")
        streams[name] = np.concatenate(rows or [[]]).astype(np.int32)
    spelled = [b""] * encoding.n_vocab
    for token in encoding.token_byte_values():
        spelled[encoding.encode_single_token(token)] = token
    if words is None:
        words = deal_words(np.bincount(streams["train"], minlength=encoding.n_vocab), spelled)
        words["functions"] = function_names(texts, encoding)
    # other tokenisers put the next line's indentation into the token that ends a line
    ends_line = np.array([b.rstrip(b" \t").endswith(b"\n") for b in spelled])
    blank = np.array([not b.strip() for b in spelled])
    looks_back = np.array([not re.search(r"[^\W\d_]{3}", b.decode("utf-8", "ignore"))
                           for b in spelled])
    parts = {name: Part(stream, np.array(words[name]), np.array(words["values"]), ends_line, blank,
                        looks_back, encoding.encode_ordinary, encoding.decode,
                        words["functions"][name]) for name, stream in streams.items()}
    return parts, words


def function_names(texts, encoding):
    """{part: [[token]]}: names of functions in each part's text, at most 500, each of at most four
    tokens, and of one part only."""
    names, taken = {}, set()
    for part in ("report", "choose", "evolve", "train"):
        found = set(re.findall(r"\bdef (\w+)\(", "\n".join(texts[part]))) - taken
        taken |= found
        tokens = map(encoding.encode_ordinary, sorted(found))
        names[part] = [own for own in tokens if len(own) <= 4][:500]
    return names


# --- 4. Tasks: f(part, rng, n, room) -> a context of n tokens, [(question, answer), ...], of which
#        the first fits in `room` tokens -----------------------------------------------------------

def insert(text, lines, places):
    """A text (n,), with each of the lines (token lists) before the token at its place."""
    return np.insert(text, np.repeat(places, list(map(len, lines))), np.concatenate(lines))


def weave(part, rng, lines, n):
    """Lines (token lists), in their order, at random line ends of real text: n tokens in all."""
    text = part.text(rng, n - sum(map(len, lines)))
    starts = np.flatnonzero(part.ends_line[text]) + 1  # of lines
    places = np.sort(rng.integers(len(text) + 1, size=len(lines)))
    if len(starts):  # move each back to where a line starts
        places = np.append(0, starts)[np.searchsorted(starts, places, side="right")]
    return insert(text, lines, places)


def facts(n, size, most=8):
    """How many facts of `size` tokens go into a context of n: `most`, or as many as fill 7/8 of it.
    Short contexts, of early training, are nearly all facts: a GPT that has only seen facts in much
    text needs that text, and is lost when a manager evicts it."""
    return max(1, min(most, n * 7 // (8 * size)))


def key_values(part, rng, total):
    """`total` facts, [(key, value)], each a token."""
    return list(zip(part.pick(rng, total), part.answers(rng, total)))


def questions(part, rng, ask, pairs):
    """[(question, answer)] in random order. ask: the question as text, see `Part.fill`; pairs: the
    key in it and the answer, each a token or a list of tokens."""
    asks = [(part.fill(ask, key), part.fill("{}", answer)) for key, answer in pairs]
    return [asks[i] for i in rng.permutation(len(asks))]


def lm(part, rng, n, room):
    """Real text to go on with: StreamingLLM's test. The score is 1 / perplexity.
    Context: `...for key in sorted(self.keys()):` answer: the next `room` - 1 tokens."""
    text = part.text(rng, n + room)
    return text[:n], [(text[n:n + 1], text[n + 1:])]


def needle(part, rng, n, room):
    """One sentence in real text: RULER's niah_single.
    Context: `... The name of header is optional. ...` question: `The name of header is`."""
    [(key, value)] = key_values(part, rng, 1)
    line = part.fill("The name of{} is{}.\n", key, value)
    return weave(part, rng, [line], n), [(part.fill("\nThe name of{} is", key), [value])]


def multikey(part, rng, n, room):
    """Eight notes scattered in real text, any of which may be asked for: RULER's niah_multikey.
    Context: `... note header optional ... note linear kinds ...` question: `note linear`."""
    pairs = key_values(part, rng, facts(n, len(part.fill("note{}{}\n", 0, 0))))
    lines = [part.fill("note{}{}\n", key, value) for key, value in pairs]
    return weave(part, rng, lines, n), questions(part, rng, "\nnote{}", pairs)


def kv(part, rng, n, room):
    """A dictionary of sixteen pairs in one place: InfiniteBench's kv_retrieval.
    Context: `... { header: optional, linear: kinds, ...}` question: `, linear:`."""
    pairs = key_values(part, rng, facts(n, len(part.fill("{}:{},", 0, 0)) + 2, 16))
    line = part.encode("{")
    for key, value in pairs:
        line = line + part.fill("{}:{},", key, value)
    context = weave(part, rng, [line + part.encode("}\n")], n)
    return context, questions(part, rng, ",{}:", pairs)


def passage(part, rng, n, room):
    """Named passages of real text; a question is the end of one: LongBench's passage_retrieval.
    Context: `...is run in a loop[ header] ...` question: `is run in a loop[` answer: ` header`."""
    size = len(part.fill("[{}]", 0))
    total = facts(n, size + 9)
    names = part.answers(rng, total)
    text = part.text(rng, n - size * total)
    plain = np.flatnonzero(~part.blank[text]) + 1  # a passage ends in a word or a mark
    ends = (np.arange(total) + rng.uniform(0.3, 0.9, total)) * len(text) / total
    ends = plain[np.searchsorted(plain, ends.astype(int)).clip(max=len(plain) - 1)]
    context = insert(text, [part.fill("[{}]", name) for name in names], ends)
    quotes = [piece[-6:].tolist() for piece in np.split(text, ends)]
    return context, questions(part, rng, "\n{}[", zip(quotes, names))


def count(part, rng, n, room):
    """Votes scattered in real text, most of them for the word asked for: RULER's common words.
    Context: `... one vote header ... one vote optional ... one vote header`, then `most vote`."""
    size = len(part.fill("one vote{}\n", 0))
    winner, *others = part.answers(rng, 1 + facts(n - size, 2 * size, 4))
    votes = rng.permutation([winner] * (len(others) + 1) + others)
    lines = [part.fill("one vote{}\n", word) for word in votes]
    return weave(part, rng, lines, n), [(part.encode("\nmost vote"), [winner])]


def trace(part, rng, n, room):
    """Variables set to words, and others set to these variables: RULER's variable tracking. Of each
    such two one is asked for: the answer to both is the same word. Context:
    `... let header = optional ... let linear = header ...` question: `value linear =`."""
    total = facts(n, 2 * len(part.fill("let{} ={}\n", 0, 0)), 4)
    words, values = part.pick(rng, 2 * total), part.answers(rng, total)
    first, second = words[:total], words[total:]
    lines = [part.fill("let{} ={}\n", a, b) for a, b in zip(first + second, values + first)]
    asks = [(part.fill("\nvalue{} =", rng.choice([first[i], second[i]])), [values[i]])
            for i in rng.permutation(total)]
    return weave(part, rng, lines, n), asks


def copy(part, rng, n, room):
    """Marked lines of real text to be repeated: RULER's and NIAH's control.
    Context: `... line header> in order to ...` question: `line header>` answer: ` in order to`."""
    keys = part.pick(rng, facts(n, len(part.fill("line{}>", 0)) + 5, 4))
    values = [[token for token in part.text(rng, 64) if not part.blank[token]][:3] for _ in keys]
    lines = [part.fill("line{}>{}\n", key, value) for key, value in zip(keys, values)]
    return weave(part, rng, lines, n), questions(part, rng, "\nline{}>", zip(keys, values))


# Tasks in which facts come back, as in real text: what was looked up before is asked for again.

def by_zipf(rng, count, size):
    """Numbers below `count`, an array of this size, by Zipf's law: 0 often, the last rarely."""
    odds = 1 / np.arange(1, count + 1)
    return rng.choice(count, size, p=odds / odds.sum())


def coming_back(part, rng, n, keys, tell, use):
    """A context of n tokens in which facts come back; [(key, value)] of those that do, and of the
    others. keys: the first of them are taken; tell, use: lines, see `Part.fill`. In the first two
    fifths of the context facts are told, at most eight. In the rest half of them are used: each
    once, then some often, some rarely, by Zipf's law."""
    size = max(len(part.fill(line, key, 0)) for line in (tell, use) for key in keys)
    early = max(size, n * 2 // 5)
    total = facts(early, size)
    pairs = list(zip(keys, part.answers(rng, total)))
    often = (total + 1) // 2  # so many come back
    more = max(0, facts(n - early, size) - often)
    uses = [*range(often), *by_zipf(rng, often, more)]
    told = [part.fill(tell, *pairs[i]) for i in rng.permutation(total)]
    used = [part.fill(use, *pairs[i]) for i in rng.permutation(uses)]
    context = np.concatenate([weave(part, rng, told, early), weave(part, rng, used, n - early)])
    return context, pairs[:often], pairs[often:]


def dialog(part, rng, n, room, asked_before=True):
    """Facts are told, then some are asked and answered; at the end these are asked again. Context:
    `... The header is optional. ... What is the header? optional. ...` question: `What is the
    header?`"""
    context, often, never = coming_back(part, rng, n, part.pick(rng, 8), "The{} is{}.\n",
                                        "What is the{}?{}.\n")
    asked = often if asked_before else never or often
    return context, questions(part, rng, "\nWhat is the{}?", asked)


def unasked(part, rng, n, room):
    """The same context as `dialog`; at the end the facts are asked that were not asked in it."""
    return dialog(part, rng, n, room, asked_before=False)


def log(part, rng, n, room):
    """Keys are set, read, and set anew; the last value counts. Context: `... set header optional
    ... get header optional ... set header kinds ...` question: `get header` answer: ` kinds`."""
    events = facts(n, len(part.fill("set{}{}\n", 0, 0)), 16)
    keys, values = part.pick(rng, max(1, events // 4)), part.answers(rng, events)
    now, lines = {}, []
    for value in values:
        key = keys[min(int(rng.pareto(1)), len(keys) - 1)]  # half are of the first
        if key not in now or rng.random() < 0.4:
            now[key] = value
            lines.append(part.fill("set{}{}\n", key, value))
        else:
            lines.append(part.fill("get{}{}\n", key, now[key]))
    asks = questions(part, rng, "\nget{}", now.items())
    return weave(part, rng, lines, n), asks


def code(part, rng, n, room):
    """Functions, with names from the text, are defined once, with a default, and called with it.
    Context: `... def walk(header): ... walk(header) ...` question: `walk(` answer: `header`."""
    names = [part.functions[i] for i in rng.permutation(len(part.functions))[:8]]
    names = names if len(names) == 8 else part.pick(rng, 8)
    context, often, _ = coming_back(part, rng, n, names, "def {}({}):\n", "{}({})\n")
    return context, questions(part, rng, "\n{}(", often)


TASKS = {task.__name__: task for task in (lm, needle, multikey, kv, passage, count, trace, copy)}
COMING_BACK = {task.__name__: task for task in (dialog, unasked, log, code)}


# --- 5. Prompts as tensors -----------------------------------------------------------------------

@dataclass
class Batch:
    """N prompts of L tokens."""
    tokens: torch.Tensor  # (N,L) context, questions and answers, line ends after the last
    answer: torch.Tensor  # (N,L) 0 outside answers, 1 in the first answer, 2 in the second, ...
    context: int  # so many tokens are read, and evicted from, before any question is known
    tasks: list  # the task of each prompt
    vectors: torch.Tensor = None  # (N,L,n_vector): what each token carries beside its number

    def inputs(self):
        """What a GPT reads: tokens (N,L), or each with its vector behind it, (N,L,1+n_vector)."""
        if self.vectors is None:
            return self.tokens
        return torch.cat([self.tokens[..., None], self.vectors], dim=2)

    def each(self, f):
        """f applied to tokens, answer and vectors: other rows, another device. tasks stays."""
        vectors = None if self.vectors is None else f(self.vectors)
        return replace(self, tokens=f(self.tokens), answer=f(self.answer), vectors=vectors)


def question_tokens(length, most=64):
    """Tokens for the questions in a prompt of `length`: half, at most `most`."""
    return min(most, length // 2)


def prompts(part, tasks, rng, length):
    """A Batch with a prompt for each of `tasks`, a name or a function like those above. Questions
    follow one another while they fit. Raises ValueError for a task whose first does not."""
    room, pad = question_tokens(length, part.most_asked), part.encode("\n")[0]
    n = length - room
    tokens, answer = np.full((len(tasks), length), pad), np.zeros((len(tasks), length), dtype=int)
    for i, task in enumerate(tasks):
        make = (TASKS | COMING_BACK).get(task, task)
        context, asks = make(part, rng, n, room)
        if len(context) != n:
            raise ValueError(f"task {make.__name__}: a context of {len(context)} tokens, not {n}")
        tokens[i, :n] = context
        end = n
        for which, (question, reply) in enumerate(asks, 1):
            start, end = end, end + len(question) + len(reply)
            if end > length:
                break
            tokens[i, start:end] = [*question, *reply]
            answer[i, end - len(reply):end] = which
        if not answer[i].any():
            raise ValueError(f"task {make.__name__}: its first question and answer do not fit in "
                             f"{room} tokens")
    return Batch(torch.from_numpy(tokens), torch.from_numpy(answer), n, list(tasks))


def depth(batch):
    """Where in the context the needle of each prompt is, in fifths, (N,), 0 to 4."""
    tokens, n = batch.tokens, batch.context
    at = batch.answer.argmax(1, keepdim=True)  # (N,1)
    key, value = tokens.gather(1, at - 2), tokens.gather(1, at)  # between them: " is"
    same = (tokens[:, :n - 2] == key) & (tokens[:, 2:n] == value)  # (N,n-2)
    return (same * torch.arange(n - 2, device=same.device)).amax(1) * 5 // n


def fact_positions(tokens, answer, n):
    """Where a context of n tokens says what will be asked for, (places,), ascending: each answer's
    tokens, wherever they follow the last token of its question. tokens, answer (L,): one prompt."""
    found = []
    for which in range(1, answer.max() + 1):
        at = np.flatnonzero(answer == which)
        asked = tokens[at[0] - 1:at[-1] + 1]
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:n], len(asked))
        starts = np.flatnonzero((windows == asked).all(1))
        found.append((starts[:, None] + np.arange(1, len(asked))).ravel())
    return np.unique(np.concatenate(found))


def words_to_recall(batch, part, rng, share):
    """Words to recall, (N,L-1), -1 where there is none: at a `share` of a context's tokens that
    hold no word, one that was read before and will be asked for. Unless told to, a tiny GPT does
    not attend to what was said, and then attention shows no manager what to keep."""
    n, tokens = batch.context, batch.tokens.numpy()
    words = np.full((len(tokens), tokens.shape[1] - 1), -1)
    for row, own, answer, task in zip(words, tokens, batch.answer.numpy(), batch.tasks):
        if task == "lm":
            continue
        said = fact_positions(own, answer, n)
        places = np.flatnonzero((rng.random(n) < share) & part.looks_back[own[:n]])
        before = np.searchsorted(said, places)  # how many such words were read by then
        places, before = places[before > 0], before[before > 0]
        row[places] = own[said[(rng.random(len(places)) * before).astype(int)]]
    return torch.from_numpy(words)


def came_back(batch, part):
    """(N,L) bool, where a context has a word for answers again: it uses a fact that was told
    before, so a GPT that looks the fact up can predict the word."""
    again = np.zeros(batch.tokens.shape, dtype=bool)
    for row, tokens in zip(again, batch.tokens.numpy()):
        row[:batch.context] = np.isin(tokens[:batch.context], part.values)
        row[np.unique(tokens, return_index=True)[1]] = False  # the first time
    return torch.from_numpy(again)


def lesson(part, tasks, rng, done, length, tokens, recall):
    """What a training step learns from, when a share `done` of all steps is over: (Batch, words to
    recall). First the shortest prompts, then all lengths but the longest, of half the `tokens`;
    then mostly the longest. The hardest tasks come twice as often. Heads recall after a quarter of
    the steps; with `recall` 0 never: then the words are (N,0), and answers on the way are -1."""
    lengths = sorted(length >> k for k in range(length.bit_length()) if length >> k >= 64)
    shorter = len(lengths) - 1
    odds = np.array([1] * shorter + [2 * shorter or 1])  # the longest: two of three
    if done < 0.15:
        own, tokens = lengths[0], tokens // 2
    elif done < 0.35:
        own, tokens = int(rng.choice(lengths[:-1] or lengths)), tokens // 2
    else:
        own = int(rng.choice(lengths, p=odds / odds.sum()))
    twice = [task for task in ("kv", "trace") if task in tasks]
    batch = prompts(part, rng.choice([*tasks, *twice], max(1, tokens // own)), rng, own)
    if recall == 0:
        marked = batch.answer.masked_fill(came_back(batch, part), -1)
        return replace(batch, answer=marked), torch.zeros(len(marked), 0)
    return batch, words_to_recall(batch, part, rng, recall if done >= 0.25 else 0.0)
