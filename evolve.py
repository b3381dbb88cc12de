"""python evolve.py: train a small GPT, evolve the network that manages its cache, and report.

  1. CMAES     the evolution strategy: Hansen's tutorial (arXiv 1604.00772), equation by equation
  2. evaluate  prompts through the cache, the questions afterwards, and the scores
  3. evolve    the loop: candidates, prompts, fitness, validation
  4. report    every method on every task and length; the curve; one example for people
  5. Config    every setting, with its help; presets; the command line
  6. main      what a run keeps in its folder, and what happens when
"""

import argparse
import copy
import inspect
import io
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import namm
from model import GPT, GPTConfig, evict, read, summed, train, world

try:
    import fcntl
except ImportError:  # Windows: nothing locks a run's folder there
    fcntl = None


# --- 1. CMA-ES -----------------------------------------------------------------------------------

class CMAES:
    """Covariance matrix adaptation evolution strategy, maximising. Names and equation numbers of
    the tutorial.

    mean (n,), sigma: where to start and how far to step. diagonal: only the variances are adapted
    (sep-CMA, Ros and Hansen 2008), with rates (n + 2) / 3 times as fast: at n = 4172 the full
    matrix hardly moves within a run. Use: candidates = ask(); tell(fitness); again. The best
    estimate is `mean`. All randomness comes from (seed, generation)."""

    def __init__(self, mean, sigma, popsize=None, seed=0, diagonal=False):
        self.mean = torch.as_tensor(mean, dtype=torch.float64).clone()
        self.sigma, self.seed, self.diagonal, self.generation = float(sigma), seed, diagonal, 0
        n = len(self.mean)
        lam = self.popsize = popsize or 4 + int(3 * math.log(n))                            # (48)
        mu = self.mu = lam // 2
        w = math.log((lam + 1) / 2) - torch.arange(1, lam + 1, dtype=torch.float64).log()   # (49)
        mu_eff = self.mu_eff = (w[:mu].sum() ** 2 / w[:mu].square().sum()).item()
        mu_eff_minus = (w[mu:].sum() ** 2 / w[mu:].square().sum()).item()
        # how fast the step size and the covariance follow
        self.c_sigma = (mu_eff + 2) / (n + mu_eff + 5)                                      # (55)
        self.d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        self.c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)                              # (56)
        faster = (n + 2) / 3 if diagonal else 1
        self.c_1 = faster * 2 / ((n + 1.3) ** 2 + mu_eff)                                   # (57)
        c_mu = faster * 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff)
        self.c_mu = min(1 - self.c_1, c_mu)                                                 # (58)
        # recombination weights: the better half positive, the worse half negative (active CMA)
        negative = min(1 + self.c_1 / self.c_mu,                                            # (50)
                       1 + 2 * mu_eff_minus / (mu_eff + 2),                                 # (51)
                       (1 - self.c_1 - self.c_mu) / (n * self.c_mu))                        # (52)
        self.weights = torch.where(w >= 0, w / w[w > 0].sum(),
                                   negative * w / -w[w < 0].sum())                          # (53)
        self.chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # E|N(0, I)|
        # an eigendecomposition costs n^3 and C changes slowly: renew it only when C has moved
        self.lazy_gap = max(1, int(0.5 / (n * (self.c_1 + self.c_mu))))
        self.p_sigma, self.p_c = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self.C = (torch.ones if diagonal else torch.eye)(n, dtype=torch.float64)
        self.B, self.D = None, torch.ones(n, dtype=torch.float64)  # C = B D^2 B^T; B None: identity

    def ask(self):
        """(popsize, n) candidates, x = mean + sigma B D z."""
        rng = np.random.default_rng([self.seed, self.generation])
        self.z = torch.from_numpy(rng.standard_normal((self.popsize, len(self.mean))))      # (38)
        y = self.z * self.D
        self.y = y if self.B is None else y @ self.B.T                                      # (39)
        return self.mean + self.sigma * self.y                                              # (40)

    def tell(self, fitness):
        """Fitness of the candidates of the last ask(), higher is better; what is not finite is
        worst."""
        n, w = len(self.mean), self.weights
        fitness = torch.as_tensor(fitness, dtype=torch.float64).nan_to_num(-math.inf, -math.inf)
        order = fitness.argsort(descending=True, stable=True)
        y, z = self.y[order], self.z[order]
        # the mean moves to the weighted best
        y_w, z_w = w[:self.mu] @ y[:self.mu], w[:self.mu] @ z[:self.mu]                     # (41)
        self.mean = self.mean + self.sigma * y_w                                            # (42)
        # step size: longer when successive steps agree. C^(-1/2) y_w = B z_w
        step = z_w if self.B is None else self.B @ z_w
        self.p_sigma = ((1 - self.c_sigma) * self.p_sigma
                        + math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mu_eff) * step)  # (43)
        norm = self.p_sigma.norm().item()
        self.sigma *= math.exp(self.c_sigma / self.d_sigma * (norm / self.chi_n - 1))       # (44)
        # covariance: one rank from the path of the mean, the others from this generation
        expected = math.sqrt(1 - (1 - self.c_sigma) ** (2 * (self.generation + 1)))
        h_sigma = float(norm / expected < (1.4 + 2 / (n + 1)) * self.chi_n)  # 0: the path is long
        self.p_c = ((1 - self.c_c) * self.p_c
                    + h_sigma * math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff) * y_w)   # (45)
        w = torch.where(w >= 0, w, w * n / z.square().sum(1))                               # (46)
        delta = (1 - h_sigma) * self.c_c * (2 - self.c_c)
        decay = 1 + self.c_1 * delta - self.c_1 - self.c_mu * self.weights.sum().item()
        rows = torch.cat([self.p_c[None], y])  # (1+popsize,n)
        gain = torch.cat([torch.tensor([self.c_1], dtype=torch.float64), self.c_mu * w])
        self.generation += 1
        if self.diagonal:
            self.C = decay * self.C + gain @ rows.square()                                  # (47)
            self.D = self.C.sqrt()
            return
        self.C.addmm_((gain[:, None] * rows).T, rows, beta=decay)                           # (47)
        if self.generation % self.lazy_gap == 0:
            self.C = (self.C + self.C.T) / 2
            variance, self.B = torch.linalg.eigh(self.C)
            self.D = variance.clamp(min=1e-20).sqrt()

    def state_dict(self):
        """All that changes, as tensors and numbers."""
        names = ("mean", "sigma", "generation", "p_sigma", "p_c", "C", "B", "D")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def load_state_dict(self, state):
        """Go on from state_dict() of a CMAES made with the same arguments."""
        vars(self).update(copy.deepcopy(state))


# --- 2. Prompts through the cache ----------------------------------------------------------------

