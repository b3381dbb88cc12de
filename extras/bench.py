"""python -m extras.bench RUN [--popsize 32 --report_at 1,4,16 ...]: what everything costs here.

  reading       tokens a second at each length: the full cache, NAMM that keeps all, NAMM
  a population  candidates x prompts a second
  CMA-ES        seconds a generation
  pre-training  tokens and operations a second, and where the time goes

Prints tables; writes nothing.
"""

import copy
import dataclasses
import math
import time

import numpy as np
import torch
from torch.profiler import record_function

import data
import evolve
import model
import namm
from extras import runs

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 operations/s, data sheets


# --- Clocks --------------------------------------------------------------------------------------

def seconds(f, device):
    """Time of one f()."""
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(f, device, again=3):
    """Median time of f(), `again` times, after one call that is not counted."""
    return float(np.median([seconds(f, device) for _ in range(1 + again)][1:]))


def profiled(f, device):
    """{name: (seconds, seconds without what it calls)} of the operations and regions of f() on this
    device, "all" for f itself."""
    with torch.profiler.profile() as profile, record_function("all"):
        f()
    kind, found = "device" if device == "cuda" else "cpu", {}
    for event in profile.key_averages():
        own = getattr(event, f"{kind}_time_total"), getattr(event, f"self_{kind}_time_total")
        found[event.key] = own[0] / 1e6, own[1] / 1e6
    return found


def percents(parts, total):
    """Shares of a total in words."""
    return ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items())


# --- Reading -------------------------------------------------------------------------------------

def keep_all(cache, attention):
    """A manager that only has the attention written out."""
    return None, [layer.alive for layer in cache]


def marked(solution, config):
    """NAMM, as evolve.manager makes it, with a name for the profiler around each part."""
    c, params = config, torch.atleast_2d(solution.params.to(config.device))
    mean, std = solution.mean.to(c.device), solution.std.to(c.device)
    threshold = c.threshold + (0.0 if c.capacity else solution.zero)

    def manage(cache, attention):
        """Judge all slots after a block."""
        with torch.autocast(c.device, enabled=False):
            with record_function("spectrogram"):
                spectrum = namm.spectra(cache, attention, c.frames == "opened")
                age = cache[0].seen - 1 - namm.side_by_side(cache, "positions")
                x = namm.features(spectrum, age, mean, std, c.squash == "asinh")
            with record_function("BAM"):
                scores = namm.bam_scores(x, params, namm.slots_of_layers(cache))
        with record_function("choice"):
            budgets = [c.capacity] * len(cache)
            return namm.stays(cache, scores, threshold, budgets, c.slots == "shared")
    return manage


class MarkedCache(model.KVCache):
    """A cache with a name for the profiler around its eviction."""

    def evict(self, keep):
        """As KVCache.evict."""
        with record_function("eviction"):
            super().evict(keep)


def read_text(gpt, text, config, manage, marked_cache=False):
    """Read text (B,n) from an empty cache. With a manager: the most slots a layer that were in
    memory, mean over layers: survivors and a block."""
    cache, most = gpt.new_cache(len(text), config.positions == "renumbered"), [0]
    if marked_cache:
        cache = [MarkedCache(layer.keys, layer.renumber) for layer in cache]

    def observe(cache, scores, keep):
        """Note the slots before eviction."""
        most[0] = max(most[0], math.ceil(np.mean([layer.keys.shape[2] for layer in cache])))

    with evolve.precision(config.device):
        model.read(gpt, text, cache, config.delay, manage, observe=observe)
    return most[0]


def bench_reading(gpt, solution, part, config):
    """How fast text is read at each length, in blocks of config.delay, and where the time goes."""
    device, B = config.device, min(4, config.rows)
    everything = evolve.manager(solution, config, capacity=0, threshold=-math.inf)
    kinds = {"full cache, fused": None, "full cache, eager": keep_all,
             "NAMM, keeps all": everything, "NAMM": evolve.manager(solution, config)}
    lines = []
    for times in config.report_at:
        rngs = [np.random.default_rng(i) for i in range(B)]
        text = np.stack([part.text(rng, times * config.length) for rng in rngs])
        text = torch.from_numpy(text).long().to(device)
        taken = {kind: [] for kind in kinds}
        for _ in range(4):
            for kind, manage in kinds.items():  # in turn: the same noise for all
                taken[kind].append(seconds(lambda: read_text(gpt, text, config, manage), device))
        # the first of each warms up
        speeds = [f"{text.numel() / np.median(own[1:]):,.0f}" for own in taken.values()]
        slots = read_text(gpt, text, config, kinds["NAMM"])
        lines.append([str(text.shape[1]), *speeds, str(text.shape[1]), str(slots)])
    print(f"{B} rows, blocks of {config.delay} tokens, {torch.get_num_threads()} threads, {device}")
    print(runs.markdown("Reading: tokens a second, and the most slots a layer",
                        ["tokens", *kinds, "slots, full cache", "slots, NAMM"], lines), flush=True)
    took = profiled(lambda: read_text(gpt, text, config, marked(solution, config), True), device)
    own = {name: took[name][0] for name in ("spectrogram", "BAM", "choice", "eviction")}
    total = took["all"][0]
    own = {"GPT": total - sum(own.values())} | own
    print(f"\nof the time to read {text.shape[1]} tokens with NAMM: {percents(own, total)}\n",
          flush=True)


