"""Proofs of jsonl.py, on hand-made lines in the published forms. From the project's folder:

    python -m pytest extras/test_jsonl.py
"""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
import tiktoken
import torch

import data
import evolve
import model
import namm
from extras import jsonl, pretrained, test_pretrained

torch.set_num_threads(1)
END = 256                                                      # the special token
ENCODING = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", special_tokens={"<end>": END},
                             mergeable_ranks={bytes([byte]): byte for byte in range(256)})
OPTIONS = ["Snowfield", "St. Paul", "The dairy", "Walking Georgie"]


def longbench(dataset="hotpotqa", **changes):
    """A line of LongBench as published."""
    fields = {"input": "Which city is it?", "context": "Passage 1:\nIt is Paris.",
              "answers": ["Paris"], "length": 6, "dataset": dataset, "language": "en",
              "all_classes": None, "_id": "b1"}
    return json.dumps(fields | changes, ensure_ascii=False)


def infinitebench(**changes):
    """A line of InfiniteBench's kv_retrieval as published: its input begins with a line end."""
    fields = {"id": 0, "context": 'JSON data:\n{"a1-b2": "c3-d4", "e5-f6": "g7-h8"}',
              "input": '\nKey: "a1-b2"\nThe value associated with the specified key is: ',
              "answer": ["c3-d4"], "options": ""}
    return json.dumps(fields | changes, ensure_ascii=False)


def lines_of(folder, name, *lines, template=None):
    """jsonl.read of a file with these lines."""
    (folder / name).write_text("".join(line + "\n" for line in lines), "utf-8")
    return jsonl.read(folder / name, template)


# --- the benchmarks' metrics ----------------------------------------------------------------------

PUBLISHED = {                                                  # SHA-256 of the published templates
    "narrativeqa": "aada7ed24b06", "qasper": "0fbdd123fe7f", "multifieldqa_en": "20b4666a2de8",
    "hotpotqa": "9ec4ae308865", "2wikimqa": "9ec4ae308865", "musique": "9ec4ae308865",
    "trec": "0eff8bebdba9", "triviaqa": "00a802e6377e", "lsht": "f3edabdf7fae",
    "passage_count": "986550b6c610", "passage_retrieval_en": "39b96b7fa52b",
    "passage_retrieval_zh": "c1e2346e245e", "passkey": "32a0f730f874",
    "number_string": "f519b51c90c4", "kv_retrieval": "afa97419dd69",
    "longbook_qa_eng": "658a3b345f20", "longbook_choice_eng": "3999a357879c"}


def test_templates_are_the_published_ones():
    """Catches: a template with a slip put right, a line end lost, or a dataset without one."""
    for name, text in jsonl.TEMPLATES.items():
        assert hashlib.sha256(text.encode()).hexdigest()[:12] == PUBLISHED[name]
    assert set(jsonl.TEMPLATES) == set(jsonl.DATASETS) == set(PUBLISHED)


TYPES = ["Other", "Other entity", "entity", "Date"]


@pytest.mark.parametrize("dataset, text, answers, classes, want", [
    ("hotpotqa", "paris", ["Paris."], None, 1),
    ("hotpotqa", "Paris is the capital", ["London", "Paris"], None, 1 / 2),    # of 3 and of 1
    ("hotpotqa", "no no no", ["no no yes"], None, 2 / 3),      # a word counts as often as in both
    ("hotpotqa", "The", ["the"], None, 0),                     # nothing is left of the answer
    ("hotpotqa", "an apple", ["Apple"], None, 1),
    ("hotpotqa", "well known", ["well-known"], None, 0),
    ("hotpotqa", "", ["Paris"], None, 0),
    ("hotpotqa", "Paris\nQuestion: who", ["Paris"], None, 1 / 2),              # all lines count
    ("triviaqa", "\n\nParis\nQuestion: who", ["Paris"], None, 1),              # the first line
    ("triviaqa", " \nParis", ["Paris"], None, 0),              # which is blank here
    ("passage_count", "There are 3 of 13", ["13"], None, 1 / 2),
    ("passage_count", "13.0", ["13"], None, 1 / 2),
    ("passage_count", "thirteen", ["13"], None, 0),
    ("passage_retrieval_en", "Page 3, or 3, or 30, or 4", ["Paragraph 3"], None, 2 / 4),
    ("passage_retrieval_en", "Paragraph 03", ["Paragraph 3"], None, 0),
    ("passage_retrieval_zh", "段落3", ["段落3"], None, 1),
    ("trec", "Date or entity", ["Date"], TYPES, 1 / 2),
    ("trec", "Date\nentity", ["Date"], TYPES, 1),              # the first line
    ("trec", "entity", ["Date"], TYPES, 0),
    # "Other" is in the answer and goes; "Other entity" is next, and passed over; "entity" goes
    ("trec", "Other entity", ["Other entity"], TYPES, 1),
    # "Other" goes; "entity", now next to it, is passed over and counts
    ("trec", "Other entity", ["Other entity"], ["Other", "entity", "Other entity"], 1 / 2),
    ("passkey", "It is 71432. 5", ["71432"], None, 1),
    ("passkey", "1. It is 71432", ["71432"], None, 0),
    ("number_string", " 0071", ["71"], None, 0),
    ("kv_retrieval", 'no, "c3-d4".', ["c3-d4"], None, 1),
    ("kv_retrieval", "c3-d4;", ["c3-d4"], None, 0),
    ("longbook_qa_eng", "a dog", ["The cat", "The dog"], None, 1),
])
def test_scores_worked_by_hand(dataset, text, answers, classes, want):
    """Each metric and each quirk that decides a point. Catches: a rule improved on."""
    line = jsonl.Line(dataset, "", "?", answers, classes)
    assert jsonl.score(line, text) == pytest.approx(want)


