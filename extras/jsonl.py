"""python -m extras.jsonl RUN FILE ...: a finished run on lines of LongBench and InfiniteBench.

    --template T     a prompt with {context} and {input}, for other lines (\\n in it ends a line)
    --length N       tokens before the answer; longer prompts lose their middle. If not given, as
                     many as the GPT was trained to read, or the longest of the run's own report
    --evolve FOLDER  first evolve a NAMM on prompts of N tokens from some of the lines
    and options of evolve.py, such as --capacity 40, or, to evolve, --generations 20

  1. metrics        a model's text and a true answer -> a score from 0 to 1
  2. read, score    the lines of a file, checked; what a text is worth for one of them
  3. prompts        tokens: a context that is read and compressed, then a question, then an answer
  4. write, report  greedy text, and every method's score on the same prompts
  5. evolve_on      lines as tasks to evolve on: the likelihood of the first answer counts
  6. main           the command, which prints the benchmarks' own scores, raw and relative

Sources: github.com/THUDM/LongBench at 2e00731 (LongBench/config, pred.py, eval.py, metrics.py) and
github.com/OpenBMB/InfiniteBench at 88b3daa (src/prompt.py: the templates of yarn_mistral;
eval_utils.py, compute_scores.py). jsonl_templates.json holds their templates word by word, slips
included; InfiniteBench's {question} is {input} there. Letters: L tokens, n of them the context.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import re
import statistics
import string
from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

import data
import evolve
from data import Batch
from extras import runs
from model import generate

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

def in_tokens(line, encoding):
    """[token] of a line's context, question and first answer. Context and question are encoded
    apart, because the context is read alone. The answer comes after a space, unless white space or
    a character beyond ASCII is before it."""
    last = line.question[-1]
    space = "" if last.isspace() or not last.isascii() else " "
    texts = line.context, line.question, space + line.answers[0]
    return [encoding.encode_ordinary(text) for text in texts]


def prompts(lines, encoding, length, delay):
    """Each line as a data.Batch of one row: tokens (1,L) of context, question and first answer.

    Of more than `length` tokens before the answer, the first and the last half stay: LongBench's
    cut. Raises ValueError for a line whose context has fewer than `delay` tokens."""
    rows = []
    for line in lines:
        context, question, answer = in_tokens(line, encoding)
        tokens, n, half = context + question, len(context), length // 2
        if len(tokens) > length:
            tokens = tokens[:half] + tokens[-half:]
            n = min(n, half) + max(0, half - len(question))
        if n < delay:
            raise ValueError(f"{line.where}: the context has {n} tokens, a block {delay}: nothing "
                             "would be evicted; leave the line out, or lower --delay")
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
        seen, alive = cache[0].seen, torch.cat([layer.alive for layer in cache], dim=2)
        if seen > n:                                           # the block holds a question
            return None, [layer.alive for layer in cache]
        scores, keep = manage(cache, received)
        stay = (torch.cat(list(keep), dim=2) & alive).sum() / (len(cache) * alive.shape[1])
        share = (stay.item() + n - seen) / n
        return scores, keep

    tokens = prompt.tokens[prompt.answer == 0][None].to(gpt.tok_embeddings.weight.device)
    block = delay if manage else tokens.shape[1]               # without a manager, in one go
    written = generate(gpt, tokens, count, block, manage and manage_context, renumber)
    ends = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    text = itertools.takewhile(lambda token: token not in ends, written[0].tolist())
    return encoding.decode(list(text)), share


METHODS = ("namm", "namm_uncapped", "full", "ntk", "tova+pool", "snapkv+pool",
           "recent_attention+pool")


def report(gpt, solution, encoding, lines, config, length, trained, methods=METHODS):
    """Every method on the same prompts: [{dataset, method, score, relative, cache, n}].

    score: mean over the n lines; relative: that over the one of "full", None where it is 0; cache:
    mean share of the context that the question met. A rule gets as many slots for a line as NAMM
    took for it. "ntk" is left out unless a prompt is longer than the `trained` length. Nothing is
    averaged over datasets: in a mean of ratios the one with the least score would decide. Raises
    ValueError as `prompts` does."""
    found, rows, batches = {}, [], prompts(lines, encoding, length, config.delay)
    if max(prompt.tokens.shape[1] for prompt in batches) <= trained:
        methods = [method for method in methods if method != "ntk"]
    bar = tqdm(lines, desc="benchmark", mininterval=1, dynamic_ncols=True, disable=None)
    for line, prompt in zip(bar, batches):
        slots, times = None, max(1.0, prompt.tokens.shape[1] / trained)
        for method in methods:
            used = gpt.scaled(times) if method == "ntk" else gpt
            manage = evolve.managed(method, solution, slots, config)
            with evolve.precision(config.device):
                text, share = write(used, encoding, prompt, new_tokens(line), config.delay, manage,
                                    config.positions == "renumbered")
            if method == "namm":
                slots = evolve.slots_of(share, prompt.context, config)
            found.setdefault((line.dataset, method), []).append((score(line, text), share))
    for (dataset, method), pairs in found.items():
        value, cache = map(statistics.fmean, zip(*pairs))
        full = statistics.fmean(one for one, _ in found[dataset, "full"])
        rows.append({"dataset": dataset, "method": method, "score": value,
                     "relative": value / full if full else None, "cache": cache, "n": len(pairs)})
    return rows


# --- 5. Lines to evolve on ------------------------------------------------------------------------

@dataclass
class Share:
    """The lines of one split, in the place of a data.Part."""
    rows: dict                   # {task: [(context, question, answer), in tokens]}
    encode: callable             # str -> [token]
    most_asked: int              # tokens of the longest question and answer


def split_of(line):
    """"evolve", "choose" or "report", 50, 20 and 30 of 100, by a hash of the context: lines about
    the same text go together."""
    number = int(hashlib.sha256(line.context.encode("utf-8", "replace")).hexdigest(), 16) % 100
    return "evolve" if number < 50 else "choose" if number < 70 else "report"


def task(name):
    """A task as those in data.py: a line of a Share, drawn; of its context the first and the last
    half of n tokens."""
    def draw(part, rng, n, room):
        """Draw a line."""
        context, question, answer = part.rows[name][rng.integers(len(part.rows[name]))]
        return context[:n - n // 2] + context[-(n // 2):], [(question, answer)]
    return draw


def shares(lines, encoding, length):
    """({split: Share}, {dataset: name of its task}) for prompts of `length` tokens. Raises
    ValueError, with file and number, for a line whose context does not fill them, or whose question
    and answer have more than half; and when a dataset has no line in a split."""
    tokens = [in_tokens(line, encoding) for line in lines]
    most = max(len(question) + len(answer) for _, question, answer in tokens)
    needed = length - data.question_tokens(length, most)
    names = {dataset: f"jsonl{i}" for i, dataset in enumerate({line.dataset: 0 for line in lines})}
    rows = {split: {name: [] for name in names.values()} for split in ("evolve", "choose")}
    for line, (context, question, answer) in zip(lines, tokens):
        split = split_of(line)
        if split == "report":
            continue
        if len(question) + len(answer) > length // 2:
            raise ValueError(f"{line.where}: question and answer have {len(question + answer)} "
                             f"tokens, more than half of {length}; leave the line out, or give "
                             "more --length")
        if len(context) < needed:
            raise ValueError(f"{line.where}: the context has {len(context)} tokens, and prompts to "
                             f"evolve on {needed}; leave the line out, or give less --length")
        rows[split][names[line.dataset]].append((context, question, answer))
    for dataset, name in names.items():
        for split in rows:
            if not rows[split][name]:
                raise ValueError(f"no line of {dataset} falls to the split to {split}; give more")
    return {split: Share(own, encoding.encode_ordinary, most) for split, own in rows.items()}, names


def evolve_on(gpt, encoding, lines, config, length, folder):
    """The evolve.Solution that was evolved on some of the lines, in prompts of `length` tokens;
    fitness is the likelihood of the first answer. Others chose among the candidates, and those of
    the split "report" took no part. `folder` keeps it, and what a stopped evolution goes on
    from."""
    folder = pathlib.Path(folder)
    parts, names = shares(lines, encoding, length)
    config = replace(config, evolve_on=",".join(names.values()), stages=1, length=length,
                     evolve_at=(1,))
    about = {"config": vars(config), "lines": [asdict(line) for line in lines]}
    digest = hashlib.sha256(evolve.as_json(about).encode()).hexdigest()
    if (folder / "digest").exists() and (folder / "digest").read_text() != digest:
        raise ValueError(f"{folder} holds what was evolved on other lines, or with other settings; "
                         "give another folder")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run; give another folder")
    kept = evolve.load_solution(folder, config)
    if kept:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    evolve.save(folder / "digest", digest)
    state = evolve.load(folder / "progress.pt", {"next", "es"})
    tasks = {name: task(name) for name in names.values()}
    data.TASKS.update(tasks)
    try:
        solution = evolve.evolve(gpt, parts, config, tqdm.write, state, lambda state:
                                 evolve.save(folder / "progress.pt", state))
    finally:
        for name in tasks:
            del data.TASKS[name]
    evolve.save(folder / "namm.pt", vars(solution))
    (folder / "progress.pt").unlink()
    return solution


# --- 6. The command -------------------------------------------------------------------------------

def main(line):
    """Print every method's score on the lines of the files."""
    parser = argparse.ArgumentParser(prog="python -m extras.jsonl", allow_abbrev=False)
    parser.add_argument("run")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--template")
    parser.add_argument("--length", type=int)
    parser.add_argument("--evolve", metavar="FOLDER")
    given, options = parser.parse_known_args(line)
    template = given.template and given.template.replace(r"\n", "\n")
    lines = [one for file in given.files for one in read(file, template)]
    config, gpt, solution, _, encoding = runs.open_with_encoding(given.run, options)
    trained = getattr(gpt, "trained_length", None) or config.length
    longest = getattr(gpt, "trained_length", None) or config.length * max(config.report_at)
    length = given.length or longest
    prompts(lines, encoding, length, config.delay)             # what can be refused, is so now
    if given.evolve:
        solution = evolve_on(gpt, encoding, lines, config, length, given.evolve)
        lines = [one for one in lines if split_of(one) == "report"]
    rows = report(gpt, solution, encoding, lines, config, length, trained)
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        cells = [[row["method"], f"{row['score']:.3f}",
                  "" if row["relative"] is None else f"{row['relative']:.3f}",
                  f"{row['cache']:.3f}"] for row in own]
        title = f"{dataset}: {own[0]['n']} lines, at most {length} tokens before the answer"
        print(runs.markdown(title, ["method", "score", "relative to full", "cache"], cells))


if __name__ == "__main__":
    runs.command("extras.jsonl", main)