# --- Evolution -----------------------------------------------------------------------------------

def bench_population(gpt, solution, part, config):
    """Candidates x prompts a second, on one prompt of 4 times the training length."""
    batch = evolve.prompts(part, "multikey", 1, np.random.default_rng(0), 4 * config.length,
                           config.device)
    for popsize in (1, config.popsize, 2 * config.popsize):
        noise = 0.1 * torch.randn(popsize, len(solution.params))
        some = dataclasses.replace(solution, params=solution.params + noise)

        def once():
            """One generation of one task."""
            evolve.fitness(gpt, some, {"multikey": 1.0}, [batch], config)

        took = median_seconds(once, config.device)
        print(f"{popsize} candidates x 1 prompt of {4 * config.length} tokens: "
              f"{popsize / took:.1f} a second", flush=True)


def bench_cmaes():
    """Seconds of a generation of CMA-ES, which runs on the CPU."""
    for diagonal in (True, False):
        es = evolve.CMAES(torch.zeros(namm.N_PARAMS), 0.6, 32, diagonal=diagonal)
        took = median_seconds(lambda: es.tell(es.ask()[:, 0]), "cpu")
        kind = "diagonal" if diagonal else "full"
        print(f"CMA-ES, n = {namm.N_PARAMS}, 32 candidates, {kind}: {took:.4f} s a generation")
    once = seconds(lambda: torch.linalg.eigh(es.C), "cpu")
    print(f"and an eigendecomposition every {es.lazy_gap} generations: {once:.1f} s", flush=True)


# --- Pre-training --------------------------------------------------------------------------------

def bench_training(gpt, part, config):
    """Speed of training steps at the training length, and where their time goes."""
    c, device, rng, gpt = config, config.device, np.random.default_rng(0), copy.deepcopy(gpt)
    count = c.batch_tokens // c.length
    batch = data.prompts(part, rng.choice(c.tasks.split(","), count), rng, c.length)
    words = torch.zeros(count, 0)  # plain
    if c.recall:
        words = data.words_to_recall(batch, part, rng, c.recall)

    def steps(count):
        """Training steps on one batch, so small that they change nothing."""
        model.train(gpt, [(batch, words, 0)] * count, count, 1e-9, evolve.precision(device),
                    c.rows * c.length)

    took, tokens = median_seconds(lambda: steps(4), device) / 4, count * c.length
    # 6 operations a weight and token, 12 a layer, head width and slot (Kaplan et al. 2020), as if
    # nothing were sampled
    weights = sum(p.numel() for p in gpt.parameters())
    work = tokens * (6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * c.length)
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for chip, peak in PEAKS.items() if chip in name), None)
    print(f"pre-training: {tokens / took:,.0f} tokens a second, {work / took / 1e9:,.1f} GFLOP/s"
          + (f", {work / took / peak:.0%} of peak" if peak else ""))
    kinds = {"attention": 0.0, "matrix products": 0.0, "all else, which moves memory": 0.0}
    for name, (_, own) in profiled(lambda: steps(1), device).items():
        if name.startswith("aten::"):
            kind = "matrix products" if name.endswith("mm") else "all else, which moves memory"
            kinds["attention" if "attention" in name else kind] += own
    total = sum(kinds.values())
    print(f"its operations, profiled, add up to {total / took:.0%} of that time: "
          + percents(kinds, total))


def main(line):
    """Print all of it."""
    usage = "python -m extras.bench RUN [--OPTION VALUE ...]"
    config, gpt, solution, parts = runs.open_run(*runs.run_and_options(line, usage))
    bench_reading(gpt, solution, parts["report"], config)
    bench_population(gpt, solution, parts["evolve"], config)
    bench_cmaes()
    bench_training(gpt, parts["train"], config)


if __name__ == "__main__":
    runs.command("extras.bench", main)