@pytest.mark.parametrize("text, want", [
    (" C. Something", 1), ("Certainly B", 1), ("Because C", 0), ("", 0),       # the first letter
    ("The dairy", 1), ("the dairy", 0),                        # the option, word by word
    ("The answer is: C", 1), ("The answer is:C", 0),           # a character is passed over
    ("The answer is The dairy", 1), ("The answer is B or C", 0), ("The answer is:", 0),
    ("I would say C, not B", 1), ("It is BC or C", 0),         # the first piece of "ABCD"
])
def test_choice_worked_by_hand(text, want):
    """The third of four options is the answer. Catches: rules in another order than theirs."""
    line = jsonl.Line("longbook_choice_eng", "", "?", ["C", "The dairy"], None)
    assert jsonl.score(line, text) == want


def test_choice_forgets_marks_after_a_cue():
    """Catches: options compared before marks became spaces."""
    line = jsonl.Line("longbook_choice_eng", "", "?", ["B", "St. Paul"], None)
    assert jsonl.score(line, "St. Paul") == 1
    assert jsonl.score(line, "The answer is St. Paul") == 0


# --- lines ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, line, message", [
    ("x.jsonl", longbench()[:-9], "damaged"),
    ("x.jsonl", "[1, 2]", "neither"),
    ("x.jsonl", longbench(answers=[]), "no answer"),
    ("x.jsonl", longbench(answers=[" "]), "no answer"),
    ("x.jsonl", longbench(answers=[None]), "no answer"),
    ("x.jsonl", longbench(context=" \n"), "context is empty"),
    ("x.jsonl", longbench(input=None), "`input` is no text"),
    ("x.jsonl", longbench("gov_report"), "ROUGE"),
    ("x.jsonl", longbench("lcc_e"), "fuzz"),
    ("x.jsonl", longbench("multifieldqa_zh"), "jieba"),
    ("x.jsonl", longbench("mine"), "no template for mine"),
    ("x.jsonl", longbench("trec"), "all_classes"),
    ("x.jsonl", longbench("passage_retrieval_en", answers=["three"]), "one number"),
    ("math_calc.jsonl", infinitebench(answer=[[1, 2]]), "math_calc is scored by a rule of its own"),
    ("kv_retrieval.jsonl", infinitebench(answer=None), "no answer"),
    ("longbook_choice_eng.jsonl", infinitebench(options=OPTIONS), "four `options`"),
])
def test_wrong_lines_are_named_with_file_and_number(tmp_path, name, line, message):
    """Blank lines count too. Catches: a line skipped in silence, a number that is off by one, a
    character that ends lines elsewhere but not in JSON."""
    good = infinitebench() if name != "x.jsonl" else longbench(context="one\u2028two")
    if name.startswith(("math", "longbook")):
        good = ""
    with pytest.raises(ValueError, match=rf"{name}:3: .*{message}"):
        lines_of(tmp_path, name, good, "", line)


