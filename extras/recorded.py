"""Evolution of a NAMM atop a real transformer, whose reading is dear: contexts are read once.

  1. Record, record   contexts, read with the full cache: keys, values, features
  2. replay, graded   what a vector keeps of a recorded context; the answers to its questions
  3. search           evolution on recorded contexts

A candidate scores the features of a full cache, block by block, and only the questions run through
the transformer, over the keys and values that stayed. What was evicted stays evicted; but the later
keys, and their attention, are those of a reader who had seen it. So this serves to evolve by, and
not to report: for that see smollm2.py.

Letters as in namm.py; N contexts of n tokens, H heads: KV heads of all layers, the lowest first.
"""

import dataclasses
import json
import math
import time

import numpy as np
import torch

import data
import evolve
import model
import namm
from model import KVCache

DELAY = 64  # tokens of a block
SHARES = (0.5, 0.25)  # of the context, that a head may keep
N_IN = namm.N_AGE + 2 * namm.F  # features: age, the spectrum of a block's memory, of the slow one
SCALE = namm.scale(namm.shapes(N_IN))  # (6943,)


# --- 1. Contexts, read once -----------------------------------------------------------------------

@dataclasses.dataclass
class Record:
    """What is left of N contexts that were read with the full cache."""
    batch: data.Batch
    keys: torch.Tensor  # (N,H,n,D)
    values: torch.Tensor  # (N,H,n,D)
    features: list  # after each block, of all S slots so far, (N,H,S,42); at first only spectra


def by_head(x, layers):
    """Slots of all layers side by side, (N,K,layers S,...), as (N,H,S,...)."""
    return x.unflatten(2, (layers, -1)).transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def record(gpt, batch, at_once=8):
    """Read contexts with the full cache: a Record, whose features are the spectra, (N,H,S,34)."""
    pieces = []
    for tokens in batch.tokens[:, :batch.context].split(at_once):
        cache, seen = gpt.new_cache(len(tokens)), []

        def note(cache, attention):
            """Keep the spectra, and every slot."""
            spectra = namm.spectra(cache, attention, True, namm.MEMORIES["both"])
            seen.append(by_head(spectra, len(cache)))
            return None, [layer.alive for layer in cache]

        model.read(gpt, tokens, cache, DELAY, note)
        pieces.append((torch.cat([layer.keys for layer in cache], dim=1),
                       torch.cat([layer.values for layer in cache], dim=1), *seen))
    keys, values, *seen = (torch.cat(own) for own in zip(*pieces))
    return Record(batch, keys, values, seen)


def mean_std(made):
    """Mean and standard deviation of each bin over contexts, heads, slots and blocks, (34,)."""
    totals = torch.zeros(3, made.features[0].shape[-1], dtype=torch.float64)
    for x in made.features:
        x = x.flatten(0, 2).double()
        totals += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])
    return namm.mean_std(totals)


def middle(made):
    """Median of each bin, and ten times the median distance from it, (34,): statistics that are not
    decided by the few slots with most of the attention."""
    rows = torch.cat([x.flatten(0, 2)[::97] for x in made.features])
    median = rows.median(0).values
    return median, 10 * (rows - median).abs().median(0).values


def normalise(made, mean, std):
    """Make the spectra of a record features: (N,H,S,34) -> (N,H,S,42) of each block."""
    for i, x in enumerate(made.features):
        S = x.shape[2]
        age = torch.arange(S - 1, -1, -1).expand(x.shape[:3])
        made.features[i] = namm.features(x, age, mean, std)


# --- 2. What a vector keeps, and what it answers --------------------------------------------------

def scored(x, params):
    """Scores (B,H,S) of features (B,H,S,42) by P candidates: whole vectors (P,6943), or weights of
    the features alone, (P,42)."""
    if params.shape[1] == N_IN:
        rows = x.reshape(len(params), -1, N_IN)
        return (rows @ params[:, :, None]).view(x.shape[:3])
    return namm.bam_scores(x, params, [x.shape[2]])


def linear(params):
    """(P,42) weights of the features alone, as whole vectors (P,6943): the backward attention gives
    nothing, so a slot's score is its features times the weights."""
    whole = torch.zeros(len(params), len(SCALE))
    whole[:, -1 - N_IN:-1] = params
    return whole


def replay(made, which, params, capacity, pool=False):
    """What P candidates (P,n) keep of the recorded contexts `which` (N,): one cache of all H heads,
    with P x N rows, candidate-major, and no keys. After each block as many slots stay as `namm`
    would keep by these features."""
    rows = len(params) * len(which)
    cache = KVCache(torch.zeros(rows, made.keys.shape[1], 0, 0))
    for x in made.features:
        new = torch.zeros(rows, made.keys.shape[1], x.shape[2] - cache.seen, 0)
        cache.append(new, new)
        if cache.seen <= capacity:
            continue
        x = taken(x[which].repeat(len(params), 1, 1, 1), cache.positions)
        scores = scored(x, params)
        _, [keep] = namm.stays([cache], scores, -math.inf, [capacity], pool)
        cache.evict(keep)
    return cache


