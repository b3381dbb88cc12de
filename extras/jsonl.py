"""Lines of LongBench and InfiniteBench as prompts, and the benchmarks' own scores of greedy text.

  1. metrics        a model's text and a true answer -> a score from 0 to 1
  2. read, score    the lines of a file, checked; what a text is worth for one of them
  3. prompts        tokens: a context that is read and compressed, then a question, then an answer
  4. write, report  greedy text, and every method's score on the same prompts

Sources: github.com/THUDM/LongBench at 2e00731 (LongBench/config, pred.py, eval.py, metrics.py) and
github.com/OpenBMB/InfiniteBench at 88b3daa (src/prompt.py: the templates of yarn_mistral;
eval_utils.py, compute_scores.py). jsonl_templates.json holds their templates word by word, slips
included; InfiniteBench's {question} is {input} there. Letters: L tokens, n of them the context.
"""

import itertools
import json
import pathlib
import re
import statistics
import string
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import Batch
from model import generate, kept

TEMPLATES = json.loads(pathlib.Path(__file__).with_name("jsonl_templates.json").read_text("utf-8"))


# --- 1. Metrics. Each is f(text, answer, classes) -> score from 0 to 1 ----------------------------

def words(text):
    """The words that F1 counts: lower case, without ASCII marks, then without a, an, the."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(text, answer, classes):
    """F1 of words. Quirks: an answer of articles or marks only scores 0, even for the same text;
    "well-known" is the one word wellknown; words that follow the answer cost precision."""
    said, true = words(text), words(answer)
    return 2 * (said & true).total() / max(1, said.total() + true.total())


def numbers(text, answer, classes):
    """Share of the numbers in the text that are the answer's. Quirks: "Page 3" counts as paragraph
    3; "3.0" is two numbers, 3 and 0; "03" is not 3."""
    said, [true] = re.findall(r"\d+", text), re.findall(r"\d+", answer)
    return said.count(true) / max(1, len(said))


def classification(text, answer, classes):
    """1 / the number of classes whose name is in the text, if the answer is one of them. A class
    whose name is part of the answer's does not count. Quirk: the published loop removes such a
    class from the list it walks along, and so passes over the next one, which then counts."""
    named, i = [name for name in classes if name in text], 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            del named[i]                                       # the next one is now at i
        i += 1
    return 1 / len(named) if answer in named else 0.0


def first_number(text, answer, classes):
    """1 if the first run of digits is the answer. Quirk: "1. It is 71432" scores 0."""
    return float(re.findall("[0-9]+", text)[:1] == [answer])


def key_value(text, answer, classes):
    """1 if the answer is among the words, once ten marks are spaces. Quirks: a semicolon or bracket
    is no such mark and spoils its word; a text that names every value scores 1. The published code
    gives 0 to all where the label is a list, as in the published file; here its element counts."""
    return float(answer in re.sub(r"""[\n:"'.,?!{}]""", " ", text).split())


def choice(text, answer, classes):
    """1 if the text chooses the answer: a letter, or an option in words. Quirks: a text that begins
    with A, B, C or D chooses that ("Because" is B); the character after a cue is not looked at
    ("answer is:C" scores 0); after a cue words have lost their marks, so an option with marks never
    counts there; without a cue the first word that is A, B, C, D, AB, BC, ... decides."""
    text = text.strip()
    if text and text[0] in "ABCD":
        return float(text[0] == answer)
    if text == answer:
        return 1.0
    text = re.sub(r"""[\n"'.,?!{} ]+""", " ", text)
    for cue in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = text.partition(cue)
        if found:
            return float(rest[1:].startswith(answer))
    letters = [word for word in text.split() if word in "ABCD"]            # any piece of "ABCD"
    return float(letters[:1] == [answer])


# {dataset: (tokens that a model may write, metric)}
DATASETS = {"narrativeqa": (128, f1), "qasper": (128, f1), "multifieldqa_en": (64, f1),
            "hotpotqa": (32, f1), "2wikimqa": (32, f1), "musique": (32, f1), "triviaqa": (32, f1),
            "trec": (64, classification), "lsht": (64, classification),
            "passage_count": (32, numbers), "passage_retrieval_en": (32, numbers),
            "passage_retrieval_zh": (32, numbers), "passkey": (6, first_number),
            "number_string": (12, first_number), "kv_retrieval": (50, key_value),
            "longbook_qa_eng": (40, f1), "longbook_choice_eng": (40, choice)}
