"""python -m pytest extras/test_extras.py: proofs of the commands, by loops and sums by hand."""

import copy
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import evolve
import model
import namm
from extras import ablations, bench, probes, rules, runs, same, summary

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def opened(finished):
    """That run, as the commands open it."""
    return runs.open_run(str(finished))


@pytest.fixture
def loud(opened):
    """(config, gpt, solution, parts) of that run, copies with noise in all weights: so that the
    cache matters, and NAMM keeps some tokens of each head, and not the same."""
    (config, gpt, solution), parts = copy.deepcopy(opened[:3]), opened[3]
    torch.manual_seed(0)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return config, gpt, evolve.Solution(0.3 * torch.randn(4172), solution.mean, solution.std), parts


def files(folder):
    """{path: (size, when it was written)} of all that a folder holds."""
    return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*")}


# --- ablations -----------------------------------------------------------------------------------

@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_small_scorers_by_hand(scorer):
    """Catches: weights taken in another order, one candidate's applied to another's rows, a missing
    nonlinearity, a bias with the step of a weight."""
    torch.manual_seed(0)
    n = {"linear": 26, "mlp": 433}[scorer]
    x, params = torch.randn(4, 1, 5, 25), torch.randn(2, n)
    got = ablations.SCORERS[scorer][0](x, params, [5], None)
    for row in range(4):
        p = params[row // 2]
        if scorer == "linear":
            want = x[row, 0] @ p[:25] + p[25]
        else:
            hidden = torch.tanh(x[row, 0] @ p[:400].view(25, 16) + p[400:416])
            want = hidden @ p[416:432] + p[432]
        torch.testing.assert_close(got[row, 0], want, atol=1e-4, rtol=1e-4)
    steps = {"linear": [1 / 5] * 26, "mlp": [1 / 5] * 416 + [1 / 4] * 17}[scorer]
    assert ablations.ablated(scorer=scorer).steps("block").tolist() == pytest.approx(steps)


def test_without_the_mask_every_live_slot_is_seen():
    """Slot by slot in plain sums: ten slots of a layer, three of them dead, and four of the next.
    Catches: a mask that is still there, padding or another layer that is seen, the vector unpacked
    in another order."""
    torch.manual_seed(0)
    x, p = torch.randn(14, 25), 0.3 * torch.randn(4172)
    alive = torch.arange(14) >= 3
    got = ablations.unmasked_scores(x[None, None], p[None], [10, 4], alive[None, None])[0, 0]
    x = x[:10]
    W, bias = p[:2400].view(25, 96), p[2400:2496]
    Wo, bo, w, b = p[2496:4096].view(32, 50), p[4096:4146], p[4146:4171], p[4171]
    query, key, value = (x[3:] @ W + bias).split(32, dim=1)
    for slot in range(7):
        weight = [math.exp(query[slot] @ key[i] / math.sqrt(32)) for i in range(7)]
        read = sum(weight[i] * value[i] for i in range(7)) / sum(weight)
        r, m = (read @ Wo + bo).split(25)
        want = (x[3 + slot] * (1 + m) + r) @ w + b
        torch.testing.assert_close(got[3 + slot], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features", ["values", "moments"])
def test_plain_frames_by_hand(features):
    """Two layers, two blocks of 32 queries, slot by slot; some slots are new in the second.
    Catches: frames, slots or layers mixed up, a mean that counts the padding, a memory that is not
    found."""
    torch.manual_seed(0)
    gamma, want = math.sqrt(namm.MEMORY), np.zeros((2, 5, 17))  # of a frame, two a block
    cache = [model.KVCache(torch.zeros(1, 1, 0, 4)) for _ in range(2)]
    for new in ((2, 1), (3, 3)):
        blocks = []
        for layer, count, own in zip(cache, new, want):
            layer.append(torch.zeros(1, 1, count, 4), torch.zeros(1, 1, count, 4))
            blocks.append(torch.rand(1, 1, 32, layer.alive.shape[2]))
            for start in (0, 16):
                for slot, piece in enumerate(blocks[-1][0, 0, start:start + 16].T.double().numpy()):
                    plain = [piece.mean(), piece.max()] + [0] * 15
                    plain = np.array([*piece, 0] if features == "values" else plain)
                    own[slot] = gamma * own[slot] + (1 - gamma) * plain
        got = ablations.SPECTRA[features](cache, blocks, True)[0, 0]
    assert got[:5].numpy() == pytest.approx(want[0], abs=1e-5)
    assert got[5:].numpy() == pytest.approx(want[1, :4], abs=1e-5)


def test_nothing_replaced_is_namm(loud):
    """Scores, who stays, and statistics, over several evictions. Catches: an ablation that differs
    in more than it says, and statistics of other features than those that are judged."""
    config, gpt, solution, parts = loud
    plain, text = ablations.ablated(), torch.from_numpy(parts["report"].tokens[:96])[None].long()
    own = plain(solution.params, solution.mean, solution.std)
    seen = []
    for one in (solution, own):
        manage = evolve.manager(one, config, capacity=20, threshold=-0.2)
        model.read(gpt, text, gpt.new_cache(1, True), 16, manage,
                   observe=lambda cache, scores, keep: seen.append((scores, keep)))
    assert len(seen) == 12
    for (scores, keep), (others, stay) in zip(seen[:6], seen[6:]):
        assert all(torch.equal(a, b) for a, b in zip([*scores, *keep], [*others, *stay]))
    assert not all(own.all() for own in seen[5][1])  # something went
    for kind in (plain, ablations.ablated(features="values")):
        batches = evolve.evolve_prompts(parts["evolve"], config, 1, 8, [2])
        mean, std = evolve.feature_statistics(gpt, batches, config, kind)
        usual = evolve.feature_statistics(gpt, batches, config)
        assert (kind is plain) == (torch.equal(mean, usual[0]) and torch.equal(std, usual[1]))
    assert mean[16] == 0 and mean[:16].min() > 0  # sixteen values and a zero


def test_what_the_scorer_may_not_see_changes_nothing():
    """With "age" the attention must not matter, with "spectrum" the age; heads "together" drop the
    same tokens. Catches: a switch that does nothing, or blinds the wrong half."""
    torch.manual_seed(0)
    params, mean, std = torch.randn(1, 4172), 0.1 * torch.rand(17), 0.05 + torch.rand(17)

    def kept(attention, positions, **changed):
        """(2,6) of a new cache."""
        cache = six(positions=positions.expand(1, 2, 6))
        cache.seen = 100
        method = ablations.ablated(**changed).method
        manage = method(params, mean, std, -math.inf, 3, False, True, True)
        return manage([cache], [attention])[1][0][0].tolist()

    a, b = torch.rand(1, 2, 16, 6), torch.rand(1, 2, 16, 6)
    near, far = torch.arange(94, 100), torch.arange(0, 100, 19)
    assert kept(a, near, features="age") == kept(b, near, features="age")
    assert kept(a, near, features="age") != kept(a, far, features="age")
    assert kept(a, near, features="spectrum") == kept(a, far, features="spectrum")
    assert kept(a, near, features="spectrum") != kept(b, near, features="spectrum")
    assert kept(a, near)[0] != kept(a, near)[1]
    together = kept(a, near, heads="together")
    assert together[0] == together[1] and sum(together[0]) == 3


def test_an_ablation_evolves_and_reports(finished, tmp_path, capsys):
    """Catches: a vector of another size, a report that holds NAMM's own scores, a run that is
    changed, a folder that is written over."""
    before = files(finished)
    line = [str(finished), "--scorer", "linear", "--out", str(tmp_path / "a"), "--capacity", "8"]
    ablations.main(line)
    out = capsys.readouterr().out
    vector = torch.load(tmp_path / "a" / "namm.pt", weights_only=True)
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(vector["params"]) == 26 and vector["cost"]["generations"] == 1
    assert result["config"]["scorer"] == "linear" and result["config"]["capacity"] == 8
    config, gpt, solution, parts = runs.open_run(str(finished), ["--capacity", "8"])
    kind = ablations.ablated(scorer="linear")
    own = kind(*(vector[name] for name in ("params", "mean", "std", "zero")))
    want = {True: evolve.report(gpt, own, parts["report"], config),
            False: evolve.report(gpt, solution, parts["report"], config)}
    got = [row["logprob"] for row in result["report"]]
    assert got == [row["logprob"] for row in want[True]] != [row["logprob"] for row in want[False]]
    plainer, whole = out.split("NAMM as it is")
    assert plainer.count("| namm |") == whole.count("| namm |") == 2
    assert "--scorer linear" in plainer
    assert files(finished) == before
    with pytest.raises(ValueError, match="holds a run"):
        ablations.main(line)


# --- rules ---------------------------------------------------------------------------------------

def six(**changes):
    """A cache of one row, two heads and six slots, for examples by hand."""
    keys = torch.tensor([3., 1, 5, 2, 4, 6]).view(1, 1, 6, 1).expand(1, 2, 6, 8)
    cache = model.KVCache(keys[:, :, :0])
    cache.append(keys, keys)
    vars(cache).update(changes)
    return cache


def test_rules_on_six_slots_by_hand():
    """Catches: a rule that keeps the worst, that forgets its protected slots, or that shares what
    is each head's own; luck that is the same at each eviction, or another with the same seed."""
    received = torch.zeros(1, 2, 2, 6)  # two queries
    received[0, 0, 0] = torch.tensor([.9, .0, .1, .0, .0, .0])
    received[0, 0, 1] = torch.tensor([.0, .5, .3, .1, .0, .1])
    received[0, 1, 1] = torch.tensor([.1, .0, .0, .9, .0, .0])

    def kept(rule, budget):
        """[slots kept] of each head."""
        keep = namm.by_rule(rule, budget)([six()], [received])[1][0][0]
        return [head.nonzero()[:, 0].tolist() for head in keep]

    assert kept(rules.l2, 3) == [[1, 3, 5]] * 2  # smallest keys, and the newest slot
    # the first four and the newest get all of head 0's attention, and of head 1's: local enough
    assert kept(rules.fastgen, 5) == [[0, 1, 2, 3, 5]] * 2
    # the first two and the newest get 1.5 of head 0's 2, and .1 of head 1's 1: heavy hitters stay
    assert kept(rules.fastgen, 3) == [[0, 1, 5], [0, 3, 5]] and 3 // 2 == 1
    lucky, again = rules.random(7), rules.random(7)
    draws = [kept(lucky, 3) for _ in range(8)]
    assert draws == [kept(again, 3) for _ in range(8)] != [draws[0]] * 8
    assert all(len(head) == 3 and head[-1] == 5 for draw in draws for head in draw)


def test_fastgen_does_not_see_dead_slots():
    """Six slots of which two are dead, at places as of first tokens; the other four fill the
    budget, so all attention is in them. Catches: dead padding that takes the newest's place."""
    cache = six(alive=(torch.arange(6) >= 2).expand(1, 2, 6),
                positions=torch.tensor([2, 2, 2, 7, 8, 9]).expand(1, 2, 6))
    received = torch.tensor([0., 0, .1, .4, .4, .1]).expand(1, 2, 2, 6)
    assert torch.equal(rules.fastgen(cache, received, 4), namm.streaming(cache, received, 4))


def test_rules_are_reported_beside_namm(finished, capsys):
    """Catches: a rule or variant left out, one with more slots than NAMM, a run that is changed."""
    before = files(finished)
    rules.main([str(finished), "--capacity", "8", "--report_at", "2"])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| ") and "method" not in line:
            cells = line.strip("| ").split(" | ")
            rows[cells[0]] = float(cells[10])  # the share of the cache
    ways = "", "+pool", "+lastlayer"
    names = [name + how for name in ("random", "l2", "fastgen") for how in ways]
    assert list(rows) == ["namm", "full", *names] and rows.pop("full") == 1
    slots = round(64 * rows["namm"])  # of 64 tokens of context
    assert slots <= 8
    assert all(64 * share == pytest.approx(slots, abs=1.4) for share in rows.values())
    assert files(finished) == before


# --- probes --------------------------------------------------------------------------------------

def test_bits_are_those_of_one_pass(loud):
    """A text that ends within a block. Catches: a token predicted from itself, or lost between two
    blocks; natural logarithms; a manager that is not called."""
    config, gpt, solution, parts = loud
    text = torch.from_numpy(parts["report"].tokens[:2 * 72].reshape(2, 72)).long()
    with torch.no_grad():
        chance = gpt(text).softmax(-1)  # (2,72,V)
    want = [[-math.log2(chance[row, i, text[row, i + 1]]) for i in range(71)] for row in (0, 1)]
    got, share = probes.bits_per_token(gpt, text, config, None)
    assert got.numpy() == pytest.approx(np.array(want), rel=1e-3) and share == 1
    got, share = probes.bits_per_token(gpt, text, config, namm.by_rule(namm.recent, 4))
    assert share == pytest.approx((4 + 8) / 72)
    assert got[:, :16].numpy() == pytest.approx(np.array(want)[:, :16], rel=1e-3)
    assert not np.allclose(got[:, 20:].numpy(), np.array(want)[:, 20:], rtol=1e-3)


def test_stream_by_hand(loud):
    """Catches: stretches that overlap, rules with other slots than NAMM's."""
    config, gpt, solution, parts = loud
    config.report_at, config.rows = (1, 2), 2
    rows = probes.stream(gpt, solution, parts["report"], config)
    assert [row["method"] for row in rows[::2]] == list(probes.STREAMED)
    assert {(row["from"], row["to"]) for row in rows} == {(0, 64), (64, 128)}
    rng, n = np.random.default_rng([config.seed, 6]), 128
    text = torch.from_numpy(np.stack([parts["report"].text(rng, n) for _ in (0, 1)])).long()
    bits, _ = probes.bits_per_token(gpt, text, config, None)
    got = [row["bits"] for row in rows if row["method"] == "full"]
    assert got == pytest.approx([bits[:, :64].mean().item(), bits[:, 64:].mean().item()])
    share = {row["method"]: row["cache"] for row in rows}
    assert share["full"] == 1 and share["namm"] < 0.5
    for rule in ("recent", "streaming", "h2o", "tova"):
        assert share[rule] * 128 == math.ceil(share["namm"] * 128 - 1e-9)


def test_kinds_and_what_is_kept_of_them(loud):
    """Kinds token by token; what is kept against the positions that a plain reading leaves.
    Catches: a mask shifted by one, `lm` among the prompts, heads or layers mixed up."""
    config, gpt, solution, parts = loud
    config.capacity, config.threshold = 8, -math.inf
    part, n = parts["report"], 64
    batch = data.prompts(part, ["kv", "copy"], np.random.default_rng(0), 128)
    got = probes.kinds_of(part, batch)
    for row in (0, 1):
        tokens, answer = batch.tokens[row].numpy(), batch.answer[row].numpy()
        said = set(data.fact_positions(tokens, answer, n).tolist())
        for at in range(n):
            want = {"all": True, "to be asked for": at in said, "first four": at < 4,
                    "before such a token": at + 1 in said and at not in said, "newest 32": at >= 32,
                    "line ends": bool(part.ends_line[tokens[at]]) and at not in said}
            assert {kind: bool(mask[row, at]) for kind, mask in got.items()} == want
    rows = probes.kept_by_kind(gpt, solution, part, config)
    count = min(8, config.rows)
    batch = evolve.every_task(part, config, count, [config.seed, 8], 128)
    cache = gpt.new_cache(7 * count, True)
    model.read(gpt, batch.tokens[count:, :n], cache, 16, evolve.manager(solution, config))
    for layer, own in enumerate(cache):
        for head in (0, 1):
            left = [own.positions[row, head][own.alive[row, head]] for row in range(7 * count)]
            want = {"all": sum(len(at) for at in left) / (7 * count * n),
                    "first four": sum(int((at < 4).sum()) for at in left) / (7 * count * 4),
                    "newest 32": sum(int((at >= 32).sum()) for at in left) / (7 * count * 32)}
            for row in rows:
                if (row["layer"], row["head"]) == (layer, head) and row["kind"] in want:
                    assert row["kept"] == pytest.approx(want[row["kind"]])
    assert len(rows) == 3 * 2 * 6 and len({row["kept"] for row in rows}) > 6


def test_quotes_are_in_the_text(loud):
    """Catches: a question or answer from elsewhere, an answer that does not follow its question."""
    part = loud[3]["report"]
    batch = data.prompts(part, [probes.quote] * 3, np.random.default_rng(0), 128)
    for tokens, answer in zip(batch.tokens.tolist(), batch.answer.tolist()):
        assert max(answer) == 4
        for which in range(1, 5):
            at = answer.index(which)
            assert answer.count(which) == 2
            asked = tokens[at - 6:at + 2]  # six tokens, then the two after them
            assert any(tokens[i:i + 8] == asked for i in range(64 - 7))


def test_probes_write_what_they_print(finished, capsys):
    """On the run itself. Catches: a table without its numbers, a probe that is not written."""
    folder = finished.parent / "probed"
    shutil.copytree(finished, folder)
    probes.main([str(folder), "--capacity", "16", "--report_at", "2"])
    out = capsys.readouterr().out
    found = json.loads((folder / "probes.json").read_text())
    assert list(found) == ["stream", "kept_by_kind", "quote_probe"]
    values = {"stream": "bits", "kept_by_kind": "kept", "quote_probe": "score"}
    for title, probe in zip(out.split("### ")[1:], found):
        numbers = [row[values[probe]] for row in found[probe]]
        numbers = {f"{number:.2f}" for number in numbers if number is not None}
        assert numbers and numbers <= set(title.replace("\n", " ").split(" "))


# --- bench ---------------------------------------------------------------------------------------

def test_marks_change_nothing(loud):
    """The manager that the profiler sees. Catches: a benchmark of something other than NAMM."""
    config, gpt, solution, parts = loud
    text, seen = torch.from_numpy(parts["report"].tokens[:96])[None].long(), []
    solution.zero = 0.1
    for config.capacity, config.slots in ((8, "shared"), (8, "own"), (0, "own")):
        for manage in (evolve.manager(solution, config), bench.marked(solution, config)):
            cache = gpt.new_cache(1, True)
            model.read(gpt, text, cache, 16, manage)
            seen.append([layer.keys for layer in cache])
    for one, other in zip(seen[::2], seen[1::2]):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    shapes = [[keys.shape for keys in own] for own in seen[::2]]
    assert shapes[0] != shapes[1] != shapes[2] != shapes[0]


def test_bench_prints_every_row(finished, monkeypatch, capsys):
    """Catches: a benchmark that breaks or writes, and a cache that is masked instead of cut: NAMM's
    most slots are its capacity and one block at every length, the full cache's all tokens."""
    monkeypatch.setattr(namm, "N_PARAMS", 50)  # of CMA-ES alone: 4172 take half a minute
    before = files(finished)
    options = ["--popsize", "4", "--capacity", "16", "--slots", "own", "--threshold", "-1e9"]
    bench.main([str(finished), *options])
    out = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    slots = [[int(line[0]), *map(int, line[-2:])] for line in lines[2:]]
    assert slots == [[64, 64, 32], [128, 128, 32]]
    for said in ("BAM", "eviction", "8 candidates x 1", "diagonal", "full:", "GFLOP/s", "products"):
        assert said in out
    assert files(finished) == before


# --- same ----------------------------------------------------------------------------------------

def test_a_last_bit_is_a_difference(finished, tmp_path):
    """Two copies of a run, then one change each. Catches: a tolerance, a part that is not compared,
    an older name of a method that is taken for another method."""
    def found(change):
        """{what: number of differences}, after change(state of gpt.pt, of namm.pt, results)."""
        other = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(finished, other)
        states = [torch.load(other / name, weights_only=True) for name in ("gpt.pt", "namm.pt")]
        result = json.loads((other / "results.json").read_text())
        change(*states, result)
        for name, state in zip(("gpt.pt", "namm.pt"), states):
            torch.save(state, other / name)
        (other / "results.json").write_text(json.dumps(result))
        return {what: len(differ) for what, (differ, _) in same.compare(finished, other).items()}

    def older(gpt, vector, result):
        for row in result["report"]:
            row["method"] = row["method"].replace("recent_attention", "attended")

    def weight(gpt, vector, result):
        own = gpt["model"]["norm.weight"]
        own[0] = torch.nextafter(own[0], torch.tensor(9.0))

    def place(gpt, vector, result):
        vector["zero"] = np.nextafter(vector["zero"], 9.0).item()

    def score(gpt, vector, result):
        result["report"][3]["logprob"] += 1e-15

    nothing = {"gpt.pt": 0, "namm.pt": 0, "scores": 0}
    assert found(older) == nothing
    assert found(weight) == nothing | {"gpt.pt": 1}
    assert found(place) == nothing | {"namm.pt": 1}
    assert found(score) == nothing | {"scores": 1}


PROGRAM = """# {comment}
import shutil, sys
shutil.copytree("made", sys.argv[sys.argv.index("--out") + 1])
"""


def test_revisions_are_taken_out_of_git(tmp_path, monkeypatch, capsys):
    """Three revisions of a program that copies a vector, which changes in the third. Catches: the
    working tree instead of a revision, one revision compared with itself, an exit code that tells
    nothing."""
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path,
                       check=True, capture_output=True)

    git("init")
    made = tmp_path / "made"
    made.mkdir()
    torch.save({"model": {"w": torch.ones(2)}}, made / "gpt.pt")
    row = {"method": "full", "task": "lm", "length": 1, "score": 1, "logprob": 0, "cache": 1}
    (made / "results.json").write_text(json.dumps({"report": [row]}))
    for comment, number in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / "evolve.py").write_text(PROGRAM.format(comment=comment))
        torch.save({"params": torch.ones(2) * number, "cost": 0}, made / "namm.pt")
        git("add", ".")
        git("commit", "-m", "x")
    (tmp_path / "evolve.py").write_text("broken")  # not committed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(same, "RUNS", {"once": []})
    for line, code in ((["HEAD~2", "HEAD~1"], 0), (["HEAD~1"], 1)):
        with pytest.raises(SystemExit) as end:
            same.main(line)
        assert end.value.code == code
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in said] == ["gpt.pt", "namm.pt", "scores"]
        assert [("the same" in line) for line in said] == [True, code == 0, True]


