"""python evolve.py: train a small GPT, evolve the network that manages its cache, and report.

Read in this order:
  1. Config       every setting, with its help; presets
  2. CMAES        the evolution strategy, after Hansen's tutorial (arXiv 1604.00772), whose equation numbers it gives
  3. evaluate     prompts through the cache, the questions afterwards, and the scores
  4. evolve       the loop: candidates, prompts, fitness, stages, validation
  5. report       every method on every task and length; then stream, curve, anatomy: the same question in other ways
  6. table        the rows as Markdown, and `python evolve.py --summary RUN/results.json ...` for several runs
  7. main
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import data
import namm
from model import GPT, GPTConfig, read, summed, train, world


# ---------------------------------------------------------------------------------------------------------------------
# 1. Config

def setting(default, help):
    """A field of Config with its help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting; `python evolve.py --help` prints this list."""
    out: str = setting("", "folder of the run; runs/PRESET if not given")
    base: str = setting("", "folder of a finished run whose tokeniser and GPT to use instead of training")
    seed: int = setting(0, "of everything: GPT, prompts, candidates")
    device: str = setting("", "cpu or cuda; if not given, cuda where there is one")
    # text
    corpus: str = setting("", "a file, or a folder of .txt .md .rst .py; if not given, Python's own text")
    tokenizer: str = setting("learned", "learned from the text, or a name that tiktoken knows, such as gpt2")
    vocab_size: int = setting(2048, "tokens of a learned tokeniser")
    # GPT
    n_layer: int = setting(3, "layers")
    n_head: int = setting(4, "query heads")
    n_kv_head: int = setting(1, "key/value heads; each has a cache of its own")
    n_embd: int = setting(64, "width of the model")
    head_dim: int = setting(32, "width of a head")
    n_hidden: int = setting(176, "width inside SwiGLU")
    rope_theta: float = setting(500_000.0, "base of the rotary angles")
    rope_scale: float = setting(1.0, "NTK scaling of the rotary angles")
    # training it
    length: int = setting(256, "training length, in tokens")
    steps: int = setting(1500, "training steps")
    batch_tokens: int = setting(4096, "tokens in a training step")
    lr: float = setting(4e-3, "peak learning rate")
    recall: float = setting(0.25, "share of places where a head is asked for a word to remember")
    # the cache
    delay: int = setting(64, "tokens between two evictions, a multiple of 16")
    capacity: int = setting(96, "most slots that NAMM keeps in a head; 0 for any number")
    positions: str = setting("renumbered", "of cached keys: renumbered inside the cache, or original (the paper)")
    # the manager
    features: str = setting("all", f"what a token is judged by: {', '.join(namm.SEES)} (see namm.py)")
    scorer: str = setting("bam", f"how: {', '.join(namm.SCORERS)}")
    heads: str = setting("apart", "apart: each head drops its own tokens; together: a layer's heads drop the same")
    # evolution
    generations: int = setting(50, "generations")
    stages: int = setting(1, "1: all tasks from the start; 2 or 3: one more task in each of so many equal stages")
    popsize: int = setting(16, "candidates in a generation")
    sigma: float = setting(0.6, "first step size, in units of one over the root of a weight's inputs")
    covariance: str = setting("diagonal", "diagonal or full")
    prompts: int = setting(4, "fresh prompts for each task in a generation, the same for all candidates")
    evolve_at: tuple = setting((1, 2, 4), "lengths to evolve at, in training lengths, drawn for each task and generation")
    validate: int = setting(5, "generations between two validations of the mean")
    choose_prompts: int = setting(8, "prompts for each task in a validation")
    # report
    report_prompts: int = setting(16, "prompts for each task and length in the report")
    far_prompts: int = setting(6, "the same beyond 4 times the training length")
    report_at: tuple = setting((1, 4, 8, 16), "lengths to report at, in training lengths")
    methods: str = setting("", "methods to report on, such as namm,full, and no more than that; if not given, all")
    rows: int = setting(16, "rows (candidates x prompts) read at once: few, since all are padded to the largest cache")


PRESETS = {
    "cpu": {},
    "smoke": dict(length=64, steps=20, batch_tokens=1024, n_embd=32, head_dim=8, n_hidden=64, delay=16, capacity=24,
                  generations=3, popsize=4, prompts=1, validate=1, choose_prompts=1, report_prompts=2, far_prompts=1, report_at=(1, 4, 8)),
    "gpu": dict(vocab_size=8192, n_layer=8, n_head=8, n_kv_head=2, n_embd=512, head_dim=64, n_hidden=1408, length=2048,
                steps=3000, batch_tokens=131_072, lr=1e-3, delay=256, capacity=768, generations=100, popsize=32, prompts=8,
                choose_prompts=32, report_prompts=64, far_prompts=16, rows=512),
}


FREE = ("out", "device", "methods", "report_prompts", "far_prompts", "report_at", "rows")   # may change when a run goes on


def numbers(text):
    """ "1,2,4" -> (1, 2, 4)."""
    return tuple(int(number) for number in text.split(","))


def parse(argv=None):
    """Config from the command line. Raises ValueError, with a line for the user, for what cannot be."""
    parser = argparse.ArgumentParser(description="Train a small GPT, evolve the manager of its cache, report.",
                                     usage="python evolve.py [--preset cpu|gpu|smoke] [--OPTION VALUE ...]",
                                     epilog="python evolve.py --summary RUN/results.json ... prints the tables of runs; "
                                            "python evolve.py --bench [--base RUN] how fast it is here",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="smoke takes a minute; if not given, gpu where there is one")
    for f in dataclasses.fields(Config):
        shown = ",".join(map(str, f.default)) if f.type is tuple else f.default
        parser.add_argument("--" + f.name, type=numbers if f.type is tuple else f.type,
                            metavar="VALUE", help=f"{f.metadata['help']} [{shown}]")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its settings")
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        made = pathlib.Path(given.pop("resume")) / "config.json"
        if not made.exists():
            raise ValueError(f"--resume {made.parent}: the folder holds no run (no config.json)")
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(made.read_text()).items()}
        given = own | {"out": str(made.parent)} | given
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = given.pop("preset", "gpu" if device == "cuda" else "cpu")
    config = Config(**{"out": f"runs/{preset}", **PRESETS[preset], **given, "device": device})
    check(config)
    return config


def check(c):
    """Raise ValueError for settings that cannot be."""
    for name in ("n_layer n_head n_kv_head n_embd head_dim n_hidden length steps batch_tokens lr delay generations sigma "
                 "prompts validate choose_prompts report_prompts far_prompts rows evolve_at report_at").split():
        value = getattr(c, name)
        if min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise ValueError(f"--{name} must be above 0")
    shortest = c.length * min(c.evolve_at)
    for holds, message in [
        (c.device in ("cpu", "cuda"), "--device is cpu or cuda"),
        (c.device == "cpu" or torch.cuda.is_available(), "--device cuda: this PyTorch finds no CUDA device"),
        (c.positions in ("renumbered", "original"), "--positions is renumbered or original"),
        (c.covariance in ("diagonal", "full"), "--covariance is diagonal or full"),
        (c.features in namm.SEES, f"--features is one of {', '.join(namm.SEES)}"),
        (c.scorer in namm.SCORERS, f"--scorer is one of {', '.join(namm.SCORERS)}"),
        (c.heads in ("apart", "together"), "--heads is apart or together"),
        (1 <= c.stages <= 3, "--stages is 1, 2 or 3"),
        (c.head_dim % 2 == 0, "--head_dim must be even"),
        (c.n_head % c.n_kv_head == 0, "--n_head must be a multiple of --n_kv_head"),
        (c.length >= 64 and c.length % 4 == 0, "--length must be a multiple of 4, and 64 or more"),
        (c.batch_tokens >= c.length, "--batch_tokens must be --length or more"),
        (c.delay % namm.HOP == 0, f"--delay must be a multiple of {namm.HOP}"),
        (c.delay <= shortest - data.room(shortest), f"--delay {c.delay}: the context of the prompts to evolve on has "
         f"{shortest - data.room(shortest)} tokens, so nothing would ever be evicted"),
        (c.popsize >= 4, "--popsize must be 4 or more"),
        (not c.methods or {"namm", "full"} <= set(c.methods.split(",")) <= set(METHODS),
         f"--methods: namm and full, and any of {', '.join(METHODS[2:])}"),
        (0 <= c.recall < 1, "--recall must be 0 or more, and below 1"),
        (c.capacity >= 0, "--capacity must be 0 or more"),
        (c.vocab_size > 266, "--vocab_size must be above 266: 256 bytes, ten digits, and what is learned"),
    ]:
        if not holds:
            raise ValueError(message)


def precision(device):
    """The one place that decides it: bfloat16 for matrix products on a GPU, float32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# 2. CMA-ES