OTHER = (32, f1)                                               # with a template of one's own
REFUSED = {"ROUGE": "gov_report qmsum multi_news samsum longbook_sum_eng",
           "fuzz": "lcc repobench-p", "jieba": "multifieldqa_zh",
           "ROUGE and jieba": "dureader vcsum",
           "a rule of its own": "longbook_qa_chn longdialogue_qa_eng math_find math_calc code_run "
                                "code_debug"}
FIRST_LINE = ("trec", "triviaqa", "lsht")


# --- 2. The lines of a file -----------------------------------------------------------------------

@dataclass
class Line:
    """One prompt as text."""
    dataset: str
    context: str                 # the prompt up to the end of the context
    question: str                # the prompt after it
    answers: list                # [str], all true; likelihood is measured on the first
    classes: list                # [str] of a classification, else None
    where: str = ""              # file:number, for messages


def read(path, template=None):
    """The lines of a file, [Line], of LongBench (with `answers`; the dataset is a field) or of
    InfiniteBench (with `answer`; the dataset is the file's name).

    template: a prompt with {context} and, after it, {input}, in place of the published one. Other
    datasets need it, and are scored by F1. Raises ValueError, with file and number, for a line that
    is damaged, has no answer or no context, or is of a dataset whose metric is not here."""
    path, lines = pathlib.Path(path), []
    if template:
        before, _, after = template.partition("{context}")
        if not after.replace("{input}", "") or "{input}" in before or "{context}" in after:
            raise ValueError("--template: write {context} once, and after it {input} and text, "
                             "such as Answer: (the context is read before the question is known)")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:                              # as bytes, where only \n ends a line
        for number, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    lines.append(parse(raw, path.stem, template))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                lines[-1].where = f"{path}:{number}"
    if not lines:
        raise ValueError(f"{path}: empty; give a file with a prompt in each line")
    return lines


def parse(raw, stem, template):
    """One line (bytes) of the file called `stem`, as a Line; see `read`."""
    try:
        fields = json.loads(raw)
    except ValueError:
        raise ValueError("damaged, not JSON") from None
    if not isinstance(fields, dict) or not {"answers", "answer"} & set(fields):
        raise ValueError("neither `answers` (LongBench) nor `answer` (InfiniteBench)")
    dataset = stem if "answer" in fields else str(fields.get("dataset"))
    dataset = dataset.removesuffix("_e")                       # LongBench-E
    for metric, names in REFUSED.items():
        if dataset in names.split():
            raise ValueError(f"{dataset} is scored by {metric}, which is not here; leave it out")
    if not template and dataset not in TEMPLATES:
        raise ValueError(f"no template for {dataset}; give --template, or a dataset of these: "
                         + ", ".join(TEMPLATES))
    context, question = fields.get("context"), fields.get("input")
    if not isinstance(context, str) or not isinstance(question, str) or not context.strip():
        raise ValueError("`context` or `input` is no text, or the context is empty")
    answers = fields["answer"] if "answer" in fields else fields["answers"]
    answers = answers if isinstance(answers, list) else [answers]
    text = all(isinstance(x, (str, int)) for x in answers)
    if not answers or not text or not str(answers[0]).strip():
        raise ValueError("no answer, or one that is no text")
    answers, classes = [str(x) for x in answers], fields.get("all_classes")
    values, metric = {"input": question}, DATASETS.get(dataset, OTHER)[1]
    before, _, after = (template or TEMPLATES[dataset]).partition("{context}")
    if metric is numbers and not all(len(re.findall(r"\d+", x)) == 1 for x in answers):
        raise ValueError(f"an answer to {dataset} holds one number")
    if metric is classification and not (classes and all(isinstance(x, str) for x in classes)):
        raise ValueError(f"{dataset} needs `all_classes`, a list of names")
    if metric is choice:
        options = fields.get("options")
        if not isinstance(options, list) or len(options) != 4 or answers[0] not in options:
            raise ValueError(f"{dataset} needs four `options`, one of them the answer")
        answers = ["ABCD"[options.index(answers[0])], answers[0]]
        for letter, option in zip("ABCD", options):
            values["OPTION_" + letter] = str(option)
    question = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), after)
    return Line(dataset, before + context, question, answers, classes)


