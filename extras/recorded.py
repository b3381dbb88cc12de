"""One decision for all heads of a real transformer, fitted and evolved on contexts read once.

  1. Votes            a manager: each token has one score, of the attention of every head
  2. record           contexts, read with the full cache: keys, values, features
  3. replay, graded   what a vector keeps of a recorded context; the answers to its questions
  4. by_age, fit      where evolution may begin
  5. search           evolution

In a real transformer few heads look facts up, and most attention says nothing of what will be asked
for. namm.py judges each head by its own attention and does not know which head it is. Here each
slot is judged by a weight for each head and frequency, and all heads keep the same tokens. Such a
vector serves one transformer, and cannot be carried to another.

Reading is dear, so contexts are read once, with the full cache: a candidate scores their features,
block by block, and only the questions run through the transformer, over the keys and values that
stayed. What was evicted stays evicted; but later keys, and attention, are those of a reader who had
seen it. So this serves to evolve by, and not to report: for that see smollm2.py.

Letters as in namm.py; N contexts of n tokens, H heads: KV heads of all layers, the lowest first.
"""

import dataclasses
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import evolve
import model
import namm

DELAY = 64  # tokens of a block
SHARES = (0.5, 0.25)  # of the context, that a head may keep
BINS = [0, namm.F // 2, namm.F, namm.F + namm.F // 2]  # of both memories: the lowest, a middle one
FIRST, NEWEST = 4, 32  # tokens that always stay


# --- 1. The manager -------------------------------------------------------------------------------

def by_head(x, layers):
    """Slots of all layers side by side, (B,K,layers S,...), as (B,H,S,...)."""
    return x.unflatten(2, (layers, -1)).transpose(1, 2).flatten(1, 2)


def voted(cache, attention):
    """Features of each slot after a block, whose slots are the same in all heads: logarithms of
    four numbers of each head's spectrum, (B,S,4H)."""
    spectra = namm.spectra(cache, attention, True, namm.MEMORIES["both"])  # (B,K,layers S,2F)
    x = by_head(spectra[..., BINS], len(cache))  # (B,H,S,4)
    return (x + 3e-4).log().transpose(1, 2).flatten(2)


def scored(x, age, params, mean, std):
    """Scores (B,S) of features x (B,S,4H) and age (B,S) by P vectors (P,8+4H), candidate-major;
    mean and std (4H,). The first tokens of a text and the newest are above all others."""
    none = x.new_zeros(*age.shape, namm.F)
    turns = namm.features(none, age, none[0, 0], none[0, 0])[..., :namm.N_AGE]  # (B,S,8)
    x = torch.cat([turns, (x - mean) / std], dim=2)
    scores = x.reshape(len(params), -1, x.shape[2]) @ params[:, :, None]
    scores, first = scores.view(age.shape), age > age.max() - FIRST
    return scores.masked_fill(first | (age < NEWEST), math.inf)


def votes(params, mean, std, capacity):
    """A manager as `namm.namm` is one, which keeps `capacity` slots, the same in all heads."""
    def manage(cache, attention):
        """Judge all slots after a block."""
        age = cache[0].seen - 1 - cache[0].positions[:, 0]  # (B,S)
        scores = scored(voted(cache, attention), age, params, mean, std)
        scores = scores[:, None].expand(-1, attention[0].shape[1], -1)
        scores = torch.cat([scores] * len(cache), dim=2)  # (B,K,S of all layers)
        return namm.stays(cache, scores, -math.inf, [capacity] * len(cache))
    return manage


# --- 2. Contexts, read once -----------------------------------------------------------------------

@dataclasses.dataclass
class Record:
    """What is left of N contexts that were read with the full cache."""
    batch: data.Batch
    keys: torch.Tensor  # (N,H,n,D)
    values: torch.Tensor  # (N,H,n,D)
    features: list  # after each block, of all S slots so far, (N,S,4H)


@torch.no_grad()
def record(gpt, batch, at_once=4):
    """Read contexts with the full cache: a Record."""
    pieces = []
    for tokens in batch.tokens[:, :batch.context].split(at_once):
        cache, seen = gpt.new_cache(len(tokens)), []

        def note(cache, attention):
            """Keep the features, and every slot."""
            seen.append(voted(cache, attention))
            return None, [layer.alive for layer in cache]

        model.read(gpt, tokens, cache, DELAY, note)
        pieces.append((torch.cat([layer.keys for layer in cache], dim=1),
                       torch.cat([layer.values for layer in cache], dim=1), *seen))
    keys, values, *seen = (torch.cat(own) for own in zip(*pieces))
    return Record(batch, keys, values, seen)


def statistics(made):
    """Mean and standard deviation of each feature, (4H,)."""
    rows = torch.cat([x.flatten(0, 1) for x in made.features])
    return rows.mean(0), rows.std(0)


# --- 3. What a vector keeps, and what it answers --------------------------------------------------

def replay(made, which, params, mean, std, capacity):
    """Positions that P candidates (P,8+4H) keep of the recorded contexts `which` (N,), oldest
    first: (P N,S), candidate-major. After each block as many stay as `votes` would keep by these
    features."""
    rows = len(params) * len(which)
    kept = torch.zeros(rows, 0, dtype=torch.long)
    for x in made.features:
        seen, S = x.shape[1], kept.shape[1]
        new = torch.arange(seen - DELAY, seen).expand(rows, -1)
        kept = torch.cat([kept, new], dim=1)
        if seen <= capacity:
            continue
        x = x[which].repeat(len(params), 1, 1)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        scores = scored(x, seen - 1 - kept, params, mean, std)
        kept = kept[namm.best(scores, capacity)].view(rows, capacity)
    return kept


def refilled(gpt, made, which, kept):
    """A cache for the GPT with the recorded keys and values at the positions `kept` (P N,S)."""
    cache, K, D = gpt.new_cache(len(kept)), gpt.config.n_kv_head, made.keys.shape[3]
    at = kept[:, None].expand(-1, K, -1)  # (P N,K,S)
    for i, layer in enumerate(cache):
        layer.positions, layer.alive = at, torch.ones_like(at, dtype=torch.bool)
        own = slice(i * K, i * K + K)
        layer.keys, layer.values = (
            x[which, own].repeat(len(kept) // len(which), 1, 1, 1)
            .gather(2, at[..., None].expand(-1, -1, -1, D)) for x in (made.keys, made.values))
        layer.seen = made.batch.context
    return cache


@torch.no_grad()
def graded(gpt, batch, cache):
    """Ask over a cache of B = copies x N rows. All answers are one token. -> (2,B): the share of
    answers that are the arg-max, and the mean likelihood of an answer."""
    copies = len(cache[0].alive) // len(batch.tokens)
    tokens = batch.tokens[:, batch.context:].repeat(copies, 1)
    answer = batch.answer[:, batch.context:].repeat(copies, 1) > 0
    row, at = answer.nonzero(as_tuple=True)  # (M,)
    hidden, _ = gpt.hidden(tokens[:, :-1], cache)
    logits = gpt.output(hidden[row, at - 1]).float()  # (M,V)
    likelihood = logits.softmax(-1).gather(1, tokens[row, at][:, None])[:, 0]
    right = (logits.argmax(-1) == tokens[row, at]).float()
    total = torch.zeros(2, len(tokens)).index_add(1, row, torch.stack([right, likelihood]))
    return total / answer.sum(1)


def pick(batch, which):
    """Some prompts of a batch."""
    tasks = [batch.tasks[i] for i in which]
    return dataclasses.replace(batch.each(lambda x: x[which]), tasks=tasks)


def answers(gpt, made, which, params, mean, std, capacity, at_once=24):
    """Of P candidates on N recorded contexts: exact and likelihood, (2,P,N)."""
    done = []
    for own in which.split(max(1, at_once // len(params))):
        kept = replay(made, own, params, mean, std, capacity)
        got = graded(gpt, pick(made.batch, own), refilled(gpt, made, own, kept))
        done.append(got.view(2, len(params), -1))
    return torch.cat(done, dim=2)


# --- 4. Where evolution may begin -----------------------------------------------------------------

def asked_for(batch):
    """(N,n) 1 for the tokens of a context that a line with an answer to come is made of: six before
    the answer, the answer and the one after."""
    mark = torch.zeros(len(batch.tokens), batch.context)
    for row, tokens, answer in zip(mark, batch.tokens.numpy(), batch.answer.numpy()):
        places = torch.from_numpy(data.fact_positions(tokens, answer, batch.context))
        for shift in range(-6, 2):
            row[(places + shift).clamp(0, batch.context - 1)] = 1
    return mark


def by_age(size):
    """A vector (1,8+size) by which the newer stays: its weights are for the sine and the cosine of
    the age that turn by half in 700 tokens."""
    vector = torch.zeros(1, namm.N_AGE + size)
    vector[0, [2, 6]] = torch.tensor([-1.5, 1.5])
    return vector


def fit(made, mean, std, steps=400):
    """A vector (1,8+4H) by logistic regression: is a token, neither among the first nor the newest,
    in a line that will be asked for? Its weights for age prefer the newer, slightly."""
    marks, rows, truth = asked_for(made.batch), [], []
    for x in made.features:
        own = slice(FIRST, x.shape[1] - NEWEST)
        rows.append(((x[:, own] - mean) / std).flatten(0, 1))
        truth.append(marks[:, :x.shape[1]][:, own].flatten())
    rows, truth = torch.cat(rows), torch.cat(truth)
    weights = torch.zeros(rows.shape[1] + 1, requires_grad=True)  # the last is the bias
    adam = torch.optim.Adam([weights], lr=0.03)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(rows @ weights[:-1] + weights[-1], truth)
        adam.zero_grad()
        (loss + 1e-3 * weights.square().sum()).backward()
        adam.step()
    return torch.cat([0.4 * by_age(0)[0], weights.detach()[:-1]])[None]


# --- 5. Evolution ---------------------------------------------------------------------------------

def fitness(gpt, made, params, mean, std, rng=None, drawn=0):
    """(P,) mean likelihood of the answers on `drawn` recorded contexts of each task and share, the
    same for all candidates; without rng on all contexts."""
    tasks, total = len(set(made.batch.tasks)), 0.0
    each, which = len(made.batch.tasks) // tasks, torch.arange(len(made.batch.tasks))
    for share in SHARES:
        if rng:
            which = torch.cat([torch.from_numpy(rng.choice(each, drawn, replace=False)) + each * t
                               for t in range(tasks)])
        capacity = round(share * made.batch.context)
        total = total + answers(gpt, made, which, params, mean, std, capacity)[1].mean(1)
    return total / len(SHARES)


def search(gpt, made, choose, begin, mean, std, settings, state, keep):
    """Evolve from a vector `begin` (1,8+4H): (the chosen vector, history). As evolve.evolve: of
    averages of means the one that does best on the contexts to choose by. settings {seed,
    generations, popsize, sigma, drawn}; `state` and keep(state): where it stopped."""
    seed, last = settings["seed"], settings["generations"]
    es = evolve.CMAES(begin[0], settings["sigma"], settings["popsize"], seed, diagonal=True)
    state = state or {"es": es.state_dict(), "average": es.mean, "chosen": es.mean,
                      "highest": -math.inf, "history": []}
    es.load_state_dict(state["es"])
    for g in range(len(state["history"]), last + 1):
        began, point = time.time(), {"generation": g, "sigma": es.sigma}
        if g:
            rng = np.random.default_rng([seed, 2, g])
            got = fitness(gpt, made, es.ask().float(), mean, std, rng, settings["drawn"])
            es.tell(got)
            state["average"] = state["average"] + (es.mean - state["average"]) / min(g, 10)
            point |= {"candidates": got.mean().item(), "best": got.max().item()}
        if g % 5 == 0 or g == last:
            value = fitness(gpt, choose, state["average"][None].float(), mean, std).item()
            point["mean"] = value
            if value > state["highest"]:
                state |= {"highest": value, "chosen": state["average"]}
        state |= {"history": [*state["history"], point | {"seconds": time.time() - began}],
                  "es": es.state_dict()}
        print(json.dumps(state["history"][-1]), flush=True)
        keep(state)
    return state["chosen"][None].float(), state["history"]