def test_files_and_templates_that_cannot_be(tmp_path):
    """Catches: an empty file taken for one without mistakes; a question read before the context."""
    with pytest.raises(ValueError, match="no such file"):
        jsonl.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="empty"):
        lines_of(tmp_path, "x.jsonl", "")
    for template in ("Q: {input}", "{input} {context} A:", "{context}{input}", "{context}" * 2):
        with pytest.raises(ValueError, match="--template"):
            lines_of(tmp_path, "x.jsonl", longbench(), template=template)


def test_lines_become_context_question_and_answers(tmp_path):
    """Both forms, told apart by their fields. Catches: a context stripped, braces in a text taken
    for fields, the question's leading line end lost, an option's letter off by one."""
    line = longbench("trec_e", context="{input} x ", input="Q {context}\nType:", all_classes=TYPES,
                     answers=["Date"])
    [one] = lines_of(tmp_path, "any.jsonl", line)
    assert (one.dataset, one.answers, one.classes) == ("trec", ["Date"], TYPES)
    assert one.where == f"{tmp_path}/any.jsonl:1"
    assert one.context.endswith("examples of questions.\n\n{input} x ")
    assert one.question == "\nQ {context}\nType:"

    [one] = lines_of(tmp_path, "kv_retrieval.jsonl", infinitebench(answer=34))
    assert one.answers == ["34"] and one.context.endswith('"g7-h8"}')
    assert one.question.startswith('\n\n\nKey: "a1') and one.question.endswith("key is: ")

    options = ["{input}", *OPTIONS[1:]]
    line = infinitebench(options=options, answer=["The dairy"], input="Where?")
    [one] = lines_of(tmp_path, "longbook_choice_eng.jsonl", line)
    assert one.answers == ["C", "The dairy"]
    assert "Question: Where?\nA. {input}\nB. St. Paul\nC. The dairy\nD. Walking" in one.question

    template = "Text: {context}\nQ: {input}\nA:"
    [one] = lines_of(tmp_path, "x.jsonl", longbench("mine"), template=template)
    assert one.context == "Text: Passage 1:\nIt is Paris."
    assert one.question == "\nQ: Which city is it?\nA:"
    assert jsonl.new_tokens(one) == 32 and jsonl.score(one, "It: Paris") == pytest.approx(2 / 3)


# --- prompts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("context, question, length, n, want", [
    ("c" * 40, "q" * 20, 60, 40, "c" * 40 + "q" * 20),
    ("ab" * 40, "q" * 20, 60, 40, "ab" * 15 + "ab" * 5 + "q" * 20),            # 30 and 30
    ("c" * 60, "q" * 20, 61, 40, "c" * 40 + "q" * 20),         # an odd length: 30 and 30
    ("c" * 60, "pq" * 25, 60, 30, "c" * 30 + "pq" * 15),       # the question is longer than a half
    ("c" * 20, "p" * 20 + "q" * 40, 60, 20, "c" * 20 + "p" * 10 + "q" * 30),   # the cut is in it
])
def test_the_middle_of_long_prompts_goes(context, question, length, n, want):
    """A byte is a token here. Catches: a cut elsewhere, or a context with part of a question."""
    line = jsonl.Line("hotpotqa", context, question, ["Yes", "No"], None)
    [batch] = jsonl.prompts([line], ENCODING, length, 16)
    assert ENCODING.decode(batch.tokens[0].tolist()) == want + " Yes" and batch.context == n
    assert batch.answer.tolist() == [[0] * len(want) + [1] * 4] and batch.tasks == ["hotpotqa"]


def test_space_before_the_answer_and_contexts_too_short():
    """Catches: two spaces where the template ends in one, a space in Chinese; a prompt on which no
    method can differ, or a full block refused."""
    for question, space in (("is", " "), ("is: ", ""), ("is:\n", ""), ("答案是：", "")):
        line = jsonl.Line("passkey", "c" * 16, question, ["X"], None, "f.jsonl:7")
        [batch] = jsonl.prompts([line], ENCODING, 99, 16)
        assert ENCODING.decode(batch.tokens[0].tolist()) == "c" * 16 + question + space + "X"
        with pytest.raises(ValueError, match="f.jsonl:7: the context has 16 tokens, a block 32"):
            jsonl.prompts([line], ENCODING, 99, 32)


# --- greedy text and the report -------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt():
    """A small GPT whose weights are all random, so that what is in the cache matters."""
    torch.manual_seed(3)
    gpt = model.GPT(model.GPTConfig(vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                                    head_dim=8, n_hidden=48)).eval()
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return gpt