@dataclass
class Solution:
    """What evolution finds, and namm.pt holds. (A subclass may have another method to evolve.)"""
    params: torch.Tensor  # (4172,), or (P,4172)
    mean: torch.Tensor  # (F,) of the spectra over the full cache: collected once, then frozen
    std: torch.Tensor  # (F,)
    zero: float = 0.0  # the threshold without a capacity: see `calibrate_threshold`
    cost: dict = None  # what evolution took, and its history
    method = staticmethod(namm.namm)
    statistics = staticmethod(namm.statistics)

    @staticmethod
    def steps(memory):
        """The unit of each parameter's steps, (4172,): a sigma of 1."""
        return namm.scale(namm.shapes(namm.N_AGE + len(namm.MEMORIES[memory]) * namm.F))


def manager(solution, config, **changes):
    """NAMM as the settings say, with changes of theirs."""
    c = replace(config, **changes)
    params, mean, std = (x.to(c.device) for x in (solution.params, solution.mean, solution.std))
    threshold = c.threshold + (0.0 if c.capacity else solution.zero)
    return solution.method(torch.atleast_2d(params), mean, std, threshold, c.capacity,
                           c.slots == "shared", c.frames == "opened", c.squash == "asinh",
                           namm.MEMORIES[c.memory])


def precision(device):
    """The one place that decides it: bfloat16 for matrix products on a GPU, float32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


@torch.no_grad()
def answer_logits(gpt, batch, config, manage=None, copies=1):
    """Read the contexts, then the questions with their true answers, in B = copies x prompts rows:
    one copy for each candidate of the manager. Of the M answer tokens: row, place after the context
    (M,), logits there (M,V), and the token itself (M,); and the share of the cache kept, (B,)."""
    n, tokens, answer = batch.context, batch.inputs(), batch.answer
    with precision(config.device):
        cache = gpt.new_cache(len(tokens), config.positions == "renumbered")
        if copies > 1:  # the first block is the same for all candidates
            _, attention = gpt.hidden(tokens[:, :config.delay], cache, "attention")
            for layer in cache:
                layer.repeat(copies)
            tokens, answer = torch.cat([tokens] * copies), answer.repeat(copies, 1)
            evict(cache, [own.repeat(copies, 1, 1, 1) for own in attention], manage)
        if cache[0].seen < n:
            read(gpt, tokens[:, cache[0].seen:n], cache, config.delay if manage else n, manage)
        kept = model.kept(cache)  # (B,)
        row, at = answer[:, n:].nonzero(as_tuple=True)  # (M,)
        hidden, _ = gpt.hidden(tokens[:, n:-1], cache)  # (B,Q-1,C)
        logits = gpt.output(hidden[row, at - 1]).float()
    return row, at, logits, batch.tokens[row % len(batch.tokens), n + at], kept


def evaluate(gpt, batch, config, manage=None, copies=1):
    """Read contexts with the cache managed, then ask: four (B,), means over a prompt's answers:

      exact       1 if every token is the arg-max, so that greedy decoding would write the answer
      likelihood  of an answer's token: exp of the mean log-probability of its tokens
      logprob     that mean itself, natural logarithm
      cache       share of the context's tokens that is cached when the questions come, of all heads

    At most config.rows of the B = copies x prompts rows are read at once; without a manager, as
    many prompts as hold config.rows x config.length tokens."""
    N, L = batch.tokens.shape
    rows = copies if manage else max(1, L // config.length)  # that a prompt costs
    at_once = max(1, config.rows // rows)  # prompts
    if N > at_once:
        done = []
        for some in torch.arange(N).split(at_once):
            got = evaluate(gpt, batch.each(lambda x: x[some]), config, manage, copies)
            done.append([x.unflatten(0, (copies, -1)) for x in got])  # (copies,prompts) each
        return [torch.cat(pieces, dim=1).flatten(0, 1) for pieces in zip(*done)]
    row, at, logits, target, kept = answer_logits(gpt, batch, config, manage, copies)
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]  # (M,)
    wrong = (logits.argmax(-1) != target).float()
    B, A = len(kept), int(batch.answer.max()) + 1
    which = row * A + batch.answer[row % N, batch.context + at]  # (M,) answer of each token

    def total(x):
        """Sums over the tokens of each answer: (M,) -> (B,A-1)."""
        return torch.zeros(B * A, device=x.device).index_add(0, which, x).view(B, A)[:, 1:]

    size, wrong = total(torch.ones_like(wrong)), total(wrong)
    asked, logprob = (size > 0).float(), total(logprob) / size.clamp(min=1)
    means = [(x * asked).sum(1) / asked.sum(1) for x in (wrong == 0, logprob.exp(), logprob)]
    return *means, kept


def prompts(part, task, count, rng, length, device):
    """`count` prompts of one task, on the device."""
    return data.prompts(part, [task] * count, rng, length).each(lambda x: x.to(device))


# --- 3. Evolution --------------------------------------------------------------------------------

def evolve_prompts(part, config, seed, count, times):
    """[Batch]: `count` prompts of each task to evolve on, at each of these training lengths."""
    rng = np.random.default_rng([config.seed, seed])
    return [prompts(part, task, count, rng, config.length * n, config.device)
            for task in config.evolve_on.split(",") for n in times]


def feature_statistics(gpt, batches, config, kind=Solution):
    """Mean and standard deviation of the spectra over the full cache, (F,) each."""
    memories = namm.MEMORIES[config.memory]
    totals = torch.zeros(3, len(memories) * namm.F, dtype=torch.float64, device=config.device)
    for batch in batches:
        evaluate(gpt, batch, config, kind.statistics(totals, config.frames == "opened", memories))
    return namm.mean_std(totals.cpu())


def fitness(gpt, solution, best, batches, config):
    """Fitness of the candidates solution.params (P,n) or (n,), or of the full cache for solution
    None: (P,); and the mean share of the cache kept. All read the same batches, each of one task.
    Fitness is the likelihood of an answer over `best` {task: the full cache's at the training
    length}, mean over the batches. It has no ties, as exact match has; and the paper's divisor
    (config.fitness "score"), the full cache's score on the same prompts, is near 0 where it is to
    be beaten. Candidates are dealt to the processes in turn; each process gets all the results."""
    params = torch.atleast_2d(solution.params) if solution else [None]
    P, (rank, size) = len(params), world()
    total = torch.zeros(2, P, device=config.device)  # fitness, cache kept
    for number, batch in enumerate(batches):
        count, divisor = len(batch.tasks), best[batch.tasks[0]]
        if config.fitness == "score":
            divisor = max(evaluate(gpt, batch, config)[0].mean().item(), 0.01)
        mine, at_once = range((rank - number) % size, P, size), max(1, config.rows // count)
        for start in range(0, len(mine), at_once):
            some = list(mine[start:start + at_once])  # candidates
            manage = manager(replace(solution, params=params[some]), config) if solution else None
            exact, likelihood, _, cache = evaluate(gpt, batch, config, manage, len(some))
            value = exact if config.fitness == "score" else likelihood
            got = torch.stack([value / divisor, cache.float()])
            total[:, some] += got.view(2, -1, count).mean(2)
    total = summed(total).cpu() / len(batches)
    return total[0], total[1].mean().item()


def calibrate_threshold(gpt, solution, best, part, choose, config, log):
    """The score from which on tokens stay without a capacity. While a capacity decides, evolution
    has no reason to put zero anywhere; in the paper, which has none, evolution finds it. So we try
    the scores that 50, 40, 30, 20 and 10 % of the tokens of a full cache reach, on the prompts to
    choose by, and take the highest whose fitness is within 0.01 of the best."""
    scores, values, shortest = [], {}, config.length * min(config.evolve_at)
    free = replace(config, capacity=0)
    for task in config.evolve_on.split(","):
        rng = np.random.default_rng([config.seed, 11])
        batch = prompts(part, task, config.choose_prompts, rng, shortest, config.device)
        score = watch(gpt, solution, batch, replace(free, threshold=-math.inf))["score"].cpu()
        scores.append(score[~score.isnan()])  # NaN: after the last whole block
    scores = torch.cat(scores)
    for share in (0.5, 0.4, 0.3, 0.2, 0.1) if len(scores) else ():  # all may be NaN
        zero = float(np.quantile(scores, 1 - share))
        [value], kept = fitness(gpt, replace(solution, zero=zero), best, choose, free)
        values[zero] = value.item()
        log(f"uncapped, zero at {zero:.2f}: fitness {value:.3f}, cache {kept:.1%}")
    good = [zero for zero, value in values.items() if value >= max(values.values()) - 0.01]
    return max(good, default=0.0)


def curriculum(g, config):
    """(tasks, lengths) of generation g: a task more in each of config.stages equal stages; first
    the shortest prompts, which cost least, in the end all."""
    tasks, lengths, last = config.evolve_on.split(","), config.evolve_at, config.generations
    left_out = config.stages - 1 - config.stages * (g - 1) // last
    return tasks[:len(tasks) - left_out], lengths[:1 + len(lengths) * (g - 1) // last]


def generation(gpt, es, solution_of, best, part, config, g):
    """Candidates, their fitness on fresh prompts, and what CMA-ES makes of it; their numbers."""
    rng, batches = np.random.default_rng([config.seed, 2, g]), []
    tasks, lengths = curriculum(g, config)
    for task in tasks:
        length = config.length * int(rng.choice(lengths))
        batches.append(prompts(part, task, config.prompts, rng, length, config.device))
    got, kept = fitness(gpt, solution_of(es.ask()), best, batches, config)
    es.tell(got)
    return {"candidates": got.mean().item(), "best": got.max().item(), "cache": kept}


def cost_of(history, seconds, full, config):
    """What evolution took, and when its mean passed the full cache's fitness."""
    passed = [point["generation"] for point in history if point.get("mean", 0.0) > full]
    tasks = sum(len(curriculum(g + 1, config)[0]) for g in range(config.generations))
    return {"generations": config.generations, "seconds": seconds,
            "fitness of the full cache": full,
            "passed the full cache at generation": min(passed, default=None),
            "candidate prompts read": config.popsize * config.prompts * tasks, "history": history}


