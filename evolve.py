"""python evolve.py: train a small GPT, evolve the network that manages its cache, and report.

Read in this order:
  1. Config       every setting, with its help; presets
  2. CMAES        the evolution strategy, after Hansen's tutorial (arXiv 1604.00772), whose equation numbers it gives
  3. evaluate     prompts through the cache, the questions afterwards, and the scores
  4. evolve       the loop: candidates, prompts, fitness, stages, validation; afterwards, where zero lies without a limit
  5. report       every method on every task and length; then stream, curve, anatomy, lost: the same question in other ways
  6. table, page  files, tables, pictures, report.html, `--show RUN`, `--summary RUN/results.json ...`
  7. bench        `--bench`: what it costs
  8. main
"""

import argparse
import copy
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                                        # Windows: nothing locks a run's folder there
    fcntl = None

import data
import model
import namm
from model import GPT, GPTConfig, read, summed, train, world


# --- 1. Config -------------------------------------------------------------------------------------------------------

def setting(default, help, choices=None):
    """A field of Config with its help, and all that it can be, if that is a few words."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every setting; `python evolve.py --help` prints this list."""
    out: str = setting("", "folder of the run; runs/PRESET if not given")
    base: str = setting("", "folder of a finished run whose GPT, tokeniser, length and text to use instead of training")
    eval: str = setting("", "folder of a finished run to report on again: other lengths, texts, limits")
    seed: int = setting(0, "of everything: GPT, prompts, candidates")
    device: str = setting("", "if not given, cuda where there is one", ("cpu", "cuda"))
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
    recall: float = setting(0.25, "in training, share of the places (but for long words) where a head must name a word to remember")
    # the cache
    delay: int = setting(32, "tokens between two evictions, a multiple of 16")
    capacity: int = setting(28, "most slots that NAMM keeps in a head, in the mean over heads and layers; 0 for any number")
    slots: str = setting("shared", "whose best stay: those of all heads and layers, or of each head", ("shared", "own"))
    threshold: float = setting(0.0, "a token that scores less leaves the cache; without a limit, counted from where evolution set zero")
    positions: str = setting("renumbered", "of keys: in the cache, or in the text (paper)", ("renumbered", "original"))
    # the manager
    features: str = setting("all", "what a token is judged by (see namm.py)", namm.SEES)
    scorer: str = setting("bam", "how (see namm.py)", tuple(namm.SCORERS))
    heads: str = setting("apart", "each head drops its own tokens, or a layer's drop the same", ("apart", "together"))
    # evolution
    evolve_on: str = setting("passage,kv,copy", "tasks to evolve on; all others in the report are new to the manager")
    generations: int = setting(60, "generations")
    stages: int = setting(1, "1: all tasks from the start; more: one more task in each of so many equal stages")
    popsize: int = setting(16, "candidates in a generation")
    sigma: float = setting(0.6, "first step size; a weight's is this over the root of the number of its inputs")
    covariance: str = setting("diagonal", "what is adapted of it", ("diagonal", "full"))
    prompts: int = setting(4, "fresh prompts for each task in a generation, the same for all candidates")
    evolve_at: tuple = setting((1, 2, 4), "lengths to evolve at, in training lengths, drawn for each task and generation")
    validate: int = setting(5, "generations between two validations of the average mean")
    choose_prompts: int = setting(8, "prompts for each task in a validation")
    # report
    report_prompts: int = setting(8, "prompts for each task and length in the report")
    far_prompts: int = setting(2, "the same beyond 4 times the training length")
    report_at: tuple = setting((1, 4, 8, 16), "lengths to report at, in training lengths")
    methods: str = setting("", "methods to report on, such as namm,full, and no more than that; if not given, all")
    rows: int = setting(64, "rows (candidates x prompts) read at once; all are padded to the largest cache")


PRESETS = {
    "cpu": {},
    "smoke": dict(length=64, steps=20, batch_tokens=1024, n_embd=32, head_dim=8, n_hidden=64, delay=16, capacity=24,
                  generations=3, popsize=4, prompts=1, validate=1, choose_prompts=1, report_prompts=2, far_prompts=1,
                  report_at=(1, 4, 8)),
    "gpu": dict(vocab_size=8192, n_layer=4, n_head=8, n_kv_head=2, n_embd=768, head_dim=96, n_hidden=2048, length=2048,
                steps=400, batch_tokens=65_536, lr=2e-3, delay=64, capacity=128, generations=15, popsize=32, choose_prompts=16,
                report_prompts=32, far_prompts=16, rows=512),
}
FREE = ("out", "device", "methods", "report_prompts", "far_prompts", "report_at", "rows")   # may change when a run goes on
SIZES = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(Config, f.name) and f.name != "rope_scale"]   # what a GPT fixes


def numbers(text):
    """ "4,1,2" -> (1, 2, 4)."""
    return tuple(sorted({int(number) for number in text.split(",")}))


def text(value):
    """A path or a name on the command line, which a shell variable that is not set leaves empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("needs a folder, a file or a name, and got an empty text")
    return value


def joined(words):
    """The command line with "--threshold -1e-3" as one word: argparse would take -1e-3 for an option."""
    done = []
    for word in words:
        if done and re.fullmatch(r"--\w+", done[-1]) and re.match(r"-[.\d]", word):
            done[-1] += "=" + word
        else:
            done.append(word)
    return done


def settings_of(folder):
    """{name: value}, the settings of the run in a folder. Raises ValueError, with a line for the user, if there is none, or one
    that this version cannot read."""
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: the folder holds no run (no config.json)")
    try:
        own = {name: tuple(value) if isinstance(value, list) else value
               for name, value in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: damaged, or not a file of this program; delete the folder, or give another")
    if foreign := set(own) - {f.name for f in dataclasses.fields(Config)}:
        raise ValueError(f"{folder}: a run of another version, with settings unknown here ({', '.join(sorted(foreign))})")
    return own


def parse(argv=None):
    """(Config, what to do with it: "run", "bench", or the task to show) from the command line. Raises ValueError, with a line
    for the user, for what cannot be."""
    parser = argparse.ArgumentParser(description="Train a small GPT, evolve the manager of its cache, report.",
                                     usage="python evolve.py [--preset cpu|gpu|smoke] [--OPTION VALUE ...]",
                                     epilog="python evolve.py --summary RUN/results.json ... prints the tables of runs",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="smoke takes half a minute; if not given, gpu where there is one")
    for f in dataclasses.fields(Config):
        shown = ",".join(map(str, f.default)) if f.type is tuple else f.default
        choices = f.metadata["choices"]
        parser.add_argument("--" + f.name, type={tuple: numbers, str: text}.get(f.type, f.type), metavar="|".join(choices or ["VALUE"]),
                            help=f.metadata["help"] + f" [{shown}]" * (shown != ""))
    parser.add_argument("--resume", type=text, metavar="RUN", help="go on with the run in this folder, with its settings")
    parser.add_argument("--show", type=text, metavar="RUN", help="print a prompt, the answers, and what a finished run keeps of it")
    parser.add_argument("--task", choices=data.TASKS, default="needle", help="of the prompt to show")
    parser.add_argument("--bench", action="store_true", help="print how fast it is here, with the GPT of --base, if given")
    given = vars(parser.parse_args(joined(sys.argv[1:] if argv is None else argv)))
    for name in {"corpus", "base", "eval", "resume", "show"} & set(given):          # the same from any working folder
        given[name] = str(pathlib.Path(given[name]).resolve())
    task, bench, show, resume = (given.pop(name, None) for name in ("task", "bench", "show", "resume"))
    action = task if show else "bench" if bench else "run"
    if folder := show or resume or given.get("eval"):
        out = pathlib.Path(folder) / ("" if show or resume else "eval")
        given = settings_of(folder) | {"out": str(out)} | given
    if given.get("base"):
        own, taken = settings_of(given["base"]), {*SIZES, "rope_scale", "tokenizer", "corpus", "length"}
        if action == "bench":                                              # to measure its speed: all that it was made with
            taken = set(own) - {"out", "base", "eval", "device"}
        given = {name: value for name, value in own.items() if name in taken} | given
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = given.pop("preset", "gpu" if device == "cuda" else "cpu")
    # a benchmark writes nothing: in a folder that nobody makes it finds no GPT and no tokeniser of other sizes
    config = Config(**{"out": f"runs/{'bench' if action == 'bench' else preset}", **PRESETS[preset], **given, "device": device})
    check(config)
    return config, action


def check(c):
    """Raise ValueError for settings that cannot be."""
    for f in dataclasses.fields(c):
        value, choices = getattr(c, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"--{f.name} is one of {', '.join(choices)}")
        if f.type is not str and f.name not in ("seed", "recall", "capacity", "threshold") and not all(
                0 < x < math.inf for x in (value if f.type is tuple else (value,))):                     # nor NaN
            raise ValueError(f"--{f.name} must be above 0")
    shortest, evolved = c.length * min(c.evolve_at), c.evolve_on.split(",")
    for holds, message in [
        (c.device == "cpu" or torch.cuda.is_available(), "--device cuda: this PyTorch finds no CUDA device"),
        (set(evolved) <= set(data.TASKS) and len(set(evolved)) == len(evolved),
         f"--evolve_on: one or more of {', '.join(data.TASKS)}, each once"),
        (1 <= c.stages <= min(len(evolved), c.generations),
         f"--stages is 1 to the number of tasks to evolve on, here {len(evolved)}, and at most --generations"),
        (c.head_dim % 2 == 0 and c.head_dim > 2, "--head_dim must be even, and 4 or more"),
        (c.n_head % c.n_kv_head == 0, "--n_head must be a multiple of --n_kv_head"),
        (c.length >= 64 and c.length % 4 == 0, "--length must be a multiple of 4, and 64 or more"),
        (c.batch_tokens >= c.length, "--batch_tokens must be --length or more"),
        (c.delay % namm.HOP == 0, f"--delay must be a multiple of {namm.HOP}"),
        (c.delay <= shortest - data.room(shortest), f"--delay {c.delay}: the context of the prompts to evolve on has "
         f"{shortest - data.room(shortest)} tokens, so nothing would ever be evicted"),
        (c.popsize >= 4, "--popsize must be 4 or more"),
        (not c.methods or {"namm", "full"} <= set(c.methods.split(",")) <= set(METHODS),
         f"--methods: namm and full, and any of namm_free, ntk, {', '.join(namm.BASELINES)}; rules also with _shared or _last after "
         "the name"),
        (0 <= c.recall < 1, "--recall must be 0 or more, and below 1"),
        (0 <= c.seed < 2 ** 32, "--seed must be 0 or more, and below 2 ** 32"),
        (c.capacity >= 0, "--capacity must be 0 or more"),
        (not math.isnan(c.threshold), "--threshold must be a number"),
        (c.vocab_size > 266, "--vocab_size must be above 266: 256 bytes, ten digits, and what is learned"),
    ]:
        if not holds:
            raise ValueError(message)


def precision(device):
    """The one place that decides it: bfloat16 for matrix products on a GPU, float32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