@torch.no_grad()
def continued(gpt, tokens, count, n=0, delay=1, budget=0):
    """Greedy tokens by plain loops. budget: after each whole block of the first n tokens only so
    many newest slots stay; 0: no cache at all, the whole text anew for each token."""
    text, cache, read = list(tokens), gpt.new_cache(1) if budget else None, 0
    while budget and read + delay <= n:
        gpt(torch.tensor([text[read:read + delay]]), cache)
        read += delay
        for layer in cache:
            layer.evict(layer.positions >= read - budget)
    for _ in range(count):
        text.append(int(gpt(torch.tensor([text[read:]]), cache)[0, -1].argmax()))
        read = len(text) - 1 if budget else 0
    return text[len(tokens):]


@pytest.mark.parametrize("name, line, count", [("hotpotqa.jsonl", longbench(), 32),
                                               ("kv_retrieval.jsonl", infinitebench(), 50)])
def test_lines_to_scores_end_to_end(tmp_path, gpt, monkeypatch, name, line, count):
    """A line of each benchmark through a GPT, without a manager and with one that keeps the 8
    newest slots after each block of the context. What plain loops write with the full cache is
    taken for the answer. Catches: a cache managed while the question or the answer is read, an
    answer in the prompt, another number of tokens, methods that change places."""
    delay, methods = 16, {"full": None, "recent": namm.by_rule(namm.RULES["recent"], 8)}
    [one] = lines_of(tmp_path, name, line)
    n, tokens = len(one.context.encode()), [*(one.context + one.question).encode()]
    texts = {}
    for method, budget in (("full", 0), ("recent", 8)):
        written = continued(gpt, tokens, count, n, delay, budget)
        written = written[:written.index(END)] if END in written else written
        texts[method] = bytes(written).decode("utf-8", "replace")
    said = [set(re.split(r"""[\s:"'.,?!{}]+""", text)) for text in texts.values()]
    one.answers = [texts["full"] if count == 32 else max(said[0] - said[1])]

    [prompt] = jsonl.prompts([one], ENCODING, 4096, delay)
    shares = {"full": 1, "recent": (8 + n % delay) / n}
    for method, manage in methods.items():
        text, share = jsonl.write(gpt, ENCODING, prompt, count, delay, manage)
        assert (text, share) == (texts[method], pytest.approx(shares[method]))
    monkeypatch.setattr(evolve, "managed", lambda method, *others: methods[method])
    config = evolve.Config(device="cpu", delay=delay, positions="original")
    full, recent = jsonl.report(gpt, None, ENCODING, [one], config, 4096, 4096, list(methods))
    assert full == {"dataset": name[:-6], "method": "full", "score": 1, "relative": 1, "cache": 1,
                    "n": 1}
    assert recent["score"] == recent["relative"] < 1
    assert recent["cache"] == pytest.approx(shares["recent"])


def test_report_worked_by_hand(gpt, monkeypatch):
    """Scripted texts: full scores 1/2 and 1, NAMM 1/2 twice; a prompt of 27 tokens where 20 were
    trained. Catches: a mean of ratios (3/4 instead of 2/3), a ratio to 0, datasets mixed, text
    after the special token; angles that are not stretched to the prompt, or stay stretched."""
    full = {"Q1": "Paris Rome York", "Q2": "Paris<end>Rome", "Q3": "none"}
    other = {"Q1": "Rome York Paris", "Q2": "Rome York London", "Q3": "none"}

    def generate(gpt, tokens, count, block, manage, renumber):
        text = ENCODING.decode(tokens[0].tolist())
        assert (count, block) == (6 if "Q3" in text else 32, 16 if manage else len(text))
        assert renumber
        scales.append(gpt.config.rope_scale)
        text = (other if manage else full)[text[-2:]]
        return torch.tensor([ENCODING.encode(text, allowed_special="all")])

    scales = []
    monkeypatch.setattr(jsonl, "generate", generate)
    lines = [jsonl.Line("musique", "c" * 20, "Q1", ["Paris"], None),
             jsonl.Line("musique", "c" * 20, "Q2", ["Rome", "Paris"], None),
             jsonl.Line("passkey", "c" * 20, "Q3", ["71432"], None)]
    solution = evolve.Solution(torch.zeros(4172), torch.zeros(17), torch.ones(17))
    config = evolve.Config(device="cpu", delay=16)
    methods = ["namm", "full", "ntk"]
    rows = jsonl.report(gpt, solution, ENCODING, lines, config, 4096, 20, methods)
    assert [(row["dataset"], row["method"], row["n"]) for row in rows] == [
        *(("musique", method, 2) for method in methods),
        *(("passkey", method, 1) for method in methods)]
    assert [row["score"] for row in rows] == pytest.approx([1 / 2, 3 / 4, 3 / 4, 0, 0, 0])
    assert [row["relative"] for row in rows] == [pytest.approx(2 / 3), 1, 1, None, None, None]
    # " Paris", " Rome" and " 71432" come after 22 tokens
    assert scales == pytest.approx([1, 1, 28 / 20, 1, 1, 27 / 20, 1, 1, 28 / 20])
    jsonl.report(gpt, solution, ENCODING, lines, config, 4096, 28, methods)
    assert scales[9:] == [1] * 6                               # no prompt is longer: no "ntk"