def evolve(gpt, parts, config, log, state, keep, kind=Solution):
    """Evolve the manager of the cache: a Solution, or of a subclass, `kind`. keep(state) is called
    after each generation; from that state evolution goes on to the same bits.

    Fitness is noisy. So what is kept is an average of the means of the search distribution, mostly
    of the last ten; and of these averages the best on the prompts to choose by, which are never
    evolved on. (config.pick "last": the last mean, as in the paper.) Generation 0, all zeros, drops
    nothing of its own accord: only the capacity evicts."""
    longest = evolve_prompts(parts["evolve"], config, 1, 8, [max(config.evolve_at)])
    mean, std = feature_statistics(gpt, longest, config, kind)
    best = {batch.tasks[0]: evaluate(gpt, batch, config)[1].mean().item()
            for batch in evolve_prompts(parts["evolve"], config, 5, 16, [1])}
    choose = evolve_prompts(parts["choose"], config, 3, config.choose_prompts, config.evolve_at)
    scale = kind.steps(config.memory)
    es = CMAES(torch.zeros(len(scale)), config.sigma, config.popsize, config.seed,
               config.covariance == "diagonal")

    def solution_of(params):
        """A Solution, from parameters (4172,) or (P,4172) in units of their steps."""
        return kind((params * scale).float(), mean, std)

    full = fitness(gpt, None, best, choose, config)[0].item()
    log(f"fitness: {config.fitness} over the full cache's; `mean`: on the "
        f"prompts to choose by, all lengths, where the full cache has {full:.3f}")
    state = state or {"next": 0, "es": es.state_dict(), "average": es.mean, "chosen": es.mean,
                      "seconds": 0.0, "highest": -math.inf, "history": []}
    es.load_state_dict(state["es"])
    start, last, first = time.time() - state["seconds"], config.generations, state["next"]
    for g in tqdm(range(first, last + 1), "evolve", last + 1, initial=first, mininterval=1,
                  disable=True if world()[0] else None):
        point = {"generation": g, "sigma": es.sigma}
        if g:
            point |= generation(gpt, es, solution_of, best, parts["evolve"], config, g)
            state["average"] = state["average"] + (es.mean - state["average"]) / min(g, 10)
        if g % config.validate == 0 or g == last:
            chosen = es.mean if config.pick == "last" else state["average"]
            [value], kept = fitness(gpt, solution_of(chosen), best, choose, config)
            point |= {"mean": value.item(), "its cache": kept}
            if g and (value > state["highest"] or config.pick == "last"):
                state |= {"highest": value.item(), "chosen": chosen}
        state |= {"history": [*state["history"], point], "seconds": time.time() - start}
        numbers = [f" | {name} {x:.3f}" for name, x in point.items() if name != "generation"]
        log(f"{g:4d}/{last}{''.join(numbers)} | {state['seconds']:.0f} s")
        if es.diagonal or "mean" in point:  # a full covariance is 139 MB
            keep(state | {"next": g + 1, "es": es.state_dict()})
    made = solution_of(state["chosen"])
    made.cost = cost_of(state["history"], state["seconds"], full, config)
    if config.capacity:
        made.zero = calibrate_threshold(gpt, made, best, parts["choose"], choose, config, log)
    return made


# --- 4. Report -----------------------------------------------------------------------------------

SHOWN = ("namm", "namm_uncapped", "full", "ntk", "tova+pool", "snapkv+pool",
         "recent_attention+pool", "snapkv+lastlayer")
METHODS = (*SHOWN[:4], "random_vectors", *(
    rule + how for rule in namm.RULES for how in ("", "+pool", "+lastlayer")))
RANDOM = 12  # vectors of "random_vectors"