def new_tokens(line):
    """How many tokens a model may write for this line."""
    return DATASETS.get(line.dataset, OTHER)[0]


def score(line, text):
    """The benchmark's own score of a model's text for this line, 0 to 1: the best over the answers.
    Of trec, triviaqa and lsht the first line counts. Quirk: the line ends before it are dropped,
    spaces are not, so the first line of " \\nyes" is blank."""
    if line.dataset in FIRST_LINE:
        text = text.lstrip("\n").split("\n")[0]
    metric = DATASETS.get(line.dataset, OTHER)[1]
    return max(metric(text, answer, line.classes) for answer in line.answers)


# --- 3. Lines as tokens ---------------------------------------------------------------------------

def prompts(lines, encoding, length, delay):
    """Each line as a data.Batch of one row: tokens (1,L) of context, question and first answer.

    Of more than `length` tokens before the answer, the first and the last half stay: LongBench's
    cut. Context and question are encoded apart, because the context is read alone. The answer comes
    after a space, unless white space or a character beyond ASCII is before it. Raises ValueError
    for a line whose context has fewer than `delay` tokens."""
    rows = []
    for line in lines:
        context, question = map(encoding.encode_ordinary, (line.context, line.question))
        tokens, n, half = context + question, len(context), length // 2
        if len(tokens) > length:
            tokens = tokens[:half] + tokens[-half:]
            n = min(n, half) + max(0, half - len(question))
        if n < delay:
            raise ValueError(f"{line.where}: the context has {n} tokens, a block {delay}: nothing "
                             "would be evicted; leave the line out, or lower --delay")
        last = line.question[-1]
        space = "" if last.isspace() or not last.isascii() else " "
        answer = encoding.encode_ordinary(space + line.answers[0])
        marks = torch.tensor([[0] * len(tokens) + [1] * len(answer)])
        rows.append(Batch(torch.tensor([tokens + answer]), marks, n, [line.dataset]))
    return rows


# --- 4. Greedy text and its score -----------------------------------------------------------------

def write(gpt, encoding, prompt, count, delay, manage=None, renumber=False):
    """What the GPT writes after a prompt's context and question: greedily, `count` tokens or up to
    a special token. The cache is managed while the context is read and only grows from there, as
    when likelihood is measured. Returns the text, and the share of the context that the question
    met in the cache."""
    n, share = prompt.context, 1.0

    def manage_context(cache, received):
        nonlocal share
        seen = cache[0].seen
        if seen <= n:                                          # the block holds no question
            manage(cache, received)
            share = (kept(cache).item() * seen + n - seen) / n

    tokens = prompt.tokens[prompt.answer == 0][None].to(gpt.tok_embeddings.weight.device)
    block = delay if manage else tokens.shape[1]               # without a manager, in one go
    written = generate(gpt, tokens, count, block, manage and manage_context, bool(manage), renumber)
    ends = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    text = itertools.takewhile(lambda token: token not in ends, written[0].tolist())
    return encoding.decode(list(text)), share


def report(gpt, encoding, methods, lines, length, delay, renumber=False):
    """Every method on the same prompts: [{dataset, method, score, relative, cache, n}].

    methods {name: manager, or None for the full cache}, one of them called "full". score: mean over
    the n lines; relative: that over the one of "full", None where it is 0; cache: mean share of the
    context that the question met. Nothing is averaged over datasets: in a mean of ratios the one
    with the least score would decide. Raises ValueError as `prompts` does."""
    found = {}
    batches = prompts(lines, encoding, length, delay)
    bar = tqdm(lines, desc="benchmark", mininterval=1, dynamic_ncols=True, disable=None)
    for line, prompt in zip(bar, batches):
        for method, manage in methods.items():
            text, share = write(gpt, encoding, prompt, new_tokens(line), delay, manage, renumber)
            found.setdefault((line.dataset, method), []).append((score(line, text), share))
    rows = []
    for (dataset, method), pairs in found.items():
        value, cache = map(statistics.fmean, zip(*pairs))
        full = statistics.fmean(one for one, _ in found[dataset, "full"])
        rows.append({"dataset": dataset, "method": method, "score": value,
                     "relative": value / full if full else None, "cache": cache, "n": len(pairs)})
    return rows