# --- lines to evolve on, and the command ----------------------------------------------------------

def many(count, context="Text {}: " + "it is Paris. " * 12, **changes):
    """Lines of one dataset, each with a context of its own."""
    return [jsonl.Line("hotpotqa", context.format(i), "Which?", ["Paris", "Rome"], None, f"f:{i}")
            for i in range(1, 1 + count)]


def test_splits_are_disjoint_in_their_contexts():
    """Catches: a context that is evolved on and reported on, shares that are empty or all; a split
    that another process or order would deal otherwise."""
    lines = many(400)
    found = [jsonl.split_of(line) for line in lines]
    for split, share in (("evolve", 0.5), ("choose", 0.2), ("report", 0.3)):
        assert abs(found.count(split) / 400 - share) < 0.08
    other = [jsonl.Line("trec", line.context, "Who?", ["x"], None) for line in reversed(lines)]
    assert [jsonl.split_of(line) for line in reversed(other)] == found
    parts, names = jsonl.shares(lines, ENCODING, 128)
    for split in ("evolve", "choose"):
        texts = [ENCODING.decode(context) for context, _, _ in parts[split].rows["jsonl0"]]
        assert texts == [line.context for line, own in zip(lines, found) if own == split]


def test_a_line_as_a_task_by_hand():
    """Prompts of 64 and 128 bytes: question and answer have 12 of them, so that 52 or 116 are the
    context's first and last. Then a question of 92. Catches: another answer than the first, a
    question that may have no more than those of data.py, a context cut elsewhere, a line of another
    split."""
    lines = many(60)
    parts, names = jsonl.shares(lines, ENCODING, 128)
    assert names == {"hotpotqa": "jsonl0"} and parts["evolve"].most_asked == 12
    own = [line.context for line in lines if jsonl.split_of(line) == "choose"]
    for length, half in ((64, 26), (128, 58)):
        rng = np.random.default_rng(0)
        batch = data.prompts(parts["choose"], [jsonl.task("jsonl0")] * 8, rng, length)
        assert batch.context == 2 * half == length - 12
        want = {text[:half] + text[-half:] + "Which? Paris" for text in own}
        assert {ENCODING.decode(tokens.tolist()) for tokens in batch.tokens} <= want
        assert batch.answer.tolist() == [[0] * (length - 6) + [1] * 6] * 8
    long = [jsonl.Line("x", "c" * 120 + str(i), "q" * 90, ["a"], None) for i in range(60)]
    parts, _ = jsonl.shares(long, ENCODING, 192)
    batch = data.prompts(parts["evolve"], [jsonl.task("jsonl0")], np.random.default_rng(0), 192)
    assert batch.context == 192 - 92


def test_lines_that_cannot_be_evolved_on():
    """Each is named. Catches: a line that is left out, cut or filled up in silence."""
    short = jsonl.Line("hotpotqa", "Text 2", "Which?", ["Paris"], None, "f:61")
    asks = jsonl.Line("hotpotqa", "d" * 300, "q" * 40, ["Paris"], None, "f:61")
    assert "report" not in {jsonl.split_of(short), jsonl.split_of(asks)}
    for line, says in ((short, "f:61: the context has 6 tokens, and prompts to evolve on 68"),
                       (asks, "f:61: question and answer have 46 tokens, more than half of 80")):
        with pytest.raises(ValueError, match=says):
            jsonl.shares(many(60) + [line], ENCODING, 80)
    with pytest.raises(ValueError, match="no line of hotpotqa falls to the split to"):
        jsonl.shares(many(1), ENCODING, 80)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a finished run on a small checkpoint, its GPT, its tokeniser)."""
    folder = tmp_path_factory.mktemp("real")
    tokens, merges, text = test_pretrained.words_and_text(folder)
    s = test_pretrained.Sizes(len(tokens))
    base = test_pretrained.write_hf(folder / "hf", s, test_pretrained.random_weights(s),
                                    words=test_pretrained.tokenizer_json(tokens, merges))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "evolve.py", "--base", str(base), "--preset", "smoke", "--device", "cpu", "--corpus",
            str(text), "--out", str(folder / "run"), "--generations", "1", "--evolve_at", "1",
            "--report_at", "1", "--capacity", "8", "--methods", "namm,full"])
        evolve.main()
    return folder / "run", *pretrained.load(base)


def table_of(printed):
    """{method: [score, relative, cache]} of one printed table, as texts."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()
            if line.startswith("|")][2:]
    return {row[0]: row[1:] for row in rows}