def random_vectors(solution, config):
    """The solution with vectors that nobody evolved, (RANDOM,4172): CMA-ES's first candidates."""
    scale = solution.steps(config.memory)
    es = CMAES(torch.zeros(len(scale)), config.sigma, RANDOM, config.seed + 2 ** 32, diagonal=True)
    return replace(solution, params=(es.ask() * scale).float())


def managed(method, solution, slots, config, rules=namm.RULES):
    """The manager of a method's name, None for a full cache. namm_uncapped: NAMM without the
    capacity it was evolved with. random_vectors: RANDOM of them at once. A rule keeps as many slots
    as `namm` kept in the mean: in each layer; or, with +pool, in the mean over layers; or, with
    +lastlayer, the same number in the last layer first."""
    if method in ("full", "ntk"):
        return None
    if method == "random_vectors":
        return manager(random_vectors(solution, config), config)
    if method == "namm_uncapped":
        return manager(solution, config, capacity=0)
    if method == "namm":
        return manager(solution, config)
    name, _, how = method.partition("+")
    budget = max(1, math.ceil(slots - 1e-9))  # a mean of 40, if rounding puts it just above
    return namm.by_rule(rules[name], budget, how == "pool", how == "lastlayer")


def slots_of(share, n, config):
    """Slots a head, in the mean, that the last eviction left of n tokens, from the share of them in
    the cache. The unfinished last block was never judged, so its tokens are subtracted; a context
    shorter than a block counts whole."""
    return share * n - (n % config.delay if n >= config.delay else 0)


def every_task(part, config, count, seed, length):
    """One Batch: `count` prompts of each of config.tasks, in turn. seed: [numbers]."""
    batches = [prompts(part, task, count, np.random.default_rng([*seed, t]), length, config.device)
               for t, task in enumerate(config.tasks.split(","))]
    return data.Batch(torch.cat([own.tokens for own in batches]),
                      torch.cat([own.answer for own in batches]), batches[0].context,
                      [task for own in batches for task in own.tasks])


def report(gpt, solution, part, config, rules=namm.RULES):
    """Every method on every task and length: [{method, task, length, score, logprob, relative (to
    the full cache, None where that has 0), cache, seed, lead, lead_se, seconds}]. All answer the
    same prompts; those that evict read them in the same blocks, the others in one go. lead: NAMM's
    score minus the method's; lead_se: its standard error over prompts, paired. For needle, depths:
    the score by where it was, in fifths of the context."""
    rows, methods = [], config.methods.split(",") if config.methods else SHOWN
    methods = sorted(methods, key=lambda method: method != "namm")  # whose slots the rules get
    trained = getattr(gpt, "trained_length", None) or config.length  # a checkpoint's own, if known
    for times in config.report_at:
        count = config.report_prompts if times <= 4 else config.far_prompts
        length = times * config.length
        batch = every_task(part, config, count, [config.seed, 4, times], length)
        adds, slots = {}, None
        for method in tqdm(methods, f"report at {length} tokens", mininterval=1, disable=None):
            began, copies = time.time(), RANDOM if method == "random_vectors" else 1
            used = gpt.scaled(max(1, length / trained)) if method == "ntk" else gpt
            manage = managed(method, solution, slots, config, rules)
            got = evaluate(used, batch, config, manage, copies)
            got = [x.cpu().view(copies, -1) for x in got]  # (copies,prompts) each
            own = task_rows(method, [x.mean(0) for x in got], batch, adds)
            if method == "namm":
                slots = slots_of(got[3].mean().item(), batch.context, config)
            if method == "random_vectors":
                best = got[0].mean(1).argmax()
                own += task_rows(method + "_best", [x[best] for x in got], batch, adds)
            seconds = (time.time() - began) / len(own)
            rows += [row | {"length": length, "seed": config.seed, "seconds": seconds}
                     for row in own]
    full = {(row["task"], row["length"]): row["score"] for row in rows if row["method"] == "full"}
    for row in rows:
        base = full[row["task"], row["length"]]
        row["relative"] = row["score"] / base if base else None
    return rows


def task_rows(method, got, batch, adds):
    """A method's rows of the report, one a task, from what `evaluate` gave it on a batch of
    `every_task`. The score of `lm` is 1 / perplexity, of others the share of exact answers. adds
    {(method, task): what each prompt adds to the score}: filled in here, NAMM's first."""
    tasks = list(dict.fromkeys(batch.tasks))
    rows, count = [], len(batch.tasks) // len(tasks)
    for t, task in enumerate(tasks):
        own = slice(t * count, (t + 1) * count)
        exact, _, logprob, cache = (x[own] for x in got)  # (count,) each
        value, adds[method, task] = exact.mean().item(), exact
        if task == "lm":
            value = logprob.mean().exp().item()
            adds[method, task] = value * (1 + logprob - logprob.mean())  # to first order
        gap = adds["namm", task] - adds[method, task]
        error = (gap.var(correction=min(1, count - 1)) / count).sqrt().item()
        rows.append({"method": method, "task": task, "score": value, "lead": gap.mean().item(),
                     "lead_se": error, "logprob": logprob.mean().item(),
                     "cache": cache.mean().item()})
        if task == "needle":
            depth = data.depth(batch.each(lambda x: x[own]))  # (count,) in 0..4
            rows[-1]["depths"] = [exact[depth == d].mean().item() if d in depth else None
                                  for d in range(5)]
    return rows


def curve(gpt, solution, part, config):
    """Score against slots: [{method, length, capacity, slots, score, seed}], means over tasks, on
    few prompts of one length. One vector gives NAMM's whole curve; the rules keep as many slots."""
    rows, length = [], config.length * min(4, max(config.report_at))
    count = min(2, config.report_prompts)
    batch = every_task(part, config, count, [config.seed, 7, length], length)
    for share in (1 / 8, 1 / 4, 1 / 2, 1, 2):
        capacity = math.ceil(share * (config.capacity or config.delay))
        cut = replace(config, capacity=capacity, threshold=-math.inf)
        slots, adds = None, {}
        for method in ("namm", "tova+pool", "snapkv+pool"):
            got = evaluate(gpt, batch, cut, managed(method, solution, slots, cut))
            slots = slots or slots_of(got[3].mean().item(), batch.context, cut)
            own = task_rows(method, [x.cpu() for x in got], batch, adds)
            mean = float(np.mean([row["score"] for row in own]))
            rows.append({"method": method, "length": length, "capacity": capacity, "slots": slots,
                         "seed": config.seed, "score": mean})
    return rows