# --- 2. CMA-ES -------------------------------------------------------------------------------------------------------

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
        mu = self.mu = lam // 2
        w = math.log((lam + 1) / 2) - torch.arange(1, lam + 1, dtype=torch.float64).log()           # (49)
        mu_eff = self.mu_eff = (w[:mu].sum() ** 2 / w[:mu].square().sum()).item()
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
        self.chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))                            # E|N(0, I)|
        # an eigendecomposition costs n^3 and C changes slowly: renew it only when C has moved
        self.lazy_gap = max(1, int(0.5 / (n * (self.c_1 + self.c_mu))))
        self.p_sigma, self.p_c = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self.C = (torch.ones if diagonal else torch.eye)(n, dtype=torch.float64)
        self.B, self.D = None, torch.ones(n, dtype=torch.float64)          # C = B D^2 B^T; B None: the identity

    def ask(self):
        """(popsize, n) candidates, x = mean + sigma B D z."""
        rng = np.random.default_rng([self.seed, self.generation])
        self.z = torch.from_numpy(rng.standard_normal((self.popsize, len(self.mean))))              # (38)
        y = self.z * self.D
        self.y = y if self.B is None else y @ self.B.T                                              # (39)
        return self.mean + self.sigma * self.y                                                      # (40)

    def tell(self, fitness):
        """Fitness of the candidates of the last ask(), higher is better; what is not finite counts as worst."""
        n, w = len(self.mean), self.weights
        fitness = torch.as_tensor(fitness, dtype=torch.float64).nan_to_num(nan=-math.inf, posinf=-math.inf)
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
        # covariance: one rank from the path of the mean, the others from this generation
        h_sigma = float(norm / math.sqrt(1 - (1 - self.c_sigma) ** (2 * (self.generation + 1)))     # 0 while the path is long
                        < (1.4 + 2 / (n + 1)) * self.chi_n)
        self.p_c = ((1 - self.c_c) * self.p_c
                    + h_sigma * math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff) * y_w)           # (45)
        w = torch.where(w >= 0, w, w * n / z.square().sum(1))                                       # (46)
        delta = (1 - h_sigma) * self.c_c * (2 - self.c_c)
        decay = 1 + self.c_1 * delta - self.c_1 - self.c_mu * self.weights.sum().item()
        rows = torch.cat([self.p_c[None], y])                                                       # (1 + popsize, n)
        gain = torch.cat([torch.tensor([self.c_1], dtype=torch.float64), self.c_mu * w])            # (1 + popsize,)
        self.generation += 1
        if self.diagonal:
            self.C = decay * self.C + gain @ rows.square()                                          # (47)
            self.D = self.C.sqrt()
            return
        self.C.addmm_((gain[:, None] * rows).T, rows, beta=decay)          # (47), in place: a third of the time
        if self.generation % self.lazy_gap == 0:
            self.C = (self.C + self.C.T) / 2
            variance, self.B = torch.linalg.eigh(self.C)
            self.D = variance.clamp(min=1e-20).sqrt()

    def state_dict(self):
        """All that changes, as tensors and numbers."""
        return copy.deepcopy({name: getattr(self, name) for name in ("mean", "sigma", "generation", "p_sigma", "p_c", "C", "B", "D")})

    def load_state_dict(self, state):
        """Go on from state_dict() of a CMAES made with the same arguments."""
        vars(self).update(copy.deepcopy(state))


# --- 3. Prompts through the cache ------------------------------------------------------------------------------------