# --- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("name, main, line, says", [
    ("bench", bench.main, [], "usage: python -m extras.bench RUN"),
    ("probes", probes.main, ["--rows", "2"], "usage: python -m extras.probes RUN"),
    ("rules", rules.main, ["/nowhere"], "/nowhere: the folder holds no run"),
    ("same", same.main, [], "usage: python -m extras.same"),
    ("same", same.main, ["nosuch"], "git archive nosuch"),
    ("ablations", ablations.main, ["/nowhere", "--out", "x"], "give one of --scorer"),
    ("ablations", ablations.main, ["x", "--out", "x", "--scorer", "mlp", "--features", "age"],
     "give one of --scorer")])
def test_bad_input_ends_in_a_line(name, main, line, says, monkeypatch, capsys):
    """Catches: a traceback, an exit code of success, a line without what to do."""
    monkeypatch.setattr(sys, "argv", [name, *line])
    with pytest.raises(SystemExit) as end:
        runs.command(f"extras.{name}", main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"extras.{name}: ") and says in error
    assert error.count("\n") == 1


# --- the committed results -----------------------------------------------------------------------

def test_the_tables_are_what_the_results_say(tmp_path):
    """Each line of each table that the summary prints of the committed results, but for how long it
    took and every task of the longest prompts, stands in README or in results/README; the pictures
    are those it draws. Catches: figures that were typed, or that nobody renewed."""
    written = pathlib.Path("README.md").read_text() + pathlib.Path("results/README.md").read_text()
    shutil.copytree("results", tmp_path / "results")  # pictures are drawn beside the first
    paths = sorted((tmp_path / "results").glob("[012].json"))
    text = summary.summary([*paths, *sorted((tmp_path / "results").glob("changes/*.json"))])
    left_out = "Seconds|2048 tokens|4096 tokens"
    text = re.sub(rf"### ({left_out}).*?\n\n.*?\n\n", "", text, flags=re.S)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) > 40 and not [line for line in lines if line not in written]
    for path in (tmp_path / "results").glob("*.svg"):
        assert path.read_text() == pathlib.Path("results", path.name).read_text()