@torch.no_grad()
def watch(gpt, solution, batch, config):
    """What becomes of the n tokens of N contexts, (layers,N,K,n): {"lives": bool, at the end;
    "score": the last, NaN for a token never judged; "spectrum": (layers,N,K,n,F), the last moving
    average of complete frames}."""
    n, shape = batch.context, (config.n_layer, len(batch.tokens), config.n_kv_head, batch.context)
    score = torch.full(shape, math.nan, device=config.device)
    fate = {"lives": score.isnan(), "score": score, "spectrum": score.new_zeros(*shape, namm.F)}

    def note(cache, scores, keep):
        """What is known of each slot that is judged, at its position in the text."""
        for l, layer in enumerate(cache):
            row, head, _ = own = layer.alive.nonzero(as_tuple=True)  # of each slot, (M,)
            at = l, row, head, layer.positions[own]
            fate["score"][at] = scores[l][own]
            fate["spectrum"][at] = layer.state["memory"][own][:, namm.HOP:namm.HOP + namm.F]
            fate["lives"][at] = keep[l][own]

    cache = gpt.new_cache(len(batch.tokens), config.positions == "renumbered")
    with precision(config.device):
        manage = manager(solution, config)
        read(gpt, batch.inputs()[:, :n], cache, config.delay, manage, observe=note)
    return fate


def example(gpt, solution, part, config, task=None):
    """One prompt for people, of 1024 tokens, or the training length if more, no longer than
    evolution saw: {task, length, text [n], asked [{question, answer, full, namm}], heads [name]},
    and for each head what `watch` gives: lives [n], score [n], spectrum [n][F]. task: if not given,
    kv, or the first evolved on where the GPT has not learned kv."""
    length = min(config.length * max(config.evolve_at), max(config.length, 1024))
    if not task:
        task = "kv" if "kv" in config.tasks.split(",") else config.evolve_on.split(",")[0]
    batch = prompts(part, task, 1, np.random.default_rng([config.seed, 10]), length, config.device)
    tokens, answer, n = batch.tokens[0], batch.answer[0], batch.context
    replies, asked, start = {}, [], n
    for method in ("full", "namm"):
        manage = managed(method, solution, None, config)
        _, at, logits, _, _ = answer_logits(gpt, batch, config, manage)
        replies[method] = tokens.index_put((n + at,), logits.argmax(-1))
    for which in range(1, int(answer.max()) + 1):
        at = (answer == which).nonzero()[:, 0]
        pieces = {"question": tokens[start:at[0]], "answer": tokens[at]}
        pieces |= {method: reply[at] for method, reply in replies.items()}
        asked.append({name: part.decode(piece.tolist()) for name, piece in pieces.items()})
        start = at[-1] + 1
    fate = {name: x[:, 0].flatten(0, 1) for name, x in watch(gpt, solution, batch, config).items()}
    heads = [f"layer {l}, head {k}" for l in range(config.n_layer) for k in range(config.n_kv_head)]
    return {"task": task, "length": len(tokens), "asked": asked, "heads": heads,
            "text": [part.decode([token]) for token in tokens[:n].tolist()],
            "lives": fate["lives"].tolist(),
            "score": fate["score"].double().round(decimals=4).tolist(),
            "spectrum": fate["spectrum"].double().round(decimals=4).tolist()}


def show(shown):
    """Print an example: what each head keeps of its context (`~` for what went), the answers."""
    print(f"{shown['task']}, {shown['length']} tokens\n\n" + "".join(shown["text"]))
    for name, lives in zip(shown["heads"], shown["lives"]):
        left = "".join(token if stays else "\0" for token, stays in zip(shown["text"], lives))
        print(f"\n--- what is left in {name}: {np.mean(lives):.0%}\n" + re.sub("\0+", "~", left))
    print("\n--- the questions, and the answers from the full cache and from what NAMM left of it")
    for own in shown["asked"]:
        print(f"{own['question']!r:30} {own['answer']!r:20} full {own['full']!r:20} "
              f"NAMM {own['namm']!r}")


def table(rows):
    """The report as Markdown, a table for each length: scores, their mean, the share of the cache,
    and how much NAMM is ahead, with a 95 % interval over prompts."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    lines, head = [], ["method", *tasks, "all", "cache", "NAMM ahead"]
    for n in sorted({row["length"] for row in rows}):
        lines += [f"\n{n} tokens\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for method in dict.fromkeys(row["method"] for row in rows if row["length"] == n):
            own = [row for row in rows if (row["method"], row["length"]) == (method, n)]
            score, cache, lead = (np.mean([row[key] for row in own])
                                  for key in ("score", "cache", "lead"))
            half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in own)) / len(own)
            ahead = "" if method == "namm" else f"{lead:+.3f} ± {half:.3f}"
            cells = [method, *(f"{row['score']:.2f}" for row in own), f"{score:.3f}",
                     f"{cache:.2f}", ahead]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- 5. Settings ---------------------------------------------------------------------------------
#     Here and in section 6 a ValueError is a line for the user.

@dataclass
class Config:
    """Every setting. A comment is a setting's help; words with | are all that it can be."""
    out: str = ""  # folder of the run; if not given, runs/PRESET, or EVAL/eval
    base: str = ""  # a run: its GPT, tokeniser, words, length and text; or a checkpoint, or smollm2
    eval: str = ""  # a finished run to report on again: other lengths, texts, capacities
    vector: str = ""  # with --eval: the finished run whose vector manages that GPT's cache
    seed: int = 0  # of everything: GPT, prompts, candidates
    device: str = ""  # cpu|cuda: if not given, cuda where there is one
    # text
    corpus: str = ""  # a file, or a folder of .txt .md .rst .py; if not given, Python's own text
    vocab_size: int = 2048  # tokens of a learned tokeniser
    # GPT
    n_layer: int = 3  # layers
    n_head: int = 4  # query heads
    n_kv_head: int = 1  # key/value heads; each has a cache of its own
    n_embd: int = 64  # width of the model
    head_dim: int = 32  # width of a head
    n_hidden: int = 176  # width inside SwiGLU
    # training it
    length: int = 256  # training length, in tokens
    steps: int = 900  # training steps
    batch_tokens: int = 4096  # tokens in a training step
    lr: float = 1.2e-2  # peak learning rate; of the matrices of layers twice that
    recall: float = 0.25  # share of places where a head must recall a word; 0: a plain GPT
    # the cache
    delay: int = 32  # tokens between two evictions, a multiple of 16
    capacity: int = 28  # most slots a head, in the mean over heads and layers; 0: uncapped
    slots: str = "shared"  # shared|own: the best of all heads and layers stay, or of each head
    threshold: float = 0.0  # a lower score goes; uncapped, added to the calibrated threshold
    positions: str = "renumbered"  # renumbered|original: keys' place in the cache, or in the text
    # the manager
    frames: str = "opened"  # opened|closed: the newest queries count at once, or in whole frames
    squash: str = "asinh"  # asinh|none: of the normalised spectrum
    memory: str = "block"  # block|both: averages of attention, over a block; and over ten blocks
    # evolution
    evolve_on: str = "passage,kv,copy"  # tasks; all others in the report are new to the manager
    generations: int = 40  # generations
    stages: int = 1  # 1: all tasks from the start; more: one more task in each equal stage
    popsize: int = 16  # candidates in a generation
    sigma: float = 0.6  # first step size; a weight's is sigma / sqrt(number of its inputs)
    covariance: str = "diagonal"  # diagonal|full: which entries of the matrix CMA-ES adapts
    fitness: str = "likelihood"  # likelihood|score: of answers, relative to the full cache's
    prompts: int = 4  # fresh prompts a task in a generation, the same for all candidates
    evolve_at: tuple = (1, 2, 4)  # lengths to evolve at, in training lengths
    validate: int = 10  # generations between two validations
    choose_prompts: int = 8  # prompts a task in a validation
    pick: str = "best"  # best|last: the best average of means, or the last mean
    # report
    tasks: str = ",".join(data.TASKS)  # what the GPT learns, and the report asks
    report_prompts: int = 8  # prompts for each task and length in the report
    far_prompts: int = 2  # the same beyond 4 times the training length
    report_at: tuple = (1, 4, 8, 16)  # lengths to report at, in training lengths
    methods: str = ""  # only these, such as namm,full; if not given, eight
    rows: int = 64  # rows (candidates x prompts) read at once