def evaluate(gpt, batch, config, manage=None, weights=False, copies=1):
    """Read the contexts with the cache managed, then ask. Rows B = copies x prompts, if the manager makes copies.

    Returns four (B,), means over a prompt's answers, or over heads:
      exact       1 for an answer whose every token is the arg-max: what greedy decoding would write
      likelihood  of an answer's token: exp of the mean log-probability of its tokens
      logprob     that mean itself, natural logarithm
      cache       share of the context's tokens that is in the cache when the question is asked, mean over heads and layers
    At most `rows` rows are read at once, or, without a manager, as many tokens as those have at the training length. Out of memory,
    it goes on with half as many.
    """
    done, start, (N, L) = [], 0, batch.tokens.shape
    each = copies if manage else max(1, L // config.length)                # as how many rows a prompt counts
    while start < N:
        piece = batch.each(lambda x: x[start:start + max(1, config.rows // each)])
        try:
            got = scored(gpt, piece, config, manage, weights)
        except torch.OutOfMemoryError:
            if len(piece.tokens) == 1:
                raise
            config.rows = len(piece.tokens) * each // 2
            tqdm.write(f"out of memory: reading {config.rows} rows at once from here on")
        else:
            done.append([x.unflatten(0, (-1, len(piece.tokens))) for x in got])              # (copies,prompts) each
            start += len(piece.tokens)
    return [torch.cat(pieces, dim=1).flatten(0, 1) for pieces in zip(*done)]


@torch.no_grad()
def ask(gpt, batch, config, manage, weights):
    """Read the contexts, then the questions with their true answers. B rows, M answer tokens in all: (row (M,), place after the
    context (M,), logits there (M,V), tokens asked for (M,), share of the cache kept (B,))."""
    n = batch.context
    with precision(config.device):
        cache = gpt.new_cache(len(batch.tokens), config.positions == "renumbered")
        read(gpt, batch.tokens[:, :n], cache, config.delay if manage else n, manage, weights)    # uncut: in one block
        kept = model.kept(cache)                                                             # (B,)
        tokens, answer = (x[:, n:].repeat(cache[0].copies, 1) for x in (batch.tokens, batch.answer))         # (B,Q)
        row, at = answer.nonzero(as_tuple=True)                                              # (M,)
        hidden = gpt.hidden(tokens[:, :-1], cache)                                           # (B,Q-1,C)
        return row, at, gpt.output(hidden[row, at - 1]).float(), tokens[row, at], kept


def scored(gpt, batch, config, manage, weights):
    """What `evaluate` returns, in one go."""
    row, at, logits, target, kept = ask(gpt, batch, config, manage, weights)
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    wrong = (logits.argmax(-1) != target).float()
    B, N, A = len(kept), len(batch.tokens), int(batch.answer.max()) + 1
    group = row * A + batch.answer[row % N, batch.context + at]                              # (M,) which answer
    total = lambda x: torch.zeros(B * A, device=x.device).index_add(0, group, x).view(B, A)[:, 1:]
    size = total(torch.ones_like(wrong))                                                     # (B,A) tokens in it
    asked = (size > 0).float()
    mean = lambda x: (x * asked).sum(1) / asked.sum(1)                                       # (B,A) -> (B,)
    logprob = total(logprob) / size.clamp(min=1)                                             # (B,A)
    return mean(total(wrong) == 0), mean(logprob.exp()), mean(logprob), kept


def manager(solution, config, **changes):
    """NAMM as the settings say, of what a namm.pt holds: params (n,), or (P,n), mean and std (F,); and `zero`, from where the
    threshold counts when there is no limit: see `set_zero`."""
    params, mean, std = (solution[name].to(config.device) for name in ("params", "mean", "std"))
    switches = {"threshold": config.threshold, "capacity": config.capacity, "sees": config.features, "scorer": config.scorer,
                "per_head": config.heads == "apart", "shared": config.slots == "shared", **changes}
    switches["threshold"] += 0.0 if switches["capacity"] else solution.get("zero", 0.0)
    return namm.namm(torch.atleast_2d(params), mean, std, **switches)


def score(task, exact, logprob):
    """A task's score from its prompts, higher is better: the share of answers that are exact; for `lm` 1 / perplexity."""
    return (logprob.mean().exp() if task == "lm" else exact.mean()).item()


def prompts(part, task, count, rng, length, device):
    """`count` prompts of one task, on the device."""
    return data.batch(part, [task] * count, rng, length).each(lambda x: x.to(device))


# --- 4. Evolution ----------------------------------------------------------------------------------------------------

def feature_statistics(gpt, part, config):
    """{"mean", "std"} of the spectra over the full cache, (F,) each: collected once, then frozen."""
    totals = torch.zeros(3, namm.F, dtype=torch.float64, device=config.device)
    rng = np.random.default_rng([config.seed, 1])
    for task in config.evolve_on.split(","):
        batch, rows = prompts(part, task, 8, rng, config.length * max(config.evolve_at), config.device), None
        while rows != config.rows:                                         # again, if memory ran out: some were counted twice
            own, rows = torch.zeros_like(totals), config.rows
            evaluate(gpt, batch, config, namm.statistics(own, config.features), weights=True)
        totals += own
    return dict(zip(("mean", "std"), namm.mean_std(totals.cpu())))


def fitness(gpt, solution, best, part, tasks, lengths, count, rng, config):
    """(P,) fitness of solution["params"] (P,n), or (1,) of the full cache for solution None, and the share of the cache kept, mean
    over all. For each task at each of its lengths, on the same `count` prompts for all candidates: mean likelihood of the
    answers, divided by `best`, the full cache's at the training length; then the mean. The likelihood has no ties, as exact
    match has; and the paper's divisor, the full cache's score on the same prompts, is near 0 where it is to be beaten.

    lengths(rng) draws, for one task, the lengths of its prompts in training lengths. Candidates are dealt to the processes of the
    run in turn; each process gets all the results."""
    P, (rank, size), done = len(solution["params"]) if solution else 1, world(), 0
    total = torch.zeros(2, P, device=config.device)                        # fitness, cache kept
    for task in tasks:
        for times in lengths(rng):
            batch = prompts(part, task, count, rng, config.length * int(times), config.device)
            mine, at_once = range((rank - done) % size, P, size), max(1, config.rows // count)           # candidates
            for start in range(0, len(mine), at_once):
                group = list(mine[start:start + at_once])
                manage = manager(solution | {"params": solution["params"][group]}, config) if solution else None
                _, likelihood, _, cache = evaluate(gpt, batch, config, manage, bool(solution), len(group))
                total[:, group] += torch.stack([likelihood / best[task], cache.float()]).view(2, -1, count).mean(2)
            done += 1
    total = summed(total).cpu() / done
    return total[0], total[1].mean().item()


def set_zero(gpt, solution, part, config, log, validate):
    """The score from which on tokens stay without a limit. While the limit decides, evolution has no reason to put zero anywhere;
    the paper, which has none, has it found with the rest. So it is looked for afterwards: of the scores that a half to a tenth of
    the tokens of a full cache reach, the highest that costs no more than 0.01 of the fitness that the best of them gives."""
    scores, values, shortest = [], {}, config.length * min(config.evolve_at)
    for task in config.evolve_on.split(","):
        batch = prompts(part, task, config.choose_prompts, np.random.default_rng([config.seed, 11]), shortest, config.device)
        cache = gpt.new_cache(len(batch.tokens), config.positions == "renumbered")
        everything = manager(solution, config, capacity=0, threshold=-math.inf)
        with precision(config.device):
            read(gpt, batch.tokens[:, :batch.context // config.delay * config.delay], cache, config.delay, everything, weights=True)
        scores += [layer.state["score"].flatten() for layer in cache]
    scores, free = torch.cat(scores).cpu(), dataclasses.replace(config, capacity=0)
    for share in (0.5, 0.4, 0.3, 0.2, 0.1):
        zero = float(np.quantile(scores, 1 - share))
        [value], kept = validate(solution | {"params": solution["params"][None], "zero": zero}, free)
        values[zero] = value.item()
        log(f"no limit, zero at {zero:.2f}: fitness {value:.3f}, cache {kept:.1%}")
    return max((zero for zero, value in values.items() if value >= max(values.values()) - 0.01), default=0.0)


def evolve(gpt, parts, config, log, state, keep):
    """Evolve the manager of the cache. Returns what namm.pt holds: params (4172,), the features' mean and std, `zero`, and the cost.
    keep(state) is called after each generation; from that state evolution goes on to the same bits.

    Prompts are fresh in each generation, and fitness is noisy: so what is kept is an average of the means of the search
    distribution, the last ten of which count most, and of these averages the one that does best on the prompts to choose by, always
    the same and never evolved on. Generation 0, all zeros, drops nothing of its own accord: then only the capacity evicts."""
    evolved, part = config.evolve_on.split(","), parts["evolve"]
    statistics, rng = feature_statistics(gpt, part, config), np.random.default_rng([config.seed, 5])
    best = {task: evaluate(gpt, prompts(part, task, 16, rng, config.length, config.device), config)[1].mean().item()
            for task in evolved}                                           # what the GPT can do: full cache, training length
    first = len(evolved) - config.stages + 1                               # how many tasks the first stage has
    tasks_at = lambda g: evolved[:first + config.stages * max(0, g - 1) // config.generations]
    scale = namm.scale(config.scorer)                                      # one step size fits all weights
    es = CMAES(torch.zeros(len(scale)), config.sigma, config.popsize, config.seed, config.covariance == "diagonal")
    validate = lambda solution, config=config: fitness(                    # on prompts that are the same each time
        gpt, solution, best, parts["choose"], evolved, lambda rng: config.evolve_at, config.choose_prompts,
        np.random.default_rng([config.seed, 3]), config)
    [full], _ = validate(None)
    state = state or dict(next=0, es=es.state_dict(), average=es.mean, highest=-math.inf, seconds=0.0, history=[],
                          chosen=es.mean.float())                          # which stays, if no fitness is a number
    es.load_state_dict(state["es"])
    start = time.time() - state["seconds"]
    log(f"the full cache's fitness on the prompts to choose by: {full:.3f}")
    log("generation tasks | candidates: fitness   best  cache | mean: fitness  cache | sigma  axis ratio | seconds  left")
    for g in tqdm(range(state["next"], config.generations + 1), desc="evolve", initial=state["next"], mininterval=1,
                  total=config.generations + 1, dynamic_ncols=True, disable=True if world()[0] else None):
        began, tasks = time.time(), tasks_at(g)
        of_all, of_mean, point = " " * 33, " " * 20, {"generation": g, "sigma": es.sigma}
        if g:
            candidates = statistics | {"params": (es.ask() * scale).float()}
            got, kept = fitness(gpt, candidates, best, part, tasks, lambda rng: [rng.choice(config.evolve_at)], config.prompts,
                                np.random.default_rng([config.seed, 2, g]), config)
            es.tell(got)
            state["average"] = state["average"] + (es.mean - state["average"]) / min(g, 10)
            of_all = f"{got.mean():19.3f} {got.max():6.3f} {kept:6.1%}"
            point |= {"candidates": got.mean().item(), "best": got.max().item(), "cache": kept}
        if g % config.validate == 0 or g == config.generations:
            mean = (state["average"] * scale).float()
            [value], kept = validate(statistics | {"params": mean[None]})
            better = g > 0 and value > state["highest"]
            if better:
                state |= {"highest": value.item(), "chosen": mean}
            of_mean = f"{value:12.3f}{'*' if better else ' '} {kept:6.1%}"
            point["mean"] = value.item()
        left = (time.time() - start) / (g + 1) * (config.generations - g)
        log(f"{g:5d}/{config.generations:<4d} {len(tasks):5d} | {of_all} | {of_mean} | {es.sigma:5.3f} "
            f"{(es.D.max() / es.D.min()).item():11.2f} | {time.time() - began:7.1f} {left:4.0f}s")
        state["history"].append(point)
        if es.diagonal or g % config.validate == 0 or g == config.generations:     # a full covariance is 139 MB
            keep(state | {"next": g + 1, "es": es.state_dict(), "seconds": time.time() - start})
    passed = (point["generation"] for point in state["history"] if point.get("mean", -math.inf) > full.item())
    cost = {"generations": config.generations, "fitness of the full cache": full.item(),
            "passed the full cache at generation": next(passed, None), "seconds": time.time() - start,
            "candidate prompts read": config.popsize * config.prompts * sum(len(tasks_at(g + 1)) for g in range(config.generations))}
    log(f"evolution: {as_json(cost)}")
    solution = statistics | {"params": state["chosen"]}
    zero = set_zero(gpt, solution, parts["choose"], config, log, validate) if config.capacity else 0.0
    return solution | {"zero": zero, "cost": cost | {"history": state["history"]}}


# --- 5. Report -------------------------------------------------------------------------------------------------------

ALWAYS = ("namm", "namm_free", "full", "ntk")
METHODS = (*ALWAYS, *(rule + whose for whose in ("", "_shared", "_last") for rule in namm.BASELINES))
OTHERS = ("tova_shared", "snapkv_shared", "attended_shared", "recent_last", "snapkv_last", "attended_last")
NEAR = (*ALWAYS, *namm.BASELINES, *OTHERS)                                # to report on, if --methods says nothing else
FAR = (*ALWAYS, "streaming", "h2o", "tova", "snapkv", *OTHERS)            # beyond 4 x the training length
COLORS = {"namm": "#e8590c", "h2o": "#1c7ed6", "tova": "#2f9e44", "snapkv": "#be4bdb", "streaming": "#868e96", "full": "#c92a2a"}


def every_task(part, count, seed, length, device, tasks=tuple(data.TASKS)):
    """`count` prompts of each task, task by task, in one Batch on the device. seed: a list of numbers."""
    batches = [prompts(part, task, count, np.random.default_rng([*seed, t]), length, device) for t, task in enumerate(tasks)]
    return dataclasses.replace(batches[0], tokens=torch.cat([batch.tokens for batch in batches]),
                               answer=torch.cat([batch.answer for batch in batches]))


def slots_of(share, n, config):
    """Slots a head, in the mean, that the last eviction left of n tokens, from the share of them in the cache. What came after
    the last whole block was never judged, by any method, and does not count; without a whole block all n do."""
    return share * n - (n % config.delay if n >= config.delay else 0)


def rule(method, solution, slots, config):
    """(manager, does it look at the attention) of a method's name. `namm_free` is NAMM without the limit it was evolved with, as
    in the paper; `ntk` the full cache, its rotary base scaled by the caller. slots: what `namm` kept in the mean, and so what a
    baseline gets in each layer, or in the mean over layers if it ends in `_shared` or `_last` (in the last layer first)."""
    if method in ("full", "ntk"):
        return None, False
    if method in ("namm", "namm_free"):
        return manager(solution, config, **({"capacity": 0} if method == "namm_free" else {})), True
    name, whose = re.fullmatch("(.*?)(_shared|_last)?", method).groups()
    budget = max(1, math.ceil(slots - 1e-9))                               # a mean of 40, if rounding puts it just above
    return namm.baseline(name, budget, config.seed, whose == "_shared", whose == "_last"), name in namm.ATTENTIVE


def report(gpt, solution, part, config):
    """Every method on every task and length: [{method, task, length, score, logprob, relative, cache, seed, ...}].

    All methods answer the same prompts; those that evict read them in the same blocks, the others in one go. See README for the
    methods, and for their slots `rule`. `lead`: NAMM's score minus the method's; `lead_se`, its standard error over prompts, paired.
    `seconds`: for the prompts of all tasks, divided by the number of tasks. For needle, `depths`: the score by where it was, in
    five equal parts of the context."""
    wanted, rows = [m for m in METHODS if m in config.methods.split(",")], []
    chosen = {times: wanted or (NEAR if times <= 4 else FAR) for times in config.report_at}
    bar = tqdm(total=sum(map(len, chosen.values())), desc="report", mininterval=1, dynamic_ncols=True, disable=None)
    for times in config.report_at:
        length, count = times * config.length, config.report_prompts if times <= 4 else config.far_prompts
        batch, at, slots = every_task(part, count, [config.seed, 4, times], length, config.device), {}, None
        depth = data.depth(batch.each(lambda x: x.split(count)[list(data.TASKS).index("needle")]))  # (count,) in 0..4
        for method in chosen[times]:
            began = time.time()
            gpt.config.rope_scale = config.rope_scale * (times if method == "ntk" else 1)
            got = [x.cpu() for x in evaluate(gpt, batch, config, *rule(method, solution, slots, config))]
            taken = time.time() - began
            if method == "namm":
                slots = slots_of(got[3].mean().item(), batch.context, config)
            for task, exact, _, logprob, cache in zip(data.TASKS, *(x.split(count) for x in got)):       # (count,) each
                value = score(task, exact, logprob)
                # what each prompt adds to the score; for 1 / perplexity, to first order
                at[method, task] = value * (1 + logprob - logprob.mean()) if task == "lm" else exact
                gap = at["namm", task] - at[method, task]
                rows.append(dict(method=method, task=task, length=length, score=value, logprob=logprob.mean().item(),
                                 relative=None, cache=cache.mean().item(), seed=config.seed, lead=gap.mean().item(),
                                 lead_se=(gap.var(correction=min(1, count - 1)) / count).sqrt().item(), seconds=taken / len(data.TASKS)))
                if task == "needle":
                    rows[-1]["depths"] = [exact[depth == d].mean().item() if d in depth else None for d in range(5)]
            bar.update()
    gpt.config.rope_scale = config.rope_scale
    full = {(row["task"], row["length"]): row["score"] for row in rows if row["method"] == "full"}
    for row in rows:
        row["relative"] = row["score"] / base if (base := full[row["task"], row["length"]]) else None
    return rows


@torch.no_grad()
def stream(gpt, solution, part, config):
    """Bits per token of held-out text, read on and on, block by block: [{method, from, to, bits, cache}], positions in tokens.
    The baselines keep as many slots as NAMM has at the end."""
    rng, rows, slots = np.random.default_rng([config.seed, 6]), [], None
    ends = [times * config.length for times in config.report_at]
    text = torch.from_numpy(np.stack([part.text(rng, ends[-1]) for _ in range(min(16, config.rows))])).long().to(config.device)
    for method in ("namm", "namm_free", "full", "recent", "streaming", "h2o", "tova"):
        manage, weights = rule(method, solution, slots, config)
        cache, bits = gpt.new_cache(len(text), config.positions == "renumbered"), []
        for block in text.split(config.delay, dim=1):
            with precision(config.device):
                logits = gpt.output(read(gpt, block, cache, config.delay, manage, weights)).float()
            after = text[:, cache[0].seen - block.shape[1] + 1:cache[0].seen + 1]                # (B,T), or one fewer
            bits.append(torch.nn.functional.cross_entropy(logits[:, :after.shape[1]].transpose(1, 2), after,
                                                          reduction="none") / math.log(2))
        bits, share = torch.cat(bits, dim=1), model.kept(cache).mean().item()
        slots = slots or slots_of(share, ends[-1], config)
        rows += [{"method": method, "from": start, "to": end, "bits": bits[:, start:end].mean().item(), "cache": share,
                  "seed": config.seed} for start, end in zip([0] + ends, ends)]
    return rows


def curve(gpt, solution, part, config):
    """Score against slots: [{method, length, capacity, slots, score, seed}], means over tasks. One evolved vector gives NAMM's
    whole curve: the best by its scores, as many as the `capacity` is; the baselines keep as many. To save time few prompts a task,
    fewer beyond four times the training length, and none at eight times it."""
    rows = []
    for times in sorted(set(config.report_at) - {8}):
        length, count = times * config.length, min(8, config.report_prompts) if times <= 4 else min(2, config.far_prompts // 4)
        if not count:
            continue
        batch = every_task(part, count, [config.seed, 7, length], length, config.device)
        for share in (1 / 4, 1 / 2, 1, 2, 4):
            capacity, slots = math.ceil(share * (config.capacity or config.delay)), None
            cut = dataclasses.replace(config, capacity=capacity, threshold=-math.inf)            # only the capacity evicts
            for method in ("namm", "streaming", "h2o", "tova", "snapkv"):
                exact, _, logprob, cache = evaluate(gpt, batch, cut, *rule(method, solution, slots, cut))
                slots = slots or slots_of(cache.mean().item(), batch.context, config)
                got = zip(data.TASKS, exact.chunk(len(data.TASKS)), logprob.chunk(len(data.TASKS)))
                rows.append(dict(method=method, length=length, capacity=capacity, slots=slots, seed=config.seed,
                                 score=float(np.mean([score(*own) for own in got]))))
    return rows


@torch.no_grad()
def watch(gpt, solution, batch, config):
    """What becomes of each of the n tokens of N contexts, a dict for each layer: lives (N,K,n) bool, at the end; score (N,K,n),
    the last, NaN for a token never judged; spectrum (N,K,n,F), the last moving average of complete frames; seen [(K,n,F)],
    the first prompt's after each block, zero where the token is gone."""
    manage, n = manager(solution, config), batch.context
    new = lambda *last: batch.tokens.new_zeros(len(batch.tokens), config.n_kv_head, n, *last, dtype=torch.float)
    fate = [{"lives": new() == 0, "score": new() / 0, "spectrum": new(namm.F), "seen": []} for _ in gpt.layers]

    def record(own, layer, evict, keep):
        """Note what is known of each slot that is judged, at its position in the text, then evict."""
        row, head, slot = layer.alive.nonzero(as_tuple=True)
        at = row, head, layer.positions[row, head, slot]
        own["score"][at] = layer.state["score"][row, head, slot]
        own["spectrum"][at] = layer.state["spectrum"][row, head, slot]
        own["seen"].append(own["spectrum"][0] * own["lives"][0, ..., None])  # zero for what went before
        own["lives"][at] = keep[row, head, slot]
        evict(keep)

    cache = gpt.new_cache(len(batch.tokens), config.positions == "renumbered")
    for own, layer in zip(fate, cache):
        layer.evict = functools.partial(record, own, layer, layer.evict)   # in place of the method
    with precision(config.device):
        read(gpt, batch.tokens[:, :n], cache, config.delay, manage, weights=True)
    return fate


def anatomy(gpt, solution, part, config):
    """What NAMM keeps: [{layer, head, kind, kept, spectrum_kept, spectrum_dropped, seed}], over prompts of all tasks but
    `lm` at the longest length of evolution: share of the tokens of a kind that lives at the end of the context, and the mean
    spectra (F,) of those that stayed and of those that went, each when it was last judged."""
    rows, tasks = [], [task for task in data.TASKS if task != "lm"]
    batch = every_task(part, min(8, config.rows), [config.seed, 8], config.length * max(config.evolve_at), config.device, tasks)
    tokens, place = batch.tokens[:, :batch.context], torch.arange(batch.context, device=config.device)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    for row, own, answer in zip(asked, batch.tokens.cpu().numpy(), batch.answer.cpu().numpy()):
        row[data.told(own, answer, batch.context)] = True
    ends = torch.from_numpy(part.ends_line).to(tokens.device)[tokens]
    kinds = {"all": place >= 0, "to be asked for": asked, "before such a token": asked.roll(-1, 1) & ~asked,
             "first four": place < 4, "newest 32": place >= batch.context - 32, "line ends": ends & ~asked}
    mean = lambda x: x.mean(0).nan_to_num().tolist()                       # 0 for the mean of none
    for layer, fate in enumerate(watch(gpt, solution, batch, config)):
        for head, (kind, mask) in itertools.product(range(config.n_kv_head), kinds.items()):
            lives, score, spectrum = (fate[name][:, head][mask.expand_as(asked)] for name in ("lives", "score", "spectrum"))
            judged = score.isfinite()                                      # (M,), as lives; spectrum (M,F): all tokens of the kind
            rows.append(dict(layer=layer, head=head, kind=kind, kept=mean(lives.double()), seed=config.seed,
                             spectrum_kept=mean(spectrum[judged & lives]), spectrum_dropped=mean(spectrum[judged & ~lives])))
    return rows


def lost(gpt, solution, part, config):
    """What no manager can know in advance: six tokens from anywhere in the text, how does it go on? A probe beside the tasks,
    never trained or evolved on: [{method, length, score, logprob, seed}]."""
    rows = []
    for times, method in itertools.product([times for times in config.report_at if times <= 4], ("full", "namm", "namm_free")):
        rng = np.random.default_rng([config.seed, 9, times])
        batch = prompts(part, data.quote, config.report_prompts, rng, times * config.length, config.device)
        exact, _, logprob, _ = evaluate(gpt, batch, config, *rule(method, solution, None, config))
        rows.append(dict(method=method, length=times * config.length, score=exact.mean().item(),
                         logprob=logprob.mean().item(), seed=config.seed))
    return rows


# --- 6. Files, tables, pictures --------------------------------------------------------------------------------------

def save(path, content):
    """Write text, or a dict of tensors and numbers, beside `path`, then move it there: after a crash the file is whole, or as it
    was before. The first process does."""
    if world()[0] > 0:
        return
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")   # in memory first: a full disk is then an OSError
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                                  # still there: the disk is full, say


def as_json(x):
    """x as JSON. A number that is none becomes null: NaN and infinity are not JSON."""
    def finite(x):
        """x, with None for what is no number."""
        if isinstance(x, dict):
            return {name: finite(value) for name, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(x), allow_nan=False)


def load(path, names, device="cpu"):
    """What `save` wrote to `path`, a dict with these names; None if there is no such file. A file from a stranger runs no code.
    Raises ValueError, with a line for the user, for one that is damaged, foreign or older."""
    if not path.exists():
        return None
    try:
        state, why = torch.load(path, map_location=device, weights_only=True), "of another version"
        if names <= set(state):
            return state
    except Exception as error:                                             # torch.load raises many kinds
        why = f"damaged, or not a file of this program ({type(error).__name__})"
    raise ValueError(f"{path}: {why}; delete it, and what it held is computed again")


def spread(values, digits=2):
    """Mean, and standard deviation if there are several, as text."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def lead(rows, method, n):
    """How much NAMM's mean over tasks and seeds is above a method's at n tokens, and half a 95 % interval over prompts, as text."""
    own = [row for row in rows if (row["method"], row["length"]) == (method, n)]
    half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in own)) / len(own)
    return f"{np.mean([row['lead'] for row in own]):+.3f} ± {half:.3f}" if method != "namm" else ""


def markdown(title, head, lines):
    """Markdown, line by line: a title, and a table of these cells, all text; nothing if it has no lines."""
    row = lambda cells: f"| {' | '.join(cells)} |"
    return [f"\n{title}\n", row(head), "|---" * len(head) + "|", *map(row, lines)] if lines else []


def means(rows):
    """f(method, length, tasks, key) -> (seeds,): the mean over tasks, for each seed, of what `report` gave."""
    cell = {(row["method"], row["length"], row["task"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return lambda method, length, tasks=tuple(data.TASKS), key="score": np.array([np.mean([
        cell[method, length, task, seed][key] for task in tasks]) for seed in seeds if (method, length, tasks[0], seed) in cell])


def ratio(a, b):
    """a / b, nothing where b is 0: where the full cache scores nothing, there is nothing to compare with. Raises ValueError
    when they are not of the same runs."""
    if len(a) != len(b):
        raise ValueError("--summary: these runs reported at different lengths or on other methods; give it runs that agree")
    return [x / y for x, y in zip(a, b) if y] or [math.nan]


def unseen(evolved):
    """The tasks that a NAMM evolved on some has not met."""
    return [task for task in data.TASKS if task not in evolved]


def table(rows, evolved):
    """The rows as Markdown, one table for each length; rows of several seeds become their mean, with the standard deviation
    of the seeds. evolved: the tasks NAMM was evolved on. Relative: ratio of the means over all tasks. Ahead: how much NAMM's
    mean over all tasks is above the method's, with a 95 % interval over prompts."""
    over, text, others = means(rows), [], unseen(evolved)
    head = ["method", *data.TASKS, "evolved on", "other tasks", "all", "relative", "cache", "NAMM ahead"]
    for n in sorted({row["length"] for row in rows}):
        text += markdown(f"{n} tokens", head, [
            [method, *(f"{over(method, n, (task,)).mean():.2f}" for task in data.TASKS), spread(over(method, n, evolved)),
             spread(over(method, n, others)) if others else "", spread(over(method, n), 3),
             spread(ratio(over(method, n), over("full", n))), f"{over(method, n, key='cache').mean():.2f}", lead(rows, method, n)]
            for method in dict.fromkeys(row["method"] for row in rows if row["length"] == n)])
    return "\n".join(text) + "\n"


def claims(rows, evolved):
    """Markdown, a line for each length: NAMM, evolved on the tasks `evolved`, beside the full cache there, beside the full
    cache at the shortest length, where the GPT is at its best, and beside the best hand-made rule. Means over tasks, then over
    seeds; relative is a ratio of means, since a full cache's score near 0 would blow up the mean of the ratios."""
    over, reported = means(rows), lambda methods: {row["length"] for row in rows if row["method"] in methods}
    lengths, lines = sorted(reported(["ntk"]) & reported(namm.BASELINES)), []                # none with --methods
    for n in lengths:
        rules = {row["method"] for row in rows if row["length"] == n} & set(namm.BASELINES)
        best = max(sorted(rules), key=lambda method: over(method, n).mean())
        of_best = [spread(ratio(over("namm", n, tasks), over("full", lengths[0], tasks))) if tasks else ""
                   for tasks in (evolved, unseen(evolved), list(data.TASKS))]
        lines.append([f"{n}", *(spread(over(method, n)) for method in ("full", "ntk", "namm")),
                      spread(ratio([over("namm", n).mean()], [over("full", n).mean()])),
                      f"{over('namm', n, key='cache').mean():.3f}", *of_best, f"{best} {spread(over(best, n))}", lead(rows, best, n)])
    return "\n".join(markdown("", ["tokens", "full cache", "NTK", "NAMM", "relative", "cache", "of the best: evolved on",
                                   "other tasks", "all", "best rule", "NAMM ahead"], lines)).lstrip() + "\n"


def svg(width, height, body):
    """A picture that reads well on a light and on a dark page, as text."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" '
            'font-size="12"><style>text{fill:#333}path{fill:none;stroke-width:2}.g{stroke:#8886;stroke-width:1}'
            f'@media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>{"".join(body)}</svg>')


def plot(left, title, lines, xs, ys, log=False):
    """The parts of a plot, 190 wide: lines [(color, [(x, y)], dash)], xs and ys the ticks from the lowest to the highest."""
    f = math.log2 if log else float
    x = lambda value: left + 40 + 190 * (f(value) - f(xs[0])) / (f(xs[-1]) - f(xs[0]))
    y = lambda value: 200 - 170 * (value - ys[0]) / (ys[-1] - ys[0])
    body = [f'<text x="{left + 40}" y="14">{title}</text>']
    body += [f'<path class="g" d="M{left + 40} {y(tick):.0f}h190"/><text x="{left + 8}" y="{y(tick) + 4:.0f}">{tick:g}</text>'
             for tick in ys]
    body += [f'<text x="{x(tick) - 7:.0f}" y="218">{tick}</text>' for tick in xs]
    return body + [f'<path stroke="{color}" stroke-dasharray="{dash}" d="M'
                   + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points) + '"/>' for color, points, dash in lines if points]


def legend(names):
    """The parts of a line of colours and what they stand for: {name: color}."""
    return [f'<path stroke="{color}" d="M{40 + 110 * i} 240h20"/><text x="{65 + 110 * i}" y="244">{name}</text>'
            for i, (name, color) in enumerate(names.items())]


def cells(left, top, numbers, width=28, height=22, texts=True):
    """The parts of a table of numbers (rows, columns) in 0..1, as colours; None is left out."""
    return [f'<rect x="{left + width * c}" y="{top + height * r}" width="{width - texts}" height="{height - texts}" '
            f'fill="rgb({200 - 160 * x:.0f},{60 + 90 * x:.0f},80)"/>'
            + f'<text x="{left + width * c + 3}" y="{top + height * r + 15}" style="fill:#fff;font-size:10px">{x:.2f}</text>' * texts
            for r, row in enumerate(numbers) for c, x in enumerate(row) if x is not None]


def picture_curve(rows, report):
    """Score against slots, one panel a length: rows of `curve`; of `report` the full cache's score, a dashed line."""
    if not rows:                                                           # reported at eight times the length only
        return ""
    body, sizes, over = [], sorted({row["capacity"] for row in rows}), means(report)
    slots = [row["slots"] for row in rows]
    ticks = [2 ** k for k in range(math.floor(math.log2(min(slots))), math.ceil(math.log2(max(slots) + 1)) + 1)]
    for panel, length in enumerate(sorted({row["length"] for row in rows})):
        full = over("full", length).mean()
        lines = [(COLORS["full"], [(ticks[0], full), (ticks[-1], full)], 4)]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [[(row["slots"], row["score"]) for row in rows if (row["method"], row["length"], row["capacity"]) ==
                    (method, length, size)] for size in sizes]
            lines.append((COLORS[method], [np.mean(pairs, 0) for pairs in own], 0))
        body += plot(240 * panel, f"{length} tokens", lines, ticks, (0, 0.25, 0.5, 0.75, 1), log=True)
    return svg(20 + 240 * max(3, panel + 1), 255, body + legend(COLORS))


def picture_needle(rows):
    """Share of needles found, depth down, length across, one panel a method: rows of `report`."""
    body = ['<text x="0" y="60">first</text><text x="0" y="148">last fifth</text>']
    lengths = sorted({row["length"] for row in rows})
    methods = [method for method in FAR if any(row["method"] == method for row in rows)]
    for panel, method in enumerate(methods):
        found = [[[row["depths"][depth] for row in rows if (row["task"], row["method"], row["length"]) == ("needle", method, n)
                   and row["depths"][depth] is not None] for n in lengths] for depth in range(5)]
        left = 70 + (20 + 28 * len(lengths)) * panel
        body += cells(left, 44, [[np.mean(x) if x else None for x in row] for row in found])
        body += [f'<text x="{left}" y="14">{method}</text>']
        body += [f'<text x="{left + 28 * column}" y="38" style="font-size:9px">{n}</text>' for column, n in enumerate(lengths)]
    return svg(60 + len(methods) * (20 + 28 * len(lengths)), 160, body)


def picture_evolution(cost):
    """Fitness, share of the cache kept and sigma, generation by generation, of what `evolve` says that it cost; the fitness of
    the full cache is a dashed line."""
    history, full = cost["history"], cost["fitness of the full cache"]
    last = max(1, history[-1]["generation"])
    line = lambda key: [(point["generation"], point[key]) for point in history if key in point]
    ticks = lambda top: [float(f"{top * part:.3g}") for part in (0, 0.25, 0.5, 0.75, 1)]
    colors = {"candidates": "#868e96", "best": "#1c7ed6", "mean": "#e8590c", "full cache": "#c92a2a"}
    lines = [(colors[key], line(key), 0) for key in ("candidates", "best", "mean")]
    lines.append((colors["full cache"], [(0, full), (last, full)], 4))
    body = plot(0, "fitness", lines, (0, last), ticks(max(y for _, points, _ in lines for _, y in points)))
    for left, title, key in ((240, "cache kept", "cache"), (480, "sigma", "sigma")):
        body += plot(left, title, [("#868e96", line(key), 0)], (0, last), ticks(max(y for _, y in line(key))))
    return svg(740, 255, body + legend(colors))


def grid(title, rows, column, cell, digits=2):
    """Markdown, a title and a table, or nothing if there are no rows: the mean of cell(row) over tasks and seeds, a line for each
    row["method"], a column for each column(row)."""
    found = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(column(row), []).append(cell(row))
    columns = list(dict.fromkeys(map(column, rows)))
    return markdown(title, ["method", *columns], [
        [method, *(f"{np.mean(own[c]):.{digits}f}" if c in own else "" for c in columns)] for method, own in found.items()])


def changes(groups):
    """Markdown, a line for each group of runs, {what they changed: runs}: NAMM's score, the full cache's, share of the cache."""
    lengths, lines = sorted({row["length"] for group in groups.values() for run in group for row in run["report"]}), []
    for change, group in groups.items():
        of = means([row for run in group for row in run["report"]])
        lines.append([change or "nothing", f"{len(group)}", *(
            f"{spread(of('namm', n), 3)}, {of('full', n).mean():.3f}, {of('namm', n, key='cache').mean():.2f}"
            if len(of("namm", n)) else "" for n in lengths)])
    return markdown("", ["changed", "runs", *(f"{n} tokens: score, full cache's, cache" for n in lengths)], lines)


def summary(paths):
    """Print Markdown from the results.json of several runs, and draw pictures beside the first: curve, needle, evolution. The
    first run and those that differ from it only in seed, base, or what may change when a run goes on, are one group: tables of
    means over runs. All other runs are grouped by what they changed, one line a group."""
    groups = {}
    try:
        runs = [json.loads(pathlib.Path(path).read_text("utf-8")) for path in paths]
        settings = [vars(Config()) | run["config"] for run in runs]        # an older version's run lacks what had no choice then
        first = settings[0]
        for number, (run, own) in enumerate(zip(runs, settings)):
            changed = [f"{k} {v}" for k, v in own.items() if k not in (*FREE, "seed", "base", "eval") and v != first.get(k)]
            groups.setdefault(", ".join(changed), []).append(run)
            if {row["task"] for row in run["report"]} != set(data.TASKS):
                raise ValueError
            for row in run["report"]:                                      # one seed on two machines is two runs: sums differ
                row["seed"] = number
    except (ValueError, LookupError, TypeError):
        raise ValueError("--summary: give it the results.json of one run or more, all with the tasks of data.py") from None
    rows = lambda name: [row for run in groups[""] for row in run.get(name, [])]             # none of some, with --methods
    evolved = first["evolve_on"].split(",")
    over, tokens = means(rows("report")), lambda row: f"{row['length']} tokens"
    head = lambda row: f"layer {row['layer']}, head {row['head']}"
    spectra = [dict(method=head(row), bin=f"{f}", ratio=kept / (dropped or math.nan))
               for row in rows("anatomy") if row["kind"] == "all"
               for f, (kept, dropped) in enumerate(zip(row["spectrum_kept"], row["spectrum_dropped"]))]
    print("\n".join([
        claims(rows("report"), evolved),
        *grid("Score, mean over all tasks", rows("report"), tokens, lambda row: row["score"], 3), table(rows("report"), evolved),
        *grid("Bits per token of streamed text", rows("stream"), lambda row: f"{row['from']}-{row['to']}", lambda row: row["bits"]),
        *grid("Six tokens quoted from anywhere: score of the two after them", rows("lost"), tokens, lambda row: row["score"]),
        *grid("Share kept, by kind of token", [row | {"method": row["kind"]} for row in rows("anatomy")], head, lambda row: row["kept"]),
        *grid("Mean spectrum of the tokens that stay over that of those that go, by frequency bin", spectra, lambda row: row["bin"],
              lambda row: row["ratio"]),
        *grid("Seconds for the same prompts, over the full cache's", rows("report"), tokens,
              lambda row: row["seconds"] / over("full", row["length"], key="seconds").mean()),
        *changes(groups), "\nEvolution, run by run\n",
        *(f"* seed {run['config']['seed']}: {json.dumps({k: v for k, v in run['evolution'].items() if k != 'history'})}"
          for run in groups[""])]))
    pictures = {"curve": picture_curve(rows("curve"), rows("report")), "needle": picture_needle(rows("report")),
                "evolution": picture_evolution(runs[0]["evolution"])}
    for name in filter(pictures.get, pictures):                            # no curve, with --methods
        save(pathlib.Path(paths[0]).parent / f"{name}.svg", pictures[name])


def example(gpt, solution, part, config, task="needle"):
    """One prompt for people, of 1024 tokens, or the training length if more, no longer than evolution saw: {task, length,
    text [n], asked [{question, answer, full, namm}], heads [name], and for each head what `watch` gives: lives [n], score [n],
    spectrum [n][F], seen [blocks][n][F]}."""
    length = min(config.length * max(config.evolve_at), max(config.length, 1024))
    batch = prompts(part, task, 1, np.random.default_rng([config.seed, 10]), length, config.device)
    tokens, answer, n = batch.tokens[0].tolist(), batch.answer[0], batch.context
    replies = {method: ask(gpt, batch, config, *rule(method, solution, None, config))[2].argmax(-1).tolist()
               for method in ("full", "namm")}
    asked, start, done = [], n, 0
    for which in range(1, int(answer.max()) + 1):
        at = (answer == which).nonzero()[:, 0].tolist()
        own = {"question": tokens[start:at[0]], "answer": tokens[at[0]:at[-1] + 1]}
        own |= {method: reply[done:done + len(at)] for method, reply in replies.items()}
        asked.append({name: part.decode(piece) for name, piece in own.items()})
        start, done = at[-1] + 1, done + len(at)
    fate = watch(gpt, solution, batch, config)
    heads = list(itertools.product(range(config.n_layer), range(config.n_kv_head)))
    return dict(task=task, length=len(tokens), text=[part.decode([token]) for token in tokens[:n]], asked=asked,
                heads=[f"layer {layer}, head {head}" for layer, head in heads],
                seen=[block[-1].tolist() for block in fate[-1]["seen"]],
                **{x: [fate[layer][x][0, head].tolist() for layer, head in heads] for x in ("lives", "score", "spectrum")})


def questions(shown):
    """The questions of an `example` as text, a line each: question, answer, and what the GPT says with either cache."""
    return "\n".join(f"{own['question']!r:30} {own['answer']!r:20} full {own['full']!r:20} NAMM {own['namm']!r}"
                     for own in shown["asked"])


def show(shown):
    """Print an example: what is left of its context in each head (`~` for what went), its questions and answers."""
    print(f"{shown['task']}, {shown['length']} tokens\n\n" + "".join(shown["text"]))
    for name, lives in zip(shown["heads"], shown["lives"]):
        left = "".join(token if stays else "\0" for token, stays in zip(shown["text"], lives))
        print(f"\n--- what is left in {name}: {np.mean(lives):.0%}\n" + re.sub("\0+", "~", left))
    print("\n--- the questions, and what the GPT answers from the full cache and from what NAMM left of it")
    print(questions(shown))


def html_table(markdown):
    """Tables and titles of Markdown as HTML."""
    lines = [line for line in markdown.splitlines() if line and not line.startswith("|---")]
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in line.strip("|").split("|")) + "</tr>"
            if line.startswith("|") else f"</table><h3>{html.escape(line)}</h3><table>" for line in lines]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>NAMM</title><style>:root{color-scheme:light dark}body{font:16px/1.5 sans-serif;max-width:52rem;margin:auto;padding:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.75rem}td{padding:.1rem .5rem .1rem 0;white-space:nowrap}svg{max-width:100%}
#text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.75rem}
#token{position:sticky;bottom:0;min-height:6rem;padding:.5rem;background:Canvas;border-top:1px solid}</style></head><body>
"""

SCRIPT = """
const text = document.getElementById("text"), head = document.getElementById("head"), token = document.getElementById("token");
function paint() {                                  // each token as dark as the share of the chosen heads that kept it
  const heads = head.value < 0 ? shown.lives : [shown.lives[head.value]];
  [...text.children].forEach((span, i) =>
    span.style.background = `rgba(232, 89, 12, ${0.8 * heads.filter(lives => lives[i]).length / heads.length})`);
}
shown.text.forEach(piece => text.appendChild(document.createElement("span")).textContent = piece);
["all heads", ...shown.heads].forEach((name, i) => head.add(new Option(name, i - 1)));
head.onchange = paint;
text.onpointerover = text.onclick = event => {      // its score and its spectrum in the chosen head, or in the last one
  const i = [...text.children].indexOf(event.target), h = head.value < 0 ? shown.heads.length - 1 : head.value;
  if (i < 0) return;
  const top = Math.max(...shown.spectrum[h].map(x => Math.max(...x)), 1e-9), score = shown.score[h][i];
  const bars = shown.spectrum[h][i].map((x, f) =>
    `<rect x="${f * 9}" y="${50 - 50 * Math.sqrt(x / top)}" width="8" height="50" fill="#e8590c"/>`);
  token.textContent = `${JSON.stringify(shown.text[i])}, token ${i}, ${shown.heads[h]}: ` + (score === null ? "not judged yet"
    : `score ${score}`) + (shown.lives[h][i] ? ", stays" : ", went") + "; root of its spectrum, bins 0 to 16: ";
  token.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 153 50" width="153" height="50">${bars.join("")}</svg>`);
};
paint();
"""


def picture_seen(shown):
    """What NAMM sees of two tokens, of the highest score that stays and of the lowest that goes, in the last head of an `example`:
    the root of the spectrum, bins 0 to 16 down, one column for each block."""
    score, lives, seen = shown["score"][-1], shown["lives"][-1], shown["seen"]
    order = sorted((i for i, x in enumerate(score) if math.isfinite(x)), key=lambda i: score[i])
    stays, goes = [i for i in order if lives[i]][-1:], [i for i in order if not lives[i]][:1]
    body, top = [], max([x for i in stays + goes for frame in seen for x in frame[i]], default=0) or 1
    for left, what, i in [(10, "stays", i) for i in stays] + [(380, "goes", i) for i in goes]:
        body.append(f'<text x="{left}" y="14">{what}: {html.escape(repr(shown["text"][i]))}, token {i}</text>')
        body += cells(left, 24, [[(frame[i][f] / top) ** 0.5 for frame in seen] for f in range(namm.F)], 330 / len(seen), 9, texts=False)
    return svg(740, 180, body)


def page(result, shown):
    """report.html: pictures, text and tables of one run in one file that needs nothing else. shown: an `example`."""
    rows, evolved = result["report"], result["config"]["evolve_on"].split(",")
    kept = [[row["kept"] for row in result["anatomy"] if (row["kind"], row["layer"]) == ("all", layer)]
            for layer in range(result["config"]["n_layer"])]
    rounded = lambda x: [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.3g}") if math.isfinite(x) else None
    block = {"text": shown["text"], "heads": shown["heads"]} | {x: rounded(shown[x]) for x in ("lives", "score", "spectrum")}
    settings = json.dumps({key: result[key] for key in ("config", "versions", "seconds")}, indent=1)
    parts = {
        "The table": html_table(claims(rows, evolved) + table(rows, evolved)),
        "Evolution, generation by generation": picture_evolution(result["evolution"]),
        "Score against slots in a head": picture_curve(result["curve"], rows),
        "The needle, by depth and length": picture_needle(rows),
        f"The text itself, {shown['task']}: the darker, the more heads kept it": '<select id="head"></select><div id="text"></div>'
            f'<div id="token">Point at a token, or touch it.</div><pre>{html.escape(questions(shown))}</pre>',
        "Share of the tokens kept, layer (down) by head": svg(300, 20 + 22 * len(kept), cells(10, 10, kept)),
        "What NAMM sees of a token that stays and of one that goes, block by block": picture_seen(shown),
        "Settings": f"<pre>{html.escape(settings)}</pre>"}
    body = "".join(f"<h2>{html.escape(title)}</h2>{part}" for title, part in parts.items())
    block = json.dumps(block).replace("</", "<\\/")                         # nothing in the text can end the script
    return f"{PAGE}<h1>NAMM: what a run gave</h1>{body}<script>const shown = {block};{SCRIPT}</script></body></html>"


# --- 7. Speed: python evolve.py --bench ------------------------------------------------------------------------------

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


def profiled(f, device):
    """{name: (seconds, seconds without what it calls)} of the operations and regions of f() on this device, "all" for f itself."""
    with torch.profiler.profile() as profile, torch.profiler.record_function("all"):
        f()
    kind = "device" if device == "cuda" else "cpu"
    return {event.key: tuple(getattr(event, f"{own}{kind}_time_total") / 1e6 for own in ("", "self_"))
            for event in profile.key_averages()}


def percent(parts, total):
    """{part: its share of the total, as text}."""
    return {name: f"{part / total:.0%}" for name, part in parts.items()}


def bench_reading(gpt, solution, part, config):
    """Print how fast text is read, against context length: by the rivals, attention fused, and eager, which makes one matrix of a
    block's weights, as usual; by NAMM with nothing evicted, and as it is; and where the time goes."""
    device, delay, rows, piece = config.device, config.delay, min(4, config.rows), model.PIECE
    kinds = {"full cache, fused": (None, False), "full cache, eager": (None, True), "eager, in pieces": (None, True),
             "NAMM, nothing evicted": (manager(solution, config, capacity=0, threshold=-math.inf), True),
             "NAMM": (manager(solution, config), True)}
    print(f"{rows} rows, blocks of {delay} tokens, {torch.get_num_threads()} threads, {device}; tokens a second, and most slots a "
          "layer\n\n"
          f"| tokens | {' | '.join(kinds)} | slots in memory, full cache | NAMM |\n" + "|---" * (len(kinds) + 3) + "|")
    for times in config.report_at:
        text = torch.from_numpy(np.stack([part.text(np.random.default_rng(i), times * config.length)
                                          for i in range(rows)])).long().to(device)
        taken, slots = {kind: [] for kind in kinds}, {}
        for again, (kind, (manage, weights)) in itertools.product(range(4), kinds.items()):        # in turn: one noise for all
            model.PIECE, slots[kind] = delay if kind == "full cache, eager" else piece, 0          # eager as usual: one matrix

            def watched(cache, received):
                """The manager; notes the most slots that were in memory, mean over layers: survivors and a block."""
                slots[kind] = max(slots[kind], math.ceil(np.mean([layer.keys.shape[2] for layer in cache])))
                if manage:
                    manage(cache, received)

            def whole():
                """Read the text from an empty cache."""
                cache = gpt.new_cache(rows, config.positions == "renumbered")
                with precision(device):
                    read(gpt, text, cache, delay, watched, weights)

            taken[kind].append(seconds(whole, device, 0))
        speeds = [f"{text.numel() / np.median(taken[kind][1:]):,.0f}" for kind in kinds]           # the first warms up
        print(f"| {text.shape[1]} | {' | '.join(speeds)} | {slots['full cache, fused']} | {slots['NAMM']} |", flush=True)
    took = profiled(whole, device)
    own, total = {name: took[name][0] for name in ("spectrogram", "BAM", "eviction")}, took["all"][0]
    print("\nshares of the time with NAMM, at the longest:", percent({"GPT": total - sum(own.values()), **own}, total))


def bench(config, parts, gpt, solution):
    """Print what everything costs on this device: reading, a population, CMA-ES, pre-training. solution: what a namm.pt holds; None
    for random parameters, which evict about half."""
    device = config.device
    if solution is None:
        noise = np.random.default_rng(config.seed).standard_normal(len(namm.scale(config.scorer)))
        solution = feature_statistics(gpt, parts["evolve"], config) | {"params": torch.from_numpy(noise).float()}
    bench_reading(gpt, solution, parts["report"], config)
    for popsize in (1, config.popsize, 2 * config.popsize):                # dealt to the processes of the run, as in evolution
        some = solution | {"params": solution["params"] + 0.1 * torch.randn(popsize, len(solution["params"]))}
        took = seconds(lambda: fitness(gpt, some, {"multikey": 1.0}, parts["evolve"], ["multikey"], lambda rng: [4], 1,
                                       np.random.default_rng(0), config), device)
        print(f"{popsize} candidates x 1 prompt of {4 * config.length} tokens, processes {world()[1]}: {popsize / took:.1f} a second")
    for diagonal in (True, False):
        es = CMAES(torch.zeros(namm.N_PARAMS), 0.6, 32, diagonal=diagonal)
        once = seconds(lambda: es.tell(es.ask()[:, 0]), "cpu")
        print(f"CMA-ES, n = {namm.N_PARAMS}, 32 candidates, {'diagonal' if diagonal else 'full'}: {once:.4f} s a generation"
              + ("" if diagonal else f"; an eigendecomposition every {es.lazy_gap}: "
                 f"{seconds(lambda: torch.linalg.eigh(es.C), 'cpu', 0):.1f} s"))
    words = data.training_batch(parts["train"], np.random.default_rng(0), config.batch_tokens // config.length, config.length, 0.25)
    step = lambda count=4: train(gpt, [(*words, 0)] * count, count, 1e-9, precision(device))
    took = seconds(step, device) / 4
    # 6 operations a weight and token, 12 a layer, head width and slot (Kaplan et al. 2020), as if nothing were sampled
    work = config.batch_tokens * (6 * sum(p.numel() for p in gpt.parameters()) + 12 * config.n_layer * config.n_head
                                  * config.head_dim * config.length)
    peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12}               # dense bfloat16 operations a second, data sheets
    peak = next((peak for name, peak in peaks.items() if device == "cuda" and name in torch.cuda.get_device_name()), None)
    print(f"pre-training: {config.batch_tokens / took:,.0f} tokens a second, {work / took / 1e9:,.1f} GFLOP/s"
          + (f", {work / took / peak:.0%} of peak" if peak else ""))
    alone, kinds = {name: own for name, (_, own) in profiled(lambda: step(1), device).items() if name.startswith("aten::")}, {}
    for name, own in alone.items():
        kind = "attention" if "attention" in name else "matrix products" if name.endswith("mm") else "all else, which moves memory"
        kinds[kind] = kinds.get(kind, 0) + own
    print(f"of it the operations take {sum(alone.values()) / took:.0%}; of these {percent(kinds, sum(alone.values()))}")


# --- 8. Main ---------------------------------------------------------------------------------------------------------

def prepare(config, action):
    """(folder, encoding, parts, sizes of the GPT, what earlier runs left: {name: state or None}). Writes nothing, and looks at
    all that can be refused, the quickest first: raises ValueError, with a line for the user."""
    out, sources = pathlib.Path(config.out), [pathlib.Path(f) for f in (config.eval, config.base) if f]
    sources = sources or [out]                                             # where GPT and tokeniser are
    made, path = out / "config.json", next((f / "gpt.pt" for f in sources if (f / "gpt.pt").exists()), sources[-1] / "gpt.pt")
    if made.exists():
        old, finished = settings_of(out), (out / "results.json").exists() and not (out / "report.pt").exists()
        free = ("out", "device", "rows") if finished else FREE             # a finished report is not overwritten by another
        differs = ", ".join(f"{name} {value}" for name, value in vars(config).items() if name not in free and old.get(name) != value)
        if differs and action == "run":
            raise ValueError(f"{out} holds a {'finished ' * finished}run with other settings than {differs}; give another --out, or "
                             f"delete it{finished * '; --eval reports on it again'}")
    elif (out / "gpt.pt").exists():
        raise ValueError(f"{out} holds a gpt.pt but no config.json: it is not a run of this version; give another --out")
    if (config.base or config.eval) and not path.exists():
        raise ValueError(f"--{'base' if config.base else 'eval'} {path.parent}: the folder has no gpt.pt")
    own = sources[0] if config.eval and action == "run" or action == "bench" else out        # where the vector is
    dealt = next((f / "text.json" for f in (out, *sources) if (f / "text.json").exists()), None)    # what words mean there
    found = {"gpt": load(path, {"config", "model"}, config.device),
             "training": load(out / "training.pt", {"step", "model", "muon", "adamw"}, config.device),
             "evolution": load(out / "evolution.pt", {"next", "es", "average", "history"}),
             "namm": load(own / "namm.pt", {"params", "mean", "std", "zero", "cost"}),
             "report": load(out / "report.pt", {"config", "evolution"})}
    if found["gpt"]:
        own_sizes = found["gpt"]["config"]
        for name in SIZES:                                                 # the tokeniser decides vocab_size
            if name != "vocab_size" and own_sizes.get(name) != getattr(config, name):
                raise ValueError(f"--{name} {getattr(config, name)}: the GPT of {path.parent} has {own_sizes.get(name)}; leave the "
                                 "option out")
        own_sizes["rope_scale"] = config.rope_scale                        # may be another than in training
    if (config.eval and action == "run" or action in data.TASKS) and not found["namm"]:
        raise ValueError(f"{own}: the run is not finished (no namm.pt); python evolve.py --resume {own} goes on")
    if (config.eval or action != "run") and found["namm"] and len(found["namm"]["params"]) != len(namm.scale(config.scorer)):
        raise ValueError(f"--scorer {config.scorer}: the vector of {own} belongs to another; leave the option out")
    if not found["gpt"] and world()[1] > config.batch_tokens // config.length:
        raise ValueError(f"{world()[1]} processes, but a training step has {config.batch_tokens // config.length} rows to share; "
                         "start fewer, or give more --batch_tokens")
    if found["gpt"] and not dealt:
        raise ValueError(f"{path.parent}: a run of another version, without its words (no text.json)")
    try:
        record = json.loads(dealt.read_text("utf-8")) if dealt else None
    except ValueError:
        raise ValueError(f"{dealt}: damaged, or not a file of this program; take that of the run it belongs to") from None
    if action == "run" and world()[0] == 0:
        print("reading the text", flush=True)                              # which takes a few seconds
    texts, now = data.deal(data.documents(config.corpus or None), record)
    if record and dealt.parent == out and action == "run" and now["fingerprint"] != record["fingerprint"]:
        raise ValueError(f"{out}: this run was begun on another text than is here now: another Python, or changed files; go on with "
                         "those, or report on this text with --eval")
    encoding = data.tokenizer(config.tokenizer, config.vocab_size, sources[0] / "tokenizer.tiktoken", texts["train"])
    if found["gpt"] and found["gpt"]["config"]["vocab_size"] != encoding.n_vocab:
        raise ValueError(f"--tokenizer {config.tokenizer}: not that of the GPT of {path.parent}; leave the option out")
    parts, words = data.make_parts(texts, encoding, config.length * max(*config.evolve_at, *config.report_at),
                                   record and record["words"])
    found["text"] = now | {"words": words, "trained on": record["trained on"] if record else now["fingerprint"]}
    if record:                                                             # what was dealt once stays dealt
        found["text"]["split"] = record["split"] | now["split"]
    sizes = {name: getattr(config, name) for name in (*SIZES, "rope_scale")} | {"vocab_size": encoding.n_vocab}
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
        if not (out / "gpt.pt").exists():                                  # a run means what it says when its base is gone
            save(out / "gpt.pt", found["gpt"])
        return restored(found["gpt"], config.device)
    state = found["training"]
    torch.manual_seed(config.seed)
    gpt = GPT(GPTConfig(**sizes)).to(config.device)
    lengths = sorted(config.length >> k for k in range(config.length.bit_length()) if config.length >> k >= 64)

    def drawn(step):
        """A step's batch, words to recall, and seed. The shortest prompts at first, then all lengths but the longest, then
        mostly that. The heads are asked to recall once they have found their work."""
        rng, done = np.random.default_rng([config.seed, 0, step]), step / config.steps
        odds = np.array([1] * (len(lengths) - 1) + [2 * len(lengths[1:]) or 1])                  # of the longest: two of three
        length = int(lengths[0] if done < 0.25 else rng.choice(lengths[:-1] or lengths) if done < 0.5
                     else rng.choice(lengths, p=odds / odds.sum()))
        recall = config.recall if done >= 0.25 else 0.0
        batch, words = data.training_batch(part, rng, config.batch_tokens // length, length, recall)
        return batch, words, config.seed * 1_000_003 + step

    # a GPT on a CUDA device learns faster than one process writes prompts
    workers = {"num_workers": 4, "multiprocessing_context": "fork"} if config.device == "cuda" and hasattr(os, "fork") else {}
    batches = torch.utils.data.DataLoader(range(state["step"] if state else 0, config.steps), batch_size=None,
                                          collate_fn=drawn, **workers)
    log(f"training a GPT of {sum(p.numel() for p in gpt.parameters()):,} parameters"
        + (f", from step {state['step']}" if state else ""))
    start = time.time()
    train(gpt, batches, config.steps, config.lr, precision(config.device), state, lambda state: save(out / "training.pt", state))
    save(out / "gpt.pt", {"config": vars(gpt.config), "model": gpt.state_dict()})
    log(f"{len(batches) * config.batch_tokens:,} tokens of training in {time.time() - start:.0f} s")
    if world()[0] == 0:
        (out / "training.pt").unlink(missing_ok=True)
    return gpt.eval()


def notes(config, sizes, text):
    """What a user should know before the numbers come, a line each."""
    if config.tokenizer == "learned" and sizes["vocab_size"] < config.vocab_size:
        yield f"the text teaches a tokeniser {sizes['vocab_size']} tokens, fewer than --vocab_size {config.vocab_size}"
    if text["fingerprint"] != text["trained on"]:
        yield (f"another text ({text['fingerprint']}) than the GPT was trained on ({text['trained on']}): the same words, new "
               "documents; nothing that it was trained on is asked about")


def open_log(out):
    """The run's log.txt, locked as long as this process lives, or None in other processes than the first. Raises ValueError when
    another run is at work in the folder."""
    if world()[0] > 0:
        return None
    file = open(out / "log.txt", "a", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is at work in this folder; wait for it, or give another --out") from None
    return file


def run(config, out, parts, sizes, found, file):
    """Train, evolve, report; the files of the run go to the folder `out`. What an earlier run left there is not done again."""
    start = time.time()

    def log(line):
        """Add a line to log.txt and print it; the first process does."""
        if file:
            file.write(line + "\n")
            file.flush()
            tqdm.write(line)

    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                "device": torch.cuda.get_device_name() if config.device == "cuda" else f"{platform.machine()} CPU, "
                f"{torch.get_num_threads()} threads"}
    log(f"{json.dumps(dataclasses.asdict(config))}\n{json.dumps(versions)}")
    for name, part in parts.items():
        log(f"{name:8s}{len(part.tokens):10,} tokens of text, {len(part.words):5,} words for keys")
    for line in notes(config, sizes, found["text"]):
        log(line)
    gpt = base_model(out, parts["train"], sizes, found, config, log)
    solution = found["namm"] or evolve(gpt, parts, config, log, found["evolution"], lambda state: save(out / "evolution.pt", state))
    if world()[0] > 0:                                                     # the report is written by the first process
        return
    save(out / "namm.pt", solution)
    result, begun = {"config": dataclasses.asdict(config), "versions": versions, "evolution": solution["cost"]}, found["report"]
    result["text"] = {name: found["text"][name] for name in ("fingerprint", "trained on")}
    moot = {"rows": 0, "out": ""}                                          # change nothing
    if begun and begun["config"] | moot == result["config"] | moot:
        result = begun
    for section in (report, stream, curve, anatomy, lost)[:1 if config.methods else None]:
        if section.__name__ not in result:
            result[section.__name__] = section(gpt, solution, parts["report"], config)
            save(out / "report.pt", result)
    result["seconds"] = time.time() - start
    save(out / "results.json", re.sub(r'}, (?={"\w+":)', "},\n ", as_json(result)))
    if not config.methods:
        save(out / "report.html", page(result, example(gpt, solution, parts["report"], config)))
    (out / "report.pt").unlink()
    log(table(result["report"], config.evolve_on.split(",")))
    log(f"{out / 'results.json'} holds all of it" + f", {out / 'report.html'} shows it" * (not config.methods)
        + f"; {time.time() - start:.0f} s")


def refuse(why):
    """End with a line for the user and exit code 2; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"evolve.py: {why}", file=sys.stderr)
    sys.exit(2)


def main():
    """The whole run; what the user can mend ends in one line and exit code 2, before any work is done."""
    for stream in (sys.stdout, sys.stderr):                                # what a terminal cannot show is no reason to stop
        stream.reconfigure(errors="replace")
    try:
        if sys.argv[1:2] == ["--summary"]:
            return summary(sys.argv[2:])
        config, action = parse()
        if "WORLD_SIZE" in os.environ:                                     # torchrun --nproc-per-node=N evolve.py ...
            torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.enable_cudnn_sdp(False)                        # cuDNN plans anew for every number of slots it meets
        out, encoding, parts, sizes, found = prepare(config, action)
        if action == "run":
            out.mkdir(parents=True, exist_ok=True)
            file = open_log(out)
            save(out / "config.json", json.dumps(vars(config), indent=1))
            if config.tokenizer == "learned":
                save(out / "tokenizer.tiktoken", data.ranks_file(encoding))
            save(out / "text.json", json.dumps(found["text"]))
    except (ValueError, OSError) as error:
        refuse(error)
    if action != "run":                                                    # with what is there, else with any weights
        gpt = restored(found["gpt"], config.device) if found["gpt"] else GPT(GPTConfig(**sizes)).to(config.device).eval()
        if action == "bench":
            if world()[0] > 0:                                             # the first process prints
                sys.stdout = open(os.devnull, "w")
            return bench(config, parts, gpt, found["namm"])
        for line in notes(config, sizes, found["text"]):
            print(line)
        return show(example(gpt, found["namm"], parts["report"], config, action))
    try:
        run(config, out, parts, sizes, found, file)
    except FloatingPointError as error:
        refuse(f"{error}, with another --out, or delete {out}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from here, and so does: python evolve.py --resume {out}")
    except torch.OutOfMemoryError:                                         # of a single row, or one prompt for many candidates
        sys.exit(f"evolve.py: out of memory; python evolve.py --resume {out} --rows {max(1, min(16, config.rows) // 2)} goes on")
    except OSError as error:
        refuse(f"{error}; once that is mended, python evolve.py --resume {out} goes on")


if __name__ == "__main__":
    main()