class CMAES:
    """Covariance matrix adaptation evolution strategy, maximising. Names and equation numbers of the tutorial.

    mean (n,), sigma: where to start and how far to step. diagonal: only the variances are adapted (sep-CMA, Ros and
    Hansen 2008), with rates (n + 2) / 3 times as fast: what n = 4172 needs, where the full matrix hardly moves within
    a run. Use: candidates = ask(); tell(fitness); again. The best estimate is `mean`. All randomness comes from (seed,
    generation), so state_dict() restores a run exactly.
    """

    def __init__(self, mean, sigma, popsize=None, seed=0, diagonal=False):
        self.mean = torch.as_tensor(mean, dtype=torch.float64).clone()
        self.sigma, self.seed, self.diagonal, self.generation = float(sigma), seed, diagonal, 0
        n = len(self.mean)
        lam = self.popsize = popsize or 4 + int(3 * math.log(n))                                    # (48)
        mu = lam // 2
        w = math.log((lam + 1) / 2) - torch.arange(1, lam + 1, dtype=torch.float64).log()           # (49)
        mu_eff = (w[:mu].sum() ** 2 / w[:mu].square().sum()).item()
        mu_eff_minus = (w[mu:].sum() ** 2 / w[mu:].square().sum()).item()
        # how fast the step size and the covariance follow
        self.c_sigma = (mu_eff + 2) / (n + mu_eff + 5)                                              # (55)
        self.d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + self.c_sigma         # (55)
        self.c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)                                      # (56)
        faster = (n + 2) / 3 if diagonal else 1
        self.c_1 = faster * 2 / ((n + 1.3) ** 2 + mu_eff)                                           # (57)
        self.c_mu = min(1 - self.c_1,
                        faster * 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))    # (58)
        # recombination weights: the better half positive, the worse half negative (active CMA)
        negative = min(1 + self.c_1 / self.c_mu,                                                    # (50)
                       1 + 2 * mu_eff_minus / (mu_eff + 2),                                         # (51)
                       (1 - self.c_1 - self.c_mu) / (n * self.c_mu))                                # (52)
        self.weights = torch.where(w >= 0, w / w[w > 0].sum(), negative * w / -w[w < 0].sum())      # (53)
        self.mu, self.mu_eff = mu, mu_eff
        self.chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))                            # E|N(0, I)|
        # an eigendecomposition costs n^3 and C changes slowly: renew it only when C has moved
        self.lazy_gap = max(1, int(0.5 / (n * (self.c_1 + self.c_mu))))
        self.p_sigma, self.p_c = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        shape = (n,) if diagonal else (n, n)
        self.C = torch.ones(shape, dtype=torch.float64) if diagonal else torch.eye(n, dtype=torch.float64)
        self.B, self.D = None, torch.ones(n, dtype=torch.float64)          # C = B D^2 B^T; B None: the identity

    def ask(self):
        """(popsize, n) candidates, x = mean + sigma B D z."""
        rng = np.random.default_rng([self.seed, self.generation])
        self.z = torch.from_numpy(rng.standard_normal((self.popsize, len(self.mean))))              # (38)
        y = self.z * self.D
        self.y = y if self.B is None else y @ self.B.T                                              # (39)
        return self.mean + self.sigma * self.y                                                      # (40)

    def tell(self, fitness):
        """Fitness of the candidates of the last ask(), higher is better; NaN counts as worst."""
        n, w = len(self.mean), self.weights
        fitness = torch.as_tensor(fitness, dtype=torch.float64).nan_to_num(nan=-math.inf)
        order = fitness.argsort(descending=True, stable=True)
        y, z = self.y[order], self.z[order]
        # the mean moves to the weighted best
        y_w, z_w = w[:self.mu] @ y[:self.mu], w[:self.mu] @ z[:self.mu]                             # (41)
        self.mean = self.mean + self.sigma * y_w                                                    # (42), c_m = 1
        # step size: longer when successive steps agree. C^(-1/2) y_w = B z_w
        self.p_sigma = ((1 - self.c_sigma) * self.p_sigma + math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mu_eff)
                        * (z_w if self.B is None else self.B @ z_w))                                # (43)
        norm = self.p_sigma.norm().item()
        self.sigma *= math.exp(self.c_sigma / self.d_sigma * (norm / self.chi_n - 1))               # (44)
        # covariance: one rank from the path of the mean, popsize - 1 from this generation
        stalled = norm / math.sqrt(1 - (1 - self.c_sigma) ** (2 * (self.generation + 1))) >= (
            1.4 + 2 / (n + 1)) * self.chi_n
        h_sigma = 0.0 if stalled else 1.0
        self.p_c = ((1 - self.c_c) * self.p_c
                    + h_sigma * math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff) * y_w)           # (45)
        w = torch.where(w >= 0, w, w * n / z.square().sum(1))                                       # (46)
        lost = self.c_1 * (1 - h_sigma) * self.c_c * (2 - self.c_c)
        decay = 1 + lost - self.c_1 - self.c_mu * self.weights.sum().item()
        rows = torch.cat([self.p_c[None], y])                                                       # (1 + popsize, n)
        gain = torch.cat([torch.tensor([self.c_1], dtype=torch.float64), self.c_mu * w])            # (1 + popsize,)
        if self.diagonal:
            self.C = decay * self.C + gain @ rows.square()                                          # (47)
        else:
            self.C.addmm_((gain[:, None] * rows).T, rows, beta=decay)                               # (47)
        self.generation += 1
        if self.diagonal:
            self.D = self.C.sqrt()
        elif self.generation % self.lazy_gap == 0:
            self.C = (self.C + self.C.T) / 2
            variance, self.B = torch.linalg.eigh(self.C)
            self.D = variance.clamp(min=1e-20).sqrt()

    def state_dict(self):
        """All that changes, as tensors and numbers."""
        return {name: getattr(self, name) for name in ("mean", "sigma", "generation", "p_sigma", "p_c", "C", "B", "D")}

    def load_state_dict(self, state):
        """Go on from state_dict() of a CMAES made with the same arguments."""
        for name, value in state.items():
            setattr(self, name, value.clone() if torch.is_tensor(value) else value)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Prompts through the cache