PRESETS = {
    "cpu": {},
    "smoke": dict(length=64, steps=20, batch_tokens=1024, n_embd=32, head_dim=8, n_hidden=64,
                  delay=16, capacity=24, generations=3, popsize=4, prompts=1, validate=1,
                  choose_prompts=1, report_prompts=2, far_prompts=1, report_at=(1, 4, 8)),
    "gpu": dict(vocab_size=8192, n_layer=4, n_head=8, n_kv_head=2, n_embd=768, head_dim=96,
                n_hidden=2048, length=2048, steps=400, batch_tokens=65_536, lr=5e-3, delay=64,
                capacity=128, generations=15, popsize=32, choose_prompts=16, report_prompts=32,
                far_prompts=16, rows=512),
    "paper": dict(capacity=0, slots="own", positions="original", frames="closed", squash="none",
                  covariance="full", fitness="score", stages=3, pick="last"),
    "plain": dict(recall=0.0, steps=600, tasks="lm,dialog,log,code", evolve_on="dialog,log,code",
                  n_kv_head=2, memory="both", delay=64, prompts=2, generations=100, validate=20),
}
# {setting: (the least, below what it must be)}; of other numbers 1 is the least
RANGES = {"seed": (0, 2 ** 32), "recall": (0, 1), "capacity": (0, math.inf), "lr": (1e-9, math.inf),
          "sigma": (1e-9, math.inf), "threshold": (-math.inf, math.inf), "popsize": (4, math.inf),
          "length": (64, math.inf), "head_dim": (4, math.inf), "vocab_size": (267, math.inf)}
FREE = ("out", "device", "rows")  # what may differ when a run goes on
SIZES = [f.name for f in fields(GPTConfig) if hasattr(Config, f.name)]  # of a GPT


def numbers(text):
    """ "4,1,2" -> (1, 2, 4)."""
    return tuple(sorted({int(number) for number in text.split(",")}))


def options():
    """The parser of the command line. A setting's help, and what it can be, are its comment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="python evolve.py [--preset NAME] [--OPTION VALUE ...]",
                                     argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # as of Python 3.14: also -1e-3
    parser.add_argument("--preset", choices=PRESETS, help="if not given, gpu where there is one")
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(Config)))
    for f in fields(Config):
        comment, default = comments[f.name], f.default
        choices = comment.split(":")[0].split("|") if "|" in comment else None
        if f.type is tuple:
            default = ",".join(map(str, default))
        parser.add_argument("--" + f.name, type=numbers if f.type is tuple else f.type,
                            choices=choices, metavar="VALUE",
                            help=comment.replace("%", "%%") + f" [{default}]")
    parser.add_argument("--resume", help="go on with the run in this folder")
    parser.add_argument("--show", help="print what a finished run keeps of a prompt")
    parser.add_argument("--task", choices=data.TASKS | data.COMING_BACK, default="kv",
                        help="of the prompt to show")
    return parser


def parse(line=None):
    """(Config, the task to show, or None for a run) from the command line."""
    given, brought = vars(options().parse_args(line)), {}
    for name, value in list(given.items()):
        if isinstance(value, str) and not value.strip():  # a shell variable that is not set
            raise ValueError(f"--{name} needs a folder, a file or a name, and got an empty text")
        if name in ("corpus", "base", "eval", "vector", "resume", "show") and value != "smollm2":
            given[name] = os.path.realpath(value)  # the same from any working folder
    task, shown, resumed = (given.pop(name, None) for name in ("task", "show", "resume"))
    if folder := shown or resumed or given.get("eval"):
        if "preset" in given:
            raise ValueError(f"--preset: the settings are those of {folder}; leave the option out")
        brought = load_settings(folder)
        brought["out"] = shown or resumed or f"{folder}/eval"
    elif base := given.get("base"):
        real = checkpoint(base)
        own = real["config"] if real else load_settings(base)
        brought = {name: own[name] for name in (SIZES if real else [*SIZES, "corpus", "length"])}
    for name in SIZES:
        if name in brought and given.get(name, brought[name]) != brought[name]:
            raise ValueError(f"--{name} {given[name]}: the GPT has {brought[name]}")
    given = brought | given
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = given.pop("preset", "gpu" if device == "cuda" else "cpu")
    given = {"out": f"runs/{preset}", **PRESETS[preset], **given, "device": device}
    config = Config(**given)
    check(config)
    return config, task if shown else None


def check(c):
    """Refuse settings that cannot be."""
    for f in fields(c):
        low, high = RANGES.get(f.name, (1, math.inf))
        value = getattr(c, f.name)
        for x in value if f.type is tuple else [value]:
            if f.type is not str and not low <= x < high:  # not NaN either
                below = f", and below {high}" * (high < math.inf)
                raise ValueError(f"--{f.name} must be {low} or more{below}")
    known = data.TASKS | data.COMING_BACK
    evolved, asked, methods = (text.split(",") for text in (c.evolve_on, c.tasks, c.methods))
    for name, given, names in (("evolve_on", evolved, known), ("tasks", asked, known),
                               ("methods", methods if c.methods else [], METHODS)):
        for unknown in set(given) - set(names):
            raise ValueError(f"--{name}: {unknown} is none of {', '.join(names)}")
    shortest = c.length * min(c.evolve_at)
    n = shortest - data.question_tokens(shortest)
    for holds, message in [
        (c.device == "cpu" or torch.cuda.is_available(), "device cuda: PyTorch finds no GPU"),
        (len(set(evolved)) == len(evolved), "evolve_on: each task once"),
        (len(set(asked)) == len(asked), "tasks: each task once"),
        (c.stages <= len(evolved), "stages must not be more than the tasks of --evolve_on"),
        (c.stages <= c.generations, "stages must not be more than --generations"),
        (c.head_dim % 2 == 0, "head_dim must be even"),
        (c.n_head % c.n_kv_head == 0, "n_head must be a multiple of --n_kv_head"),
        (c.length % 4 == 0, "length must be a multiple of 4"),
        (c.batch_tokens >= c.length * int(os.environ.get("WORLD_SIZE", 1)),
         "batch_tokens must be --length or more, for each process"),
        (c.delay % namm.HOP == 0, f"delay must be a multiple of {namm.HOP}"),
        (c.delay <= n, f"delay: nothing would ever be evicted from contexts of {n} tokens"),
        (not c.methods or {"namm", "full"} <= set(methods), "methods must hold namm and full"),
        (len(set(methods)) == len(methods), "methods: each once"),
        (c.eval or not c.vector, "vector: give --eval TARGET as well, the run whose GPT it serves"),
    ]:
        if not holds:
            raise ValueError("--" + message)


# --- 6. A run and its folder ---------------------------------------------------------------------

def as_json(x):
    """x as JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(json.loads(json.dumps(x), parse_constant=lambda name: None))