def taken(x, positions):
    """Of x (B,H,n,D) the slots at some positions (B,H,S): (B,H,S,D)."""
    return x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[3]))


def refilled(gpt, made, which, kept):
    """A cache for the GPT with the recorded keys and values at what `replay` kept."""
    cache, copies = gpt.new_cache(len(kept.alive)), len(kept.alive) // len(which)
    K = gpt.config.n_kv_head
    for i, layer in enumerate(cache):
        own = slice(i * K, i * K + K)
        layer.positions, layer.alive = kept.positions[:, own], kept.alive[:, own]
        layer.keys, layer.values = (taken(x[which, own].repeat(copies, 1, 1, 1), layer.positions)
                                    for x in (made.keys, made.values))
        layer.seen, layer.ragged = kept.seen, kept.ragged
    return cache


@torch.no_grad()
def graded(gpt, batch, cache):
    """Ask over a cache of B = copies x N rows. All answers are one token. -> (B,) each: the share
    of answers that are the arg-max, and the mean likelihood of an answer."""
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


def answers(gpt, made, which, params, capacity, pool=False, at_once=16):
    """Of P candidates on N recorded contexts: exact and likelihood, (2,P,N)."""
    done = []
    for own in which.split(max(1, at_once // len(params))):
        kept = replay(made, own, params, capacity, pool)
        got = graded(gpt, pick(made.batch, own), refilled(gpt, made, own, kept))
        done.append(got.view(2, len(params), -1))
    return torch.cat(done, dim=2)


# --- 3. Evolution on recorded contexts ------------------------------------------------------------

# of a stage: is it the linear score that evolves; generations; candidates; first step size;
# recorded contexts of each task, for each share, in a generation
STAGES = {"linear": (True, 20, 14, 0.2, 3), "whole": (False, 90, 12, 0.3, 2)}


def start():
    """Where evolution begins, (1,42): what is new stays, and what received most attention. The
    sine and cosine of the age are those that turn by less than half in 512 tokens."""
    params = torch.zeros(1, N_IN)
    params[0, [2, 6]] = torch.tensor([-5.0, 5.0])
    params[0, namm.N_AGE + namm.F] = 2.0  # the slow spectrum's lowest frequency
    return params


def fitness(gpt, made, params, rng=None, drawn=0):
    """(P,) mean likelihood of the answers on `drawn` recorded contexts of each task and share, the
    same for all candidates; without rng on all contexts."""
    tasks, total = len(set(made.batch.tasks)), 0.0
    each = len(made.batch.tasks) // tasks
    for share in SHARES:
        which = torch.arange(len(made.batch.tasks))
        if rng:
            some = np.concatenate([rng.choice(each, drawn, replace=False) + each * t
                                   for t in range(tasks)])
            which = torch.from_numpy(some)
        capacity = round(share * made.batch.context)
        total = total + answers(gpt, made, which, params, capacity)[1].mean(1)
    return total / len(SHARES)


def search(gpt, made, choose, seed, stage, begin, state, keep):
    """Evolve from a vector `begin`: (the chosen vector (1,n), history). As
    evolve.evolve: of averages of means the one that does best on the contexts to choose by. `state`
    and keep(state): where it stopped."""
    simple, generations, popsize, sigma, drawn = STAGES[stage]
    first = begin[0] if simple else linear(begin)[0] / SCALE
    es = evolve.CMAES(first, sigma, popsize, seed, diagonal=not simple)

    def whole(params):
        """Vectors of what evolves, (n,) or (P,n)."""
        params = torch.atleast_2d(params).float()
        return params if simple else params * SCALE

    state = state or {"es": es.state_dict(), "average": es.mean, "chosen": es.mean,
                      "highest": -math.inf, "history": []}
    es.load_state_dict(state["es"])
    for g in range(len(state["history"]), generations + 1):
        began, point = time.time(), {"generation": g, "sigma": es.sigma}
        if g:
            rng = np.random.default_rng([seed, 2, g])
            got = fitness(gpt, made, whole(es.ask()), rng, drawn)
            es.tell(got)
            state["average"] = state["average"] + (es.mean - state["average"]) / min(g, 10)
            point |= {"candidates": got.mean().item(), "best": got.max().item()}
        if g % 10 == 0:
            value = fitness(gpt, choose, whole(state["average"])).item()
            point["mean"] = value
            if value > state["highest"]:
                state |= {"highest": value, "chosen": state["average"]}
        state |= {"history": [*state["history"], point | {"seconds": time.time() - began}],
                  "es": es.state_dict()}
        print(stage, json.dumps(state["history"][-1]), flush=True)
        keep(state)
    return whole(state["chosen"]), state["history"]