def test_the_command_end_to_end(tmp_path, finished, capsys):
    """A line of each benchmark; what the full cache writes, by plain loops, is the right answer to
    the first, and no word of it to the second. Catches: a run that is opened with another GPT or
    tokeniser, a method that is left out, a prompt longer than asked for."""
    run, gpt, encoding = finished
    line = tmp_path / "hotpotqa.jsonl", tmp_path / "kv_retrieval.jsonl"
    line[0].write_text(longbench())
    line[1].write_text(infinitebench(answer="no such word") + "\n")
    [one] = jsonl.read(line[0])
    tokens = encoding.encode_ordinary(one.context) + encoding.encode_ordinary(one.question)
    tokens = tokens[:40] + tokens[-40:]                        # --length 80
    with torch.no_grad():
        written = continued(gpt, tokens, 32)
    line[0].write_text(longbench(answers=[encoding.decode(written)]))
    jsonl.main([str(run), *map(str, line), "--length", "80", "--capacity", "4"])
    first, second = capsys.readouterr().out.split("### ")[1:]
    assert first.startswith("hotpotqa: 1 lines, at most 80 tokens")
    own = table_of(first)
    assert list(own) == list(jsonl.METHODS)                    # "ntk" too: 80 and the answer are
    assert own["full"] == ["1.000", "1.000", "1.000"]          # more than the 77 it was trained on
    assert all(row[0] == row[1] for row in own.values())
    shares = {method: float(row[2]) for method, row in own.items()}    # of some 40 tokens or more
    assert shares["namm"] == pytest.approx(shares["tova+pool"], abs=0.03) and shares["namm"] < 0.5
    own = table_of(second)
    assert own["full"] == ["0.000", "", "1.000"] and own["namm"][1] == ""


def test_a_namm_evolved_on_lines(tmp_path, finished, capsys, monkeypatch):
    """Through the command, twice. Catches: a report on lines that were evolved on, another file
    taken for the same, a second evolution; a task that stays in data.TASKS."""
    run, gpt, encoding = finished
    text = "It is Paris and it is not Rome. " * 6
    lines = [longbench("passkey", context=f"Text {i}. {text}") for i in range(24)]
    file, folder = tmp_path / "mine.jsonl", tmp_path / "evolved"
    file.write_text("\n".join(lines))
    template = r"{context}\nQuestion: {input}\nAnswer:"
    command = [str(run), str(file), "--template", template, "--length", "160", "--evolve",
               str(folder), "--generations", "1"]
    drawn, tasks = [], dict(data.TASKS)
    prompts = data.prompts
    monkeypatch.setattr(data, "prompts", lambda *own: drawn.append(prompts(*own)) or drawn[-1])
    jsonl.main(command)
    first = capsys.readouterr().out
    report = [line for line in jsonl.read(file, template.replace(r"\n", "\n"))
              if jsonl.split_of(line) == "report"]
    assert f"passkey: {len(report)} lines" in first and 4 < len(report) < 10
    seen = {re.match(r"Text \d+", encoding.decode(row.tolist()))[0]
            for batch in drawn for row in batch.tokens}
    assert len(seen) > 8 and not seen & {line.context[:line.context.index(".")] for line in report}
    assert data.TASKS == tasks and sorted(path.name for path in folder.iterdir()) == ["digest",
                                                                                      "namm.pt"]
    count = len(drawn)
    jsonl.main(command)
    again = capsys.readouterr().out
    assert again[again.index("###"):] == first[first.index("###"):] and len(drawn) == count
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="evolved on other lines"):
        jsonl.main(command)