def save(path, content):
    """Write text, or a dict of tensors and numbers, beside `path`, then move it there: after a
    crash the file is whole, or as it was before. The first process does."""
    if world()[0] > 0:
        return
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        buffer.write(content.encode("utf-8", "replace"))
    else:
        torch.save(content, buffer)  # in memory first: a full disk is then an OSError
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # still there: the disk is full, say


def load(path, names, device="cpu"):
    """What `save` wrote to `path`, a dict with these names; None if there is no such file. A file
    from a stranger runs no code."""
    if not path.exists():
        return None
    why, is_json = "of another version", path.suffix == ".json"
    try:
        if is_json:
            state = json.loads(path.read_text("utf-8"))
        else:
            state = torch.load(path, map_location=device, weights_only=True)
        if names <= state.keys():
            return state
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # the file may be whole
        raise OSError(f"{path}: not read ({error})") from None
    except Exception as error:  # torch.load raises many kinds
        why = f"damaged, or not a file of this program ({type(error).__name__})"
    mend = "its folder" if is_json else "it, and what it held is computed again"
    raise ValueError(f"{path}: {why}; delete {mend}")


def load_settings(folder):
    """{name: value}, the settings of the run in a folder."""
    own = load(Path(folder) / "config.json", set())
    if own is None:
        raise ValueError(f"{folder}: the folder holds no run (no config.json)")
    if foreign := own.keys() ^ vars(Config()).keys():
        raise ValueError(f"{folder}: a run of another version: {', '.join(sorted(foreign))}")
    return {name: tuple(x) if isinstance(x, list) else x for name, x in own.items()}


def load_gpt(path, device):
    """The GPT of a gpt.pt, None if there is no such file."""
    found = load(path, {"config", "model"}, device)
    if not found:
        return None
    try:
        gpt = GPT(GPTConfig(**found["config"])).to(device)
        gpt.load_state_dict(found["model"])
    except (TypeError, RuntimeError):
        raise ValueError(f"{path}: of another version; delete its folder") from None
    return gpt.eval()


def load_solution(folder, config):
    """The Solution that a run found, None if it has not; it must be for the settings' NAMM."""
    names = {f.name for f in fields(Solution)}
    found = load(folder / "namm.pt", names)
    if not found:
        return None
    if found.keys() != names:
        raise ValueError(f"{folder / 'namm.pt'}: of another version; delete its folder")
    count, needed = len(found["params"]), len(Solution.steps(config.memory))
    if count != needed:
        raise ValueError(f"{folder / 'namm.pt'}: {count} parameters, and NAMM with --memory "
                         f"{config.memory} has {needed}: of another scorer, or another --memory")
    return Solution(**found)


def checkpoint(base):
    """What extras/pretrained.py reads of a GPT that others trained: {"config": its sizes, "gpt",
    "encoding", "note": a line about it}; None when `base` is the folder of a run, or empty."""
    if not base or (Path(base) / "gpt.pt").exists():
        return None
    try:
        from extras import pretrained
    except ImportError:
        raise ValueError(f"--base {base}: no gpt.pt, and no extras/ to read a checkpoint") from None
    return pretrained.as_base(base)


def compare(config):
    """Refuse a folder that holds another run."""
    out = Path(config.out)
    if not (out / "config.json").exists():
        if (out / "gpt.pt").exists() or (out / "namm.pt").exists():
            raise ValueError(f"{out} holds a GPT or a NAMM and no config.json: not a run of this "
                             "version; give another --out")
        return
    old = load_settings(out)
    differs = [f"{name} {value or '(none)'}" for name, value in vars(config).items()
               if name not in FREE and old[name] != value]
    if differs:
        again = f"; --eval {out} reports on it again" * (out / "namm.pt").exists()
        raise ValueError(f"{out} holds a run with other settings than {', '.join(differs)}; give "
                         f"another --out, or delete it{again}")


def find(config, task):
    """What is there before a run begins, or before a prompt of a task is shown: (folder of the GPT,
    a real checkpoint or None, the GPT or None, the Solution or None)."""
    homes = [Path(folder) for folder in (config.out, config.eval, config.base) if folder]
    out, made = homes[0], [home for home in homes if (home / "gpt.pt").exists()]
    if not task:
        compare(config)
    if config.vector:
        load_settings(config.vector)  # a run, not the folder of an ablation
    home = (made or homes[1:] or homes)[0]  # where the GPT is, or else should be
    real = None if made else checkpoint(config.base)
    gpt = real["gpt"].to(config.device) if real else load_gpt(home / "gpt.pt", config.device)
    folder = out if task else Path(config.vector or config.eval or out)
    solution = load_solution(folder, config)
    if (task or config.eval) and not solution:
        raise ValueError(f"{folder}: the folder holds no finished run (no namm.pt); --resume "
                         f"{folder} goes on with one that was begun")
    if (len(homes) > 1 or task) and not gpt:
        raise ValueError(f"{home}: the folder has no gpt.pt")
    return home, real, gpt, solution