@torch.no_grad()
def evaluate(gpt, batch, config, manage=None, weights=False):
    """Read the contexts with the cache managed, then ask. Rows B = copies x prompts, if the manager makes copies.

    Returns four (B,), means over a prompt's answers, or over layers and heads:
      exact       1 for an answer whose every token is the arg-max: what greedy decoding would write
      likelihood  of an answer's token: exp of the mean log-probability of its tokens
      logprob     that mean itself, natural logarithm
      cache       share of the context's tokens that is in the cache when the question is asked
    Out of memory, it goes on with half the rows at once.
    """
    try:
        return answers(gpt, batch, config, manage, weights)
    except torch.OutOfMemoryError:
        half = len(batch.tokens) // 2
        if half == 0:
            raise
    config.rows = max(1, config.rows // 2)                                 # from now on
    tqdm.write(f"out of memory: reading {config.rows} rows at once from here on")
    halves = [dataclasses.replace(batch, tokens=batch.tokens[own], answer=batch.answer[own])
              for own in (slice(0, half), slice(half, None))]
    pairs = zip(*(evaluate(gpt, piece, config, manage, weights) for piece in halves))
    return [torch.cat([a.view(-1, half), b.view(-1, len(batch.tokens) - half)], dim=1).flatten() for a, b in pairs]


def answers(gpt, batch, config, manage, weights):
    """What `evaluate` returns, in one go."""
    n = batch.context
    with precision(config.device):
        cache = gpt.new_cache(len(batch.tokens), config.positions == "renumbered")
        read(gpt, batch.tokens[:, :n], cache, config.delay if manage else n, manage, weights)    # uncut: in one block
        kept = torch.stack([layer.kept() for layer in cache]).mean(0)                        # (B,)
        copies = cache[0].copies
        tokens, answer = batch.tokens[:, n:].repeat(copies, 1), batch.answer[:, n:].repeat(copies, 1)    # (B,Q)
        row, at = answer.nonzero(as_tuple=True)                                              # (M,) answer tokens
        hidden = gpt.hidden(tokens[:, :-1], cache)                                           # (B,Q-1,C)
        logits = gpt.output(hidden[row, at - 1]).float()                                     # (M,V)
    target = tokens[row, at]
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    wrong = (logits.argmax(-1) != target).float()
    B, A = len(tokens), int(answer.max()) + 1
    group = row * A + answer[row, at]                                                        # (M,) which answer
    total = lambda x: torch.zeros(B * A, device=x.device).index_add(0, group, x).view(B, A)[:, 1:]
    size = total(torch.ones_like(wrong))                                                     # (B,A) tokens in it
    asked = (size > 0).float()
    mean = lambda x: (x * asked).sum(1) / asked.sum(1)                                       # (B,A) -> (B,)
    logprob = total(logprob) / size.clamp(min=1)                                             # (B,A)
    return mean(total(wrong) == 0), mean(logprob.exp()), mean(logprob), kept


def manager(params, statistics, config, **changes):
    """NAMM as the settings say, for params (P,n)."""
    return namm.namm(params, *statistics, **{"capacity": config.capacity, "sees": config.features, "scorer": config.scorer,
                                             "per_head": config.heads == "apart", **changes})


def score(task, exact, logprob):
    """A task's score from its prompts, higher is better: the share of answers that are exact; for `lm` 1 / perplexity."""
    return (logprob.mean().exp() if task == "lm" else exact.mean()).item()


def prompts(part, task, count, rng, length, device):
    """`count` prompts of one task, on the device."""
    return on_device(data.batch(part, [task] * count, rng, length), device)


def on_device(batch, device):
    """The batch with its tensors on the device."""
    return dataclasses.replace(batch, tokens=batch.tokens.to(device), answer=batch.answer.to(device))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Evolution

def feature_statistics(gpt, part, config):
    """Mean and standard deviation of the spectra over the full cache, (F,) each: collected once, then frozen."""
    totals = torch.zeros(3, namm.F, dtype=torch.float64, device=config.device)
    rng = np.random.default_rng([config.seed, 1])
    for task in data.EVOLVED:
        batch = prompts(part, task, 8, rng, config.length * max(config.evolve_at), config.device)
        evaluate(gpt, batch, config, namm.statistics(totals, config.features), weights=True)
    return namm.mean_std(totals)


def yardstick(gpt, part, config):
    """{task: mean likelihood of an answer's token, full cache, training length}: what the GPT can do at its best."""
    rng = np.random.default_rng([config.seed, 5])
    return {task: evaluate(gpt, prompts(part, task, 16, rng, config.length, config.device), config)[1].mean().item()
            for task in data.EVOLVED}


def fitness(gpt, params, statistics, best, part, tasks, lengths, count, rng, config):
    """(P,) fitness of params (P,n), or (1,) of the full cache for params None, and the share of the cache kept, mean over
    all. For each task at each of its lengths, on the same `count` prompts for all candidates: mean likelihood of the
    answers, divided by `best`, the full cache's at the training length; then the mean. The likelihood has no ties, as
    exact match has; and the paper's divisor, the full cache's score on the same prompts, is near 0 where it is to be beaten.

    lengths(rng) draws, for one task, the lengths of its prompts in training lengths. Groups of candidates are dealt to the
    processes of the run in turn; each process gets all the results."""
    P, (rank, size), parts = 1 if params is None else len(params), world(), 0
    total = torch.zeros(2, P, device=config.device)                        # fitness, cache kept
    groups = torch.arange(P, device=config.device).split(max(1, config.rows // count))       # candidates read at once
    for task in tasks:
        for times in lengths(rng):
            batch = prompts(part, task, count, rng, config.length * int(times), config.device)
            for i, group in enumerate(groups):
                if (parts * len(groups) + i) % size == rank:
                    manage = None if params is None else manager(params[group], statistics, config)
                    _, likelihood, _, cache = evaluate(gpt, batch, config, manage, weights=manage is not None)
                    got = torch.stack([likelihood / best[task], cache]).view(2, -1, count).mean(2)
                    total.index_add_(1, group, got)
            parts += 1
    total = summed(total).cpu() / parts
    return total[0], total[1].mean().item()


def evolve(gpt, parts, config, log, state, keep):
    """Evolve the manager of the cache. Returns its parameters (4172,), the statistics of the features, and what it cost.
    keep(state) is called after each generation; from that state evolution goes on to the same bits.

    Fresh prompts each generation, one more task in each of three stages. The mean of the search distribution is what is
    kept, since a single candidate's fitness is noisy; of the means, the one with the best fitness on the prompts to
    choose by, which are always the same and never evolved on. Generation 0, all zeros, drops nothing of its own accord."""
    statistics, best = feature_statistics(gpt, parts["evolve"], config), yardstick(gpt, parts["evolve"], config)
    scale = namm.scale(config.scorer)                                      # one step size fits all weights
    es = CMAES(torch.zeros(len(scale)), config.sigma, config.popsize, config.seed, config.covariance == "diagonal")
    any_length, every_length = lambda rng: [rng.choice(config.evolve_at)], lambda rng: config.evolve_at

    def validate(params):
        return fitness(gpt, params, statistics, best, parts["choose"], data.EVOLVED, every_length, config.choose_prompts,
                       np.random.default_rng([config.seed, 3]), config)

    [full], _ = validate(None)
    state = state or {"next": 0, "highest": -math.inf, "chosen": None, "passed": None, "seconds": 0.0}
    if "es" in state:
        es.load_state_dict(state["es"])
    start = time.time() - state["seconds"]
    log(f"the full cache's fitness on the prompts to choose by: {full:.3f}")
    log("generation tasks | candidates: fitness   best  cache | mean: fitness  cache | sigma  axis ratio | seconds  left")
    for g in tqdm(range(state["next"], config.generations + 1), desc="evolve", initial=state["next"], mininterval=1,
                  total=config.generations + 1, dynamic_ncols=True, disable=True if world()[0] else None):
        began, stage = time.time(), config.stages * max(0, g - 1) // config.generations
        tasks = data.EVOLVED[:len(data.EVOLVED) - config.stages + 1 + stage]
        of_all, of_mean = " " * 33, " " * 20
        if g:
            candidates = (es.ask() * scale).float().to(config.device)
            got, kept = fitness(gpt, candidates, statistics, best, parts["evolve"], tasks, any_length, config.prompts,
                                np.random.default_rng([config.seed, 2, g]), config)
            es.tell(got)
            of_all = f"{got.mean():19.3f} {got.max():6.3f} {kept:6.1%}"
        if g % config.validate == 0 or g == config.generations:
            mean = (es.mean * scale).float()
            [value], kept = validate(mean[None].to(config.device))
            star = "*" if g and value > state["highest"] else " "
            if star == "*":
                state |= {"highest": value.item(), "chosen": mean}
            if state["passed"] is None and value > full:
                state["passed"] = g
            of_mean = f"{value:12.3f}{star} {kept:6.1%}"
        left = (time.time() - start) / (g + 1) * (config.generations - g)
        log(f"{g:5d}/{config.generations:<4d} {len(tasks):5d} | {of_all} | {of_mean} | {es.sigma:5.3f} "
            f"{(es.D.max() / es.D.min()).item():11.2f} | {time.time() - began:7.1f} {left:4.0f}s")
        keep(state | {"next": g + 1, "es": es.state_dict(), "seconds": time.time() - start})
    cost = {"generations": config.generations, "passed the full cache at generation": state["passed"],
            "seconds": time.time() - start,
            "candidate prompts read": sum(config.popsize * config.prompts * (len(data.EVOLVED) - config.stages + 1 +
                                          config.stages * g // config.generations) for g in range(config.generations))}
    log(f"evolution: {json.dumps(cost)}")
    return state["chosen"], statistics, cost


# ---------------------------------------------------------------------------------------------------------------------
# 5. Report

METHODS = ("namm", "full", "ntk", *namm.BASELINES)
FAR = ("namm", "full", "ntk", "streaming", "h2o", "tova", "snapkv")        # worth their time beyond 4 x


def ask(gpt, batches, config, manage, weights):
    """As `evaluate`, for several batches."""
    return [torch.cat(got) for got in zip(*(evaluate(gpt, batch, config, manage, weights) for batch in batches))]


def rule(method, params, statistics, budget, config):
    """(manager, does it look at the attention) of a method's name. `ntk` is the full cache too; see `report`."""
    if method in ("full", "ntk"):
        return None, False
    if method == "namm":
        return manager(params[None].to(config.device), statistics, config), True
    return namm.baseline(method, budget, config.seed), method in namm.ATTENTIVE


def report(gpt, params, statistics, part, config):
    """Every method on every task and length: [{method, task, length, score, logprob, relative, cache, seed, ...}].

    All methods answer the same prompts through the same blocks; the baselines keep as many slots as NAMM has on average in
    that task at that length. `ntk` is the full cache with the rotary base scaled to the length, as one would extend a GPT's
    context without training. `lead`: NAMM's score minus the method's; `lead_se`, its standard error over prompts, paired.
    `seconds` for all prompts. For needle, `depths`: the score by where it was, in five equal parts of the context."""
    wanted = config.methods.split(",") if config.methods else METHODS
    chosen = {times: [m for m in METHODS if m in wanted and (times <= 4 or m in FAR)] for times in config.report_at}
    rows, total = [], len(data.TASKS) * sum(map(len, chosen.values()))
    bar = tqdm(total=total, desc="report", mininterval=1, dynamic_ncols=True, disable=None)
    for times in config.report_at:
        for t, task in enumerate(data.TASKS):
            length, rng = times * config.length, np.random.default_rng([config.seed, 4, times, t])
            asked = config.report_prompts if times <= 4 else config.far_prompts
            counts = [min(config.rows, asked - i) for i in range(0, asked, config.rows)]
            batches = [prompts(part, task, count, rng, length, config.device) for count in counts]
            at, budget = {}, None
            for method in chosen[times]:
                began = time.time()
                gpt.config.rope_scale = config.rope_scale * (times if method == "ntk" else 1)
                exact, _, logprob, cache = ask(gpt, batches, config, *rule(method, params, statistics, budget, config))
                got = score(task, exact, logprob)
                # what each prompt adds to the score; for 1 / perplexity, to first order
                each = got * (1 + logprob - logprob.mean()) if task == "lm" else exact
                at[method] = each
                if method == "namm":
                    budget = max(1, math.ceil(cache.mean().item() * batches[0].context))
                lead = at["namm"] - each
                row = dict(method=method, task=task, length=length, score=got, logprob=logprob.mean().item(), relative=None,
                           cache=cache.mean().item(), seed=config.seed, lead=lead.mean().item(),
                           lead_se=(lead.var(correction=0) / len(lead)).sqrt().item(), seconds=time.time() - began)
                if task == "needle":
                    depth = torch.cat([data.depth(batch) for batch in batches])                  # (N,) in 0..4
                    row["depths"] = [exact[depth == d].mean().item() if (depth == d).any() else None for d in range(5)]
                rows.append(row)
                bar.update()
    gpt.config.rope_scale = config.rope_scale
    full = {(row["task"], row["length"]): row["score"] for row in rows if row["method"] == "full"}
    for row in rows:
        base = full[row["task"], row["length"]]
        row["relative"] = row["score"] / base if base else None
    return rows


@torch.no_grad()
def stream(gpt, params, statistics, part, config):
    """Bits per token of held-out text that is read in one go: [{method, from, to, bits, cache}], positions in tokens. The
    baselines keep as many slots as NAMM has at the end."""
    rng, rows, budget = np.random.default_rng([config.seed, 6]), [], None
    ends = [times * config.length for times in config.report_at]
    text = torch.from_numpy(np.stack([part.text(rng, ends[-1]) for _ in range(config.rows)])).long().to(config.device)
    for method in ("namm", "full", "recent", "streaming", "h2o", "tova"):
        manage, weights = rule(method, params, statistics, budget, config)
        cache, bits = gpt.new_cache(len(text), config.positions == "renumbered"), []
        for block in text.split(config.delay, dim=1):
            with precision(config.device):
                logits = gpt.output(read(gpt, block, cache, config.delay, manage, weights)).float()
            after = text[:, cache[0].seen - block.shape[1] + 1:cache[0].seen + 1]                # (B,T), or one fewer
            bits.append(torch.nn.functional.cross_entropy(logits[:, :after.shape[1]].transpose(1, 2), after,
                                                          reduction="none") / math.log(2))
        bits, share = torch.cat(bits, dim=1), torch.stack([layer.kept() for layer in cache]).mean().item()
        budget = budget or max(1, math.ceil(share * ends[-1]))
        rows += [{"method": method, "from": start, "to": end, "bits": bits[:, start:end].mean().item(), "cache": share,
                  "seed": config.seed} for start, end in zip([0] + ends, ends)]
    return rows


def curve(gpt, params, statistics, part, config):
    """Score at one and the same number of slots for every method: [{method, length, slots, score, seed}], mean over tasks.
    NAMM keeps its best `slots`, whatever their scores: one evolved vector gives the whole curve."""
    rows, lengths = [], [times * config.length for times in config.report_at if times != 8]
    for length, slots in itertools.product(lengths, [config.length // 16 * n for n in (1, 2, 4, 6)]):
        for method in ("namm", "streaming", "h2o", "tova", "snapkv"):
            scores = []
            for t, task in enumerate(data.TASKS):
                rng = np.random.default_rng([config.seed, 7, length, t])
                batch = prompts(part, task, min(8, config.far_prompts), rng, length, config.device)
                manage, weights = rule(method, params, statistics, slots, config)
                if method == "namm":
                    manage = manager(params[None].to(config.device), statistics, config, threshold=-math.inf, capacity=slots)
                exact, _, logprob, _ = evaluate(gpt, batch, config, manage, weights)
                scores.append(score(task, exact, logprob))
            rows.append(dict(method=method, length=length, slots=slots, score=float(np.mean(scores)), seed=config.seed))
    return rows


def anatomy(gpt, params, statistics, part, config):
    """What NAMM keeps: [{layer, head, kind, kept, spectrum_kept, spectrum_dropped, seed}], over prompts of all tasks but
    `lm` at the longest length of evolution. `kept`: share of the tokens of a kind that lives at the end of the context, or,
    for kind "all", the mean spectra (F,) of the tokens that stayed and went, at all evictions."""
    manage, sums, spectra = manager(params[None].to(config.device), statistics, config), {}, {}
    for t, task in enumerate(task for task in data.TASKS if task != "lm"):
        rng = np.random.default_rng([config.seed, 8, t])
        batch = prompts(part, task, 8, rng, config.length * max(config.evolve_at), config.device)
        tokens, n = batch.tokens[:, :batch.context], batch.context
        asked = torch.stack([torch.isin(row[:n], row[answer > 0]) for row, answer in zip(batch.tokens, batch.answer)])
        place = torch.arange(n, device=tokens.device).expand_as(tokens)
        ends = torch.from_numpy(part.ends_line).to(tokens.device)[tokens]
        kinds = {"all": place >= 0, "to be asked for": asked, "before such a word": asked.roll(-1, 1) & ~asked,
                 "first four": place < 4, "newest 32": place >= n - 32, "line ends": ends & ~asked}        # (N,n) each

        def watched(layer, cache, received):
            evict = cache.evict

            def record(keep):
                for name, mask in (("spectrum_kept", keep), ("spectrum_dropped", cache.alive & ~keep)):
                    for head in range(mask.shape[1]):
                        total, count = spectra.get((layer, head, name), (0.0, 0))
                        chosen = cache.state["spectrum"][:, head][mask[:, head]]                            # (some,F)
                        spectra[layer, head, name] = total + chosen.sum(0), count + len(chosen)
                evict(keep)

            cache.evict = record
            manage(layer, cache, received)
            cache.evict = evict
            if cache.seen > n - config.delay:                              # the last eviction of this context
                for head in range(cache.alive.shape[1]):
                    lives = torch.zeros_like(place, dtype=torch.bool)
                    for row in range(len(lives)):
                        lives[row, cache.positions[row, head][cache.alive[row, head]]] = True
                    lives[:, cache.seen:] = True                           # not read yet, or never judged
                    for kind, mask in kinds.items():
                        kept, count = sums.get((layer, head, kind), (0, 0))
                        sums[layer, head, kind] = kept + (lives & mask).sum().item(), count + mask.sum().item()

        cache = gpt.new_cache(len(tokens), config.positions == "renumbered")
        with precision(config.device):
            read(gpt, tokens, cache, config.delay, watched, weights=True)
    rows = [dict(layer=layer, head=head, kind=kind, kept=kept / max(1, count), seed=config.seed)
            for (layer, head, kind), (kept, count) in sums.items()]
    for row in rows:
        if row["kind"] == "all":
            for name in ("spectrum_kept", "spectrum_dropped"):
                total, count = spectra[row["layer"], row["head"], name]
                row[name] = (total / max(1, count)).tolist()
    return rows


def lost(gpt, params, statistics, part, config):
    """What no manager can know in advance: six tokens from anywhere in the text, how does it go on? A probe beside the tasks,
    never trained or evolved on: [{method, length, score, logprob, seed}]."""
    rows = []
    for times, method in itertools.product([times for times in config.report_at if times <= 4], ("full", "namm")):
        rng = np.random.default_rng([config.seed, 9, times])
        batches = [on_device(data.batch(part, [data.quote] * config.rows, rng, times * config.length), config.device)
                   for _ in range(math.ceil(config.report_prompts / config.rows))]
        exact, _, logprob, _ = ask(gpt, batches, config, *rule(method, params, statistics, None, config))
        rows.append(dict(method=method, length=times * config.length, score=exact.mean().item(),
                         logprob=logprob.mean().item(), seed=config.seed))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 6. Tables and pictures

def save(path, write):
    """Call write(temporary path), then move the file to `path`: after a crash it is there whole, or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path, device="cpu"):
    """What torch.save wrote to `path`, or None if there is no such file. A file from a stranger runs no code. Raises
    ValueError, with a line for the user, for one that is damaged."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                                             # torch.load raises many kinds
        raise ValueError(f"{path}: damaged, or not a file of this program ({type(error).__name__}); delete it, and what it "
                         f"held is computed again") from None


def spread(values, digits=2):
    """Mean, and standard deviation if there are several, as text."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def lead(rows):
    """How much NAMM's mean over tasks and seeds is above a method's, from that method's rows: (mean, half a 95 % interval)."""
    return np.mean([row["lead"] for row in rows]), 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in rows)) / len(rows)


def table(rows):
    """The rows as Markdown, one table for each length; rows of several seeds become their mean, with the standard deviation
    of the seeds. Relative: ratio of the means over all tasks. Ahead: how much NAMM's mean over all tasks is above the
    method's, with a 95 % interval over prompts."""
    text, seeds = [], sorted({row["seed"] for row in rows})
    others = [task for task in data.TASKS if task not in data.EVOLVED]
    for length in sorted({row["length"] for row in rows}):
        at = [row for row in rows if row["length"] == length]
        cell = {(row["method"], row["task"], row["seed"]): row for row in at}
        mean = lambda method, tasks, seed: np.mean([cell[method, task, seed]["score"] for task in tasks])
        text += [f"\n{length} tokens\n",
                 f"| method | {' | '.join(data.TASKS)} | evolved on | other tasks | all | relative | cache | NAMM ahead |",
                 "|---" * (len(data.TASKS) + 7) + "|"]
        for method in dict.fromkeys(row["method"] for row in at):
            own = [row for row in at if row["method"] == method]
            over = lambda tasks: [mean(method, tasks, seed) for seed in seeds]
            relative = [mean(method, data.TASKS, seed) / mean("full", data.TASKS, seed) for seed in seeds]
            text.append(f"| {method} | " + " | ".join(f"{np.mean(over([task])):.2f}" for task in data.TASKS)
                        + f" | {spread(over(data.EVOLVED))} | {spread(over(others))} | {spread(over(list(data.TASKS)), 3)} | "
                        f"{spread(relative)} | {np.mean([row['cache'] for row in own]):.2f} | "
                        + ("" if method == "namm" else "{:+.3f} ± {:.3f}".format(*lead(own))) + " |")
    return "\n".join(text) + "\n"


def claims(rows):
    """Markdown, a line for each length: NAMM beside the full cache there, beside the full cache at the shortest length, where
    the GPT is at its best, and beside the best hand-made rule. Means over tasks, then over seeds; relative is a ratio of
    means, since a full cache's score near 0 would blow up the mean of the ratios."""
    seeds, lengths = sorted({row["seed"] for row in rows}), sorted({row["length"] for row in rows})
    others = [task for task in data.TASKS if task not in data.EVOLVED]
    cell = {(row["method"], row["length"], row["task"], row["seed"]): row["score"] for row in rows}
    text = ["| tokens | full cache | NTK | NAMM | relative | cache | of the best: evolved on | other tasks | all | best rule | "
            "NAMM ahead |", "|---" * 11 + "|"]
    for n in lengths:
        at = [row for row in rows if row["length"] == n]
        over = lambda method, tasks=data.TASKS, n=n: np.array([np.mean([cell[method, n, task, seed] for task in tasks])
                                                               for seed in seeds])
        best = max({row["method"] for row in at} & set(namm.BASELINES), key=lambda method: over(method).mean())
        share = lambda tasks: spread(over("namm", tasks) / over("full", tasks, lengths[0]))
        ahead = "{:+.3f} ± {:.3f}".format(*lead([row for row in at if row["method"] == best]))
        text.append(f"| {n} | {spread(over('full'))} | {spread(over('ntk'))} | {spread(over('namm'))} | "
                    f"{over('namm').mean() / over('full').mean():.2f} | {np.mean([r['cache'] for r in at if r['method'] == 'namm']):.2f} | "
                    f"{share(data.EVOLVED)} | {share(others)} | {share(list(data.TASKS))} | {best} {spread(over(best))} | {ahead} |")
    return "\n".join(text) + "\n"


def svg(path, width, height, body):
    """Write a picture that reads well on a light and on a dark page."""
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
                    'font-size="12"><style>text{fill:#333}path{fill:none;stroke-width:2}.g{stroke:#8886;stroke-width:1}'
                    f'@media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>{"".join(body)}</svg>')


COLORS = {"namm": "#e8590c", "h2o": "#1c7ed6", "tova": "#2f9e44", "snapkv": "#be4bdb", "streaming": "#868e96", "full": "#c92a2a"}


def picture_curve(rows, full, path):
    """Score against slots, one panel a length: rows of `curve`; full {length: score}, a dashed line."""
    body, slots = [], sorted({row["slots"] for row in rows})
    for panel, length in enumerate(sorted({row["length"] for row in rows})):
        x = lambda n: 40 + 240 * panel + 190 * math.log2(n / slots[0]) / math.log2(slots[-1] / slots[0])
        y = lambda score: 200 - 170 * score
        body.append(f'<text x="{x(slots[0])}" y="14">{length} tokens</text>')
        for tick in (0, 0.25, 0.5, 0.75, 1):
            body.append(f'<path class="g" d="M{x(slots[0])} {y(tick)}H{x(slots[-1])}"/>'
                        f'<text x="{x(slots[0]) - 28}" y="{y(tick) + 4}">{tick}</text>')
        body += [f'<text x="{x(n) - 7}" y="218">{n}</text>' for n in slots]
        lines = {method: [np.mean([row["score"] for row in rows if (row["method"], row["length"], row["slots"]) ==
                                   (method, length, n)]) for n in slots] for method in COLORS if method != "full"}
        for method, line in (lines | {"full": [full[length]] * len(slots)}).items():
            points = "L".join(f"{x(n):.0f} {y(score):.0f}" for n, score in zip(slots, line))
            body.append(f'<path stroke="{COLORS[method]}" d="M{points}"{" stroke-dasharray=" + chr(34) + "4" + chr(34) if method == "full" else ""}/>')
    for i, (method, color) in enumerate(COLORS.items()):
        body.append(f'<path stroke="{color}" d="M{40 + 110 * i} 240h20"/><text x="{65 + 110 * i}" y="244">{method}</text>')
    svg(path, 740, 255, body)


def picture_needle(rows, path):
    """Share of needles found, depth down, length across, one panel a method: rows of `report`."""
    body, lengths = ['<text x="0" y="60">first</text><text x="0" y="140">last fifth</text>'], sorted({row["length"] for row in rows})
    for panel, method in enumerate(FAR):
        body.append(f'<text x="{70 + 130 * panel}" y="14">{method}</text>')
        for column, depth in itertools.product(range(len(lengths)), range(5)):
            found = np.mean([row["depths"][depth] for row in rows if row["task"] == "needle" and row["method"] == method
                             and row["length"] == lengths[column] and row["depths"][depth] is not None])
            x, y = 70 + 130 * panel + 28 * column, 44 + 22 * depth
            body.append(f'<rect x="{x}" y="{y}" width="27" height="21" fill="rgb({200 - 160 * found:.0f},{60 + 90 * found:.0f},80)"/>'
                        f'<text x="{x + 3}" y="{y + 15}" style="fill:#fff;font-size:10px">{found:.2f}</text>')
        body += [f'<text x="{70 + 130 * panel + 28 * column}" y="38" style="font-size:9px">{n}</text>' for column, n in enumerate(lengths)]
    svg(path, 720, 160, body)


def summary(paths):
    """Markdown from the results.json of several runs. The first run and those that differ from it only in seed and base are
    one group: tables of means over seeds. All other runs are grouped by what they changed, one line a group."""
    runs = [json.loads(pathlib.Path(path).read_text()) for path in paths]
    if not runs or not all(isinstance(run, dict) and "report" in run for run in runs):
        raise ValueError("--summary: give it the results.json of one run or more")
    if runs[0]["config"]["methods"]:
        raise ValueError("--summary: the first run must have reported on all methods")
    free = {"seed", "base", "out", "device", "report_prompts", "far_prompts", "report_at", "methods"}
    first = runs[0]["config"]
    changed = lambda run: ", ".join(f"{k} {v}" for k, v in run["config"].items() if k not in free and v != first.get(k))
    groups = {}
    for run in runs:
        groups.setdefault(changed(run), []).append(run)
    rows = lambda name: [row for run in groups[""] for row in run[name]]
    text = [claims(rows("report")), table(rows("report"))]

    def grid(title, rows, across, value, cell):
        """A table of the mean of `cell` over seeds: a line a method, a column for each value(row)."""
        columns = sorted({value(row) for row in rows})
        text.append(f"\n{title}\n\n| method | {' | '.join(across.format(*column) for column in columns)} |\n"
                    + "|---" * (len(columns) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in rows):
            own = {c: [cell(row) for row in rows if row["method"] == method and value(row) == c] for c in columns}
            text.append(f"| {method} | " + " | ".join(f"{np.mean(own[c]):.2f}" if own[c] else "" for c in columns) + " |")

    grid("Bits per token of streamed text", rows("stream"), "{0}-{1}", lambda row: (row["from"], row["to"]),
         lambda row: row["bits"])
    grid("Six tokens quoted from anywhere: score of the two after them", rows("lost"), "{0} tokens", lambda row: (row["length"],),
         lambda row: row["score"])
    kept = [dict(row, method=row["kind"]) for row in rows("anatomy")]
    grid("Share kept, by kind of token", kept, "layer {0}, head {1}", lambda row: (row["layer"], row["head"]),
         lambda row: row["kept"])
    spectra = [dict(method=f"layer {row['layer']}, head {row['head']}", bin=f, ratio=kept / dropped) for row in rows("anatomy")
               if row["kind"] == "all" for f, (kept, dropped) in enumerate(zip(row["spectrum_kept"], row["spectrum_dropped"]))]
    grid("Mean spectrum of the tokens that stay over that of those that go, by frequency bin", spectra, "{0}",
         lambda row: (row["bin"],), lambda row: row["ratio"])
    full = {length: np.mean([row["seconds"] for row in rows("report") if row["method"] == "full" and row["length"] == length])
            for length in {row["length"] for row in rows("report")}}
    grid("Seconds for the same prompts, over the full cache's", rows("report"), "{0} tokens", lambda row: (row["length"],),
         lambda row: row["seconds"] / full[row["length"]])

    lengths = sorted({row["length"] for run in runs for row in run["report"]})
    text.append("\n| changed | seeds | " + " | ".join(f"{n} tokens: score, full cache's, cache" for n in lengths) + " |\n"
                + "|---" * (len(lengths) + 2) + "|")
    for change, group in groups.items():
        cells = []
        for n in lengths:
            at = [[row for row in run["report"] if row["length"] == n] for run in group]
            get = lambda method, key: [np.mean([row[key] for row in one if row["method"] == method]) for one in at if one]
            cells.append(f"{spread(get('namm', 'score'), 3)}, {np.mean(get('full', 'score')):.3f}, "
                         f"{np.mean(get('namm', 'cache')):.2f}" if any(at) else "")
        text.append(f"| {change or 'nothing'} | {len(group)} | " + " | ".join(cells) + " |")
    text += ["\nEvolution, run by run\n"] + [f"* seed {run['config']['seed']}: {json.dumps(run['evolution'])}" for run in groups[""]]
    print("\n".join(text))
    folder = pathlib.Path(paths[0]).parent
    full = {n: np.mean([row["score"] for row in rows("report") if row["method"] == "full" and row["length"] == n])
            for n in {row["length"] for row in rows("report")}}
    save(folder / "curve.svg", lambda path: picture_curve(rows("curve"), full, path))
    save(folder / "needle.svg", lambda path: picture_needle(rows("report"), path))


# ---------------------------------------------------------------------------------------------------------------------
# 7. Speed: python evolve.py --bench

def seconds(f, device, again=3):
    """Median time of f() `again` times, after one call that is not counted; of that one, if there is no other."""
    times = []
    for _ in range(1 + again):
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:] or times))


def shares(f, device):
    """{part: its share of the time of f(), as text} for the parts of NAMM and the rest, which is the GPT's."""
    with torch.profiler.profile() as profile:
        with torch.profiler.record_function("all"):
            f()
    time_of = {event.key: event.device_time_total if device == "cuda" else event.cpu_time_total
               for event in profile.key_averages()}
    part = {name: time_of[name] / time_of["all"] for name in ("spectrogram", "BAM", "eviction")}
    return {name: f"{share:.0%}" for name, share in {"GPT": 1 - sum(part.values()), **part}.items()}


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}                    # dense bfloat16 operations a second, data sheets


def bench(config, parts, gpt, evolved):
    """Print what everything costs on this device: reading against context length, the parts of NAMM, a population, CMA-ES,
    pre-training. evolved: what a namm.pt holds; None for random parameters, which evict about half."""
    device, delay, rows = config.device, config.delay, min(4, config.rows)
    if evolved is None:
        mean, std = feature_statistics(gpt, parts["evolve"], config)
        noise = np.random.default_rng(config.seed).standard_normal(len(namm.scale(config.scorer)))
        evolved = {"params": torch.from_numpy(noise).float(), "mean": mean, "std": std}
    params, *statistics = evolved["params"].to(device), evolved["mean"].to(device), evolved["std"].to(device)
    kinds = {"full cache, fused": (None, False), "full cache, written out": (lambda *_: None, True),
             "NAMM, nothing evicted": (manager(torch.zeros_like(params[None]), statistics, config, capacity=0), True),
             "NAMM": (manager(params[None], statistics, config), True)}
    print(f"{rows} rows, blocks of {delay} tokens, {torch.get_num_threads()} threads, {device}; tokens a second, and most slots\n\n"
          f"| tokens | {' | '.join(kinds)} | slots in memory, full cache | NAMM |\n" + "|---" * (len(kinds) + 3) + "|")
    for times in config.report_at:
        text = torch.from_numpy(np.stack([parts["report"].text(np.random.default_rng(i), times * config.length)
                                          for i in range(rows)])).long().to(device)
        slots, cells = [], []
        for manage, weights in kinds.values():
            most = 0

            def watched(layer, cache, received):
                nonlocal most
                most = max(most, cache.keys.shape[2])                      # before the eviction: survivors and a block
                if manage:
                    manage(layer, cache, received)

            def whole():
                cache = gpt.new_cache(rows, config.positions == "renumbered")
                with precision(device):
                    read(gpt, text, cache, delay, watched, weights)

            cells.append(f"{text.numel() / seconds(whole, device, 1):,.0f}")
            slots.append(str(most))
        print(f"| {text.shape[1]} | {' | '.join(cells)} | {slots[0]} | {slots[-1]} |", flush=True)
    print("\nshares of the time with NAMM, at the longest:", shares(whole, device))

    batch = prompts(parts["evolve"], "multikey", 1, np.random.default_rng(0), 4 * config.length, device)
    for popsize in (1, config.popsize, 2 * config.popsize):
        candidates = params + 0.1 * torch.randn(popsize, len(params), device=device)
        groups = candidates.split(config.rows)
        took = seconds(lambda: [evaluate(gpt, batch, config, manager(group, statistics, config), True) for group in groups], device)
        print(f"{popsize} candidates x 1 prompt of {batch.tokens.shape[1]} tokens: {popsize / took:.1f} a second")
    for diagonal in (True, False):
        es = CMAES(torch.zeros(namm.N_PARAMS), 0.6, 32, diagonal=diagonal)
        once = seconds(lambda: es.tell(es.ask()[:, 0]), "cpu")
        print(f"CMA-ES, n = {namm.N_PARAMS}, 32 candidates, {'diagonal' if diagonal else 'full'}: {once:.4f} s a generation"
              + ("" if diagonal else f"; an eigendecomposition every {es.lazy_gap}: {seconds(lambda: torch.linalg.eigh(es.C), 'cpu', 0):.1f} s"))
    words = data.training_batch(parts["train"], np.random.default_rng(0), config.batch_tokens // config.length, config.length, 0.25)
    took = seconds(lambda: train(gpt, lambda step: (*words, step), 4, 1e-9, precision(device)), device) / 4
    # 6 operations a weight and token, 12 a layer, head width and slot (Kaplan et al. 2020), as if nothing were sampled
    work = config.batch_tokens * (6 * sum(p.numel() for p in gpt.parameters()) + 12 * config.n_layer * config.n_head
                                  * config.head_dim * config.length)
    peak = next((peak for name, peak in PEAK.items() if device == "cuda" and name in torch.cuda.get_device_name()), None)
    print(f"pre-training: {config.batch_tokens / took:,.0f} tokens a second, {work / took / 1e9:,.1f} GFLOP/s"
          + (f", {work / took / peak:.0%} of peak" if peak else ""))


# ---------------------------------------------------------------------------------------------------------------------
# 8. Main

def prepare(config):
    """(folder, encoding, parts, sizes of the GPT, what earlier runs left: {name: state or None}). Writes nothing, and looks at
    all that can be refused: raises ValueError, with a line for the user."""
    texts = data.split(data.documents(config.corpus or None))
    out, source = pathlib.Path(config.out), pathlib.Path(config.base or config.out)
    encoding = data.tokenizer(config.tokenizer, config.vocab_size, source / "tokenizer.tiktoken", texts["train"])
    parts = data.make_parts(texts, encoding, config.length * max(*config.evolve_at, *config.report_at))
    names = [f.name for f in dataclasses.fields(GPTConfig)]
    sizes = {name: value for name, value in vars(config).items() if name in names} | {"vocab_size": encoding.n_vocab}
    made, path = out / "config.json", source / "gpt.pt"
    if made.exists():
        old, new = json.loads(made.read_text()), json.loads(json.dumps(vars(config)))
        differs = {name: value for name, value in new.items() if name not in FREE and old.get(name) != value}
        if differs:
            differs = ", ".join(f"{name} {value}" for name, value in differs.items())
            raise ValueError(f"{out} holds a run with other settings than {differs}; give another --out, or delete it")
    elif (out / "gpt.pt").exists():
        raise ValueError(f"{out} holds a gpt.pt but no config.json: it is not a run of this version; give another --out")
    if config.base and not path.exists():
        raise ValueError(f"--base {config.base}: the folder has no gpt.pt")
    found = {"gpt": load(path, config.device), "training": load(out / "training.pt", config.device),
             "evolution": load(out / "evolution.pt"), "namm": load(source / "namm.pt", config.device)}
    return out, encoding, parts, sizes, found


def restored(checkpoint, device):
    """The GPT of a gpt.pt."""
    gpt = GPT(GPTConfig(**checkpoint["config"])).to(device)
    gpt.load_state_dict(checkpoint["model"])
    return gpt.eval()


def base_model(out, part, sizes, found, config, log):
    """The GPT that was found, or a new one, trained on the part and saved."""
    if found["gpt"]:
        log("GPT: that of an earlier run")
        return restored(found["gpt"], config.device)
    state = found["training"]
    torch.manual_seed(config.seed)
    gpt = GPT(GPTConfig(**sizes)).to(config.device)
    lengths = sorted(config.length >> k for k in range(config.length.bit_length()) if config.length >> k >= 64)

    def sample(step):
        """The shortest prompts at first, then all lengths but the longest, then mostly that. The heads are asked to recall once
        they have found their work."""
        rng, done = np.random.default_rng([config.seed, 0, step]), step / config.steps
        last = np.array([1] * (len(lengths) - 1) + [2 * len(lengths[1:]) or 1])
        length = int(lengths[0] if done < 0.25 else rng.choice(lengths[:-1] or lengths) if done < 0.5
                     else rng.choice(lengths, p=last / last.sum()))
        batch, words = data.training_batch(part, rng, config.batch_tokens // length, length,
                                           config.recall if done >= 0.25 else 0.0)
        return batch, words, config.seed * 1_000_003 + step

    log(f"training a GPT of {sum(p.numel() for p in gpt.parameters()):,} parameters"
        + (f", from step {state['step']}" if state else ""))
    start = time.time()
    train(gpt, sample, config.steps, config.lr, precision(config.device), state, lambda state: keep(out / "training.pt", state))
    log(f"{config.steps * config.batch_tokens:,} tokens of training in {time.time() - start:.0f} s")
    keep(out / "gpt.pt", {"config": vars(gpt.config), "model": gpt.state_dict()})
    if world()[0] == 0:
        (out / "training.pt").unlink(missing_ok=True)
    return gpt.eval()


def keep(path, state):
    """Save tensors and numbers; the first process does."""
    if world()[0] == 0:
        save(path, lambda temporary: torch.save(state, temporary))


def run(config, out, parts, sizes, found):
    """Train, evolve, report; the files of the run go to the folder `out`. What an earlier run left there is not done again."""
    start = time.time()

    def log(line):
        if world()[0] == 0:
            tqdm.write(line)
            with open(out / "log.txt", "a") as file:
                file.write(line + "\n")

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "device": torch.cuda.get_device_name() if config.device == "cuda" else f"{platform.machine()} CPU, "
                f"{torch.get_num_threads()} threads"}
    log(f"{json.dumps(dataclasses.asdict(config))}\n{json.dumps(versions)}")
    for name, part in parts.items():
        log(f"{name:8s}{len(part.tokens):10,} tokens of text, {len(part.words):5,} words for keys")
    gpt = base_model(out, parts["train"], sizes, found, config, log)
    params, statistics, cost = evolve(gpt, parts, config, log, found["evolution"],
                                      lambda state: keep(out / "evolution.pt", state))
    if world()[0] > 0:                                                     # the report is written by the first process
        return
    mean, std = (x.cpu() for x in statistics)
    keep(out / "namm.pt", {"params": params, "mean": mean, "std": std})
    result = {"config": dataclasses.asdict(config), "versions": versions, "evolution": cost}
    for section in (report, stream, curve, anatomy, lost)[:1 if config.methods else None]:
        result[section.__name__] = section(gpt, params, statistics, parts["report"], config)
    result["seconds"] = time.time() - start
    save(out / "results.json", lambda path: path.write_text(json.dumps(result).replace("}, {", "},\n {")))
    log(table(result["report"]))
    log(f"{out / 'results.json'} holds all of it; {time.time() - start:.0f} s")


def main():
    """The whole run; what the user can mend ends in one line and exit code 2, before any work is done."""
    try:
        if sys.argv[1:2] == ["--summary"]:
            return summary(sys.argv[2:])
        benching = "--bench" in sys.argv
        config = parse([word for word in sys.argv[1:] if word != "--bench"])
        if "WORLD_SIZE" in os.environ:                                     # torchrun --nproc-per-node=N evolve.py ...
            torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        out, encoding, parts, sizes, found = prepare(config)
        if not benching and world()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
            save(out / "config.json", lambda path: path.write_text(json.dumps(vars(config), indent=1)))
            if config.tokenizer == "learned":
                save(out / "tokenizer.tiktoken", lambda temporary: data.save_ranks(encoding, temporary))
    except (ValueError, OSError) as error:
        print(f"evolve.py: {error}", file=sys.stderr)
        sys.exit(2)
    if benching:                                                           # of what is there, else of any weights
        gpt = restored(found["gpt"], config.device) if found["gpt"] else GPT(GPTConfig(**sizes)).to(config.device).eval()
        return bench(config, parts, gpt, found["namm"])
    try:
        run(config, out, parts, sizes, found)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from here, and so does: python evolve.py --resume {out}")


if __name__ == "__main__":
    main()