def prepare(config, task=None):
    """(encoding, parts, what earlier runs left: {"gpt", "namm", "training", "evolution", each None
    if it is not there; "text": for text.json; "notes": [line] for the user}), for a run, or to show
    a prompt of a task. Refuses all that can be refused; writes nothing.

    GPT, tokeniser and words come from the run's own folder, or that of --eval or --base. They
    decide what a score means: another text changes no word that is asked."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every number of slots
    out, names = Path(config.out), {"words", "split", "trained on", "fingerprint", "piece"}
    home, real, gpt, solution = find(config, task)
    own = load(out / "text.json", names)
    record = own or load(home / "text.json", names)
    if gpt and not real and not record:
        raise ValueError(f"{home}: a run of another version, without its words (no text.json)")
    if record and not {*data.WORDS, "train", "functions"} <= record["words"].keys():
        raise ValueError(f"{home}: a run of another version, with other words (text.json)")
    if gpt and not real and not (home / "tokenizer.tiktoken").exists():
        raise ValueError(f"{home}: the tokeniser of the GPT is gone (tokenizer.tiktoken)")
    if world()[0] == 0:
        print("reading the text", flush=True)  # which takes a few seconds
    texts, text = data.deal(data.documents(config.corpus or None), record)
    here, ranks = text["fingerprint"], home / "tokenizer.tiktoken"
    if own and not task and here != own["fingerprint"]:
        raise ValueError(f"{out}: this run was begun on another text, or under another Python; "
                         "--eval reports on this one")
    if real:
        encoding, notes = real["encoding"], [real["note"]]
    else:
        encoding, notes = data.tokenizer(config.vocab_size, ranks, texts["train"]), []
        if gpt and gpt.config.vocab_size != encoding.n_vocab:
            raise ValueError(f"{ranks}: not the tokeniser of the GPT beside it")
    longest = config.length * max(*config.evolve_at, *config.report_at)
    used = ["report"] if solution else texts
    parts, text["words"] = data.make_parts(texts, encoding, longest, record and record["words"],
                                           used)
    text["trained on"] = None if real else here
    if record:  # what was dealt once stays dealt
        text |= {"split": record["split"] | text["split"], "trained on": record["trained on"]}
    if text["trained on"] not in (None, here):
        notes.append(f"another text ({here}) than the GPT was trained on ({text['trained on']}): "
                     "the same words, new documents; nothing that it was trained on is asked about")
    return encoding, parts, {"gpt": gpt, "namm": solution, "text": text, "notes": notes,
                             "training": load(out / "training.pt", {"step", "muon"}),
                             "evolution": load(out / "evolution.pt", {"next", "es"})}


def open_log(out):
    """log(line), which adds a line to the run's log.txt and prints it, in the first process. Makes
    the folder; the file is locked as long as log is there."""
    if world()[0] > 0:
        return lambda line: None
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "log.txt", "a", encoding="utf-8", buffering=1)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{out}: another run is at work in this folder") from None

    def log(line):
        """Write and print a line."""
        file.write(line + "\n")
        tqdm.write(line)
    return log


def new_gpt(part, n_vocab, config, log, state, keep):
    """A GPT, trained on the part. keep(state) is called on the way; from that state training goes
    on to the same bits."""
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in SIZES} | {"vocab_size": n_vocab}
    gpt, first = GPT(GPTConfig(**sizes)).to(config.device), state["step"] if state else 0

    def lesson(step):
        """A step's batch, words to recall, and seed."""
        rng, done = np.random.default_rng([config.seed, 0, step]), step / config.steps
        batch, words = data.lesson(part, config.tasks.split(","), rng, done, config.length,
                                   config.batch_tokens, config.recall)
        return batch, words, config.seed * 1_000_003 + step

    workers = 4 if config.device == "cuda" else 0  # it learns faster than one process writes
    lessons = torch.utils.data.DataLoader(
        range(first, config.steps), batch_size=None, collate_fn=lesson, num_workers=workers,
        multiprocessing_context="fork" if workers else None)
    weights, start = sum(p.numel() for p in gpt.parameters()), time.time()
    log(f"training a GPT of {weights:,} parameters, from step {first}")
    train(gpt, lessons, config.steps, config.lr, precision(config.device),
          config.rows * config.length, state, keep)
    log(f"{len(lessons):,} steps of training in {time.time() - start:.0f} s")
    return gpt.eval()


def refuse(why):
    """End with a line for the user and exit code 2; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"evolve.py: {why}", file=sys.stderr)
    sys.exit(2)


def run(config, encoding, parts, found):
    """Train, evolve, report; the files go to the run's folder. What is there is not done again."""
    start, out, text = time.time(), Path(config.out), found["text"]
    gpt, solution = found["gpt"], found["namm"]
    log = open_log(out)
    try:
        compare(config)  # again: another run may have begun and ended meanwhile
    except ValueError as error:
        refuse(error)
    save(out / "config.json", json.dumps(vars(config), indent=1))
    save(out / "text.json", json.dumps(text))
    if text["trained on"]:  # else a real checkpoint, which stays where it is, with its tokeniser
        save(out / "tokenizer.tiktoken", data.ranks_file(encoding))
    for name, part in parts.items():
        log(f"{name:8s}{len(part.tokens):10,} tokens of text, {len(part.words):5,} words for keys")
    for line in found["notes"]:
        log(line)
    if not gpt:
        gpt = new_gpt(parts["train"], encoding.n_vocab, config, log, found["training"],
                      lambda state: save(out / "training.pt", state))
    if text["trained on"] and not (out / "gpt.pt").exists():
        save(out / "gpt.pt", {"config": vars(gpt.config), "model": gpt.state_dict()})
    if not solution:
        solution = evolve(gpt, parts, config, log, found["evolution"],
                          lambda state: save(out / "evolution.pt", state))
    if world()[0] > 0:  # the report is written by the first process
        return
    if not (out / "namm.pt").exists():
        save(out / "namm.pt", vars(solution))
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if config.device == "cuda" else cpu
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "numpy": np.__version__, "device": device}
    result = {"config": vars(config), "versions": versions, "evolution": solution.cost,
              "text": {name: text[name] for name in ("fingerprint", "trained on")},
              "report": report(gpt, solution, parts["report"], config)}
    if not config.methods:
        result["curve"] = curve(gpt, solution, parts["report"], config)
        result["example"] = example(gpt, solution, parts["report"], config)
    result["seconds"] = time.time() - start
    written = as_json(result)
    save(out / "results.json", re.sub(r'}, (?={"\w+":)', "},\n ", written))
    for name in ("training.pt", "evolution.pt"):
        (out / name).unlink(missing_ok=True)
    log(table(result["report"]))
    log(f"{out / 'results.json'} holds all of it; {time.time() - start:.0f} s")
    if (Path(__file__).parent / "extras" / "page.py").exists() and not config.methods:
        from extras import page  # the only arrow into extras: a picture of a finished result
        save(out / "report.html", page.write(json.loads(written)))
        log(f"{out / 'report.html'} shows it")


def work():
    """All that a command asks for; what the user can mend ends in one line and exit code 2."""
    try:
        config, task = parse()
        if "WORLD_SIZE" in os.environ:  # torchrun --nproc-per-node=N evolve.py ...
            torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        encoding, parts, found = prepare(config, task)
    except (ValueError, OSError) as error:
        refuse(error)
    try:
        if not task:
            return run(config, encoding, parts, found)
        for line in found["notes"]:
            print(line)
        show(example(found["gpt"], found["namm"], parts["report"], config, task))
    except FloatingPointError as error:
        refuse(f"{error}, with another --out, or delete {config.out}")
    except (MemoryError, torch.OutOfMemoryError):
        refuse(f"out of memory; the same command with --rows {config.rows // 2 or 1} goes on; if "
               "that is not enough, take another --out and a smaller --length")
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        refuse(f"{error}; once that is mended, the same command goes on")


def main():
    """Work until it is done, or Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to stop
        stream.reconfigure(errors="replace")
    try:
        work()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from what was saved")


if __name__ == "__main__":
    main()
