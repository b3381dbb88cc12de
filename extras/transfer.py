"""python -m extras.transfer RUN [TARGET ...] [--frames FILE.npy]: one vector serves others, too.

The vector of a finished run, evolved on text alone, manages the caches of other transformers, with
the statistics of its own GPT; nothing is fitted to them:

  architecture  a GPT of another depth, width, number and width of heads, on the same text
  video         a GPT that reads clips, patch by patch, and then a question (see video.py)
  maze, control decision transformers that act in a world (see worlds.py)
  smollm2       a real transformer, as others trained it; only if asked for, since it takes an hour

The first four are trained for it, as the run's own GPT was: with words to recall and holes in the
cache ("recall"); or, of a plain run (--preset plain), without either, on contexts in which facts
come back ("plain"). A run with recall serves "plain_once", too: without either, a fact told once.
Trains them, a few minutes each; evolves a vector on each, to compare; prints a table of each, and
writes RUN/transfer.json, and RUN/transfer with GPTs and a picture.
--frames: draw the clips of the report on your own, (clips, frames, height, width).
python -m extras.transfer FILE.json ... prints the tables of what was written before.
"""

import argparse
import copy
import dataclasses
import json
import math
import pathlib

import numpy as np
import torch
from tqdm import tqdm

import data
import evolve
import model
from extras import runs, smollm2, video, worlds
from model import GPT, GPTConfig

COUNT = 64  # prompts, or episodes, of a report
FEWER = 16  # the first prompts, which vectors drawn at random are measured on
RULES = ("streaming", "recent", "recent+lastlayer", "h2o+pool", "tova+pool", "tova+lastlayer",
         "snapkv+pool", "recent_attention+pool", "recent_attention+lastlayer")
RECALL = 0.25  # share of the places where a head must recall a word
HOW = ("recall", "plain", "plain_once", "as_found")  # how a target was trained


# --- Targets: what a GPT learns, and how it is asked ---------------------------------------------

class Target:
    """A transformer to be served. What a subclass says: its sizes, training length, steps, tokens
    in a step; lesson(rng, done, recall) -> (Batch, words to recall); prompts(part, rng, count,
    times) -> Batch, of contexts and questions; and what follows. no_skill: no better than this is a
    GPT that has learned nothing. settings: the report's lengths, in training lengths, and slots a
    head. changes: settings of evolve.py that this target needs. effort: generations of evolution on
    it, and prompts in each."""
    lr, no_skill, how, changes, effort = 1.2e-2, 0.1, HOW[:3], {}, (16, 8)
    settings = ((1, 28), (4, 28), (8, 28), (4, 14), (4, 8), (4, 4))

    def exam(self, rng, count, times):
        """What `sit` asks, of `times` the training length."""
        return self.prompts("report", rng, count, times)

    def sit(self, gpt, exam, config, manage, copies=1, count=None):
        """{"score", "cache"} of each of the first `count` prompts, of the candidates of the manager
        one below the other, (copies x count,) each. The score of `lm` is 1 / perplexity."""
        some = exam.each(lambda x: x[:count].to(config.device))
        got = evolve.evaluate(gpt, some, config, manage, copies)
        exact, _, logprob, cache = (x.cpu() for x in got)
        reads_on = torch.tensor([task == "lm" for task in exam.tasks[:count]] * copies)
        return {"score": torch.where(reads_on, logprob.exp(), exact), "cache": cache}


def length_at(rng, done, length):
    """The length of a lesson: a quarter of the longest at first, then up to half, then mostly
    all."""
    if done < 0.1:
        return length // 4
    return int(rng.choice([length // 4, length // 2] + [length] * 2 * (done >= 0.25)))


class Text(Target):
    """The run's own text, words and tasks."""
    name, steps, tokens = "architecture", 600, 4096
    sizes = {"n_layer": 4, "n_kv_head": 2, "n_embd": 48, "head_dim": 24, "n_hidden": 128}

    def __init__(self, config, parts, n_vocab, frames):
        self.parts, self.length, self.tasks = parts, config.length, config.tasks.split(",")
        self.sizes = self.sizes | {"vocab_size": n_vocab}
        self.evolve_on = config.evolve_on.split(",")

    def lesson(self, rng, done, recall):
        """As a step of evolve.py."""
        return data.lesson(self.parts["train"], self.tasks, rng, done, self.length, self.tokens,
                           recall)

    def prompts(self, part, rng, count, times):
        """Of all tasks in turn; for evolution of those that the run evolved on."""
        tasks = self.tasks if part == "report" else self.evolve_on
        tasks = [tasks[i % len(tasks)] for i in range(count)]
        return data.prompts(self.parts[part], tasks, rng, times * self.length)


class Video(Target):
    """Clips of 28 frames."""
    name, steps, tokens, length, no_skill = "video", 250, 4096, 28 * video.PATCHES, 0.15
    sizes = {"vocab_size": video.VOCABULARY, "n_vector": video.N_VECTOR}

    def __init__(self, config, parts, n_vocab, frames):
        self.own = video.load_frames(frames) if frames else None
        self.again = config.recall == 0
        self.sizes = self.sizes | {"n_kv_head": config.n_kv_head}

    def lesson(self, rng, done, recall):
        """Short clips first."""
        length = length_at(rng, done, self.length)
        share = recall if done >= 0.4 else 0.0
        return video.clips(rng, self.tokens // length, length // video.PATCHES, share,
                           again=self.again)[:2]

    def prompts(self, part, rng, count, times):
        """Drawn clips, for the report on the user's own if there are."""
        frames = times * self.length // video.PATCHES
        own = self.own if part == "report" else None
        return video.clips(rng, count, frames, own=own, again=self.again)[0]


class Episodes(Target):
    """Episodes of 128 steps."""
    steps, tokens, length = 350, 4096, 128
    settings = ((1, 28), (4, 28), (8, 28), (1, 14), (1, 8), (1, 4))  # long roll-outs are slow
    sizes = {"n_layer": 2, "n_embd": 48, "head_dim": 24, "n_hidden": 128,
             "n_vector": worlds.N_VECTOR}

    def __init__(self, config, parts, n_vocab, frames):
        self.name, self.again = self.world.name, config.recall == 0
        self.sizes = self.sizes | {"vocab_size": self.world.actions + 1,
                                   "n_kv_head": config.n_kv_head}

    def lesson(self, rng, done, recall):
        """Short episodes first; nine of ten without a mistake where asked."""
        steps = length_at(rng, done, self.length)
        share, count = recall if done >= 0.25 else 0.0, self.tokens // steps
        return worlds.episodes(self.world, rng, count, steps, steps * 7 // 8, 0.9, 0.02, share,
                               self.again)[:2]

    def prompts(self, part, rng, count, times):
        """What the script does; asked is what it does in the last 64 steps or more."""
        steps = times * self.length
        context = steps - max(64, steps // 8)
        batch = worlds.episodes(self.world, rng, count, steps, context, again=self.again)[0]
        batch.answer[:, :context + 1] = 0  # what is asked before is no question that follows it
        return batch

    def exam(self, rng, count, times):
        """(A world that nobody has acted in, what acting at random earns there, and the script),
        (N,) each."""
        world = self.world(rng, count, times * self.length, self.again)
        scripted = copy.deepcopy(world)
        chance = worlds.earned(copy.deepcopy(world),
                               lambda: rng.integers(world.actions, size=count))
        return world, chance, worlds.earned(scripted, scripted.script)

    def sit(self, gpt, exam, config, manage, copies=1, count=None):
        """By roll-outs. The score: was as much earned as the script earns in this episode? And
        "return": 0 is what acting at random earns in the mean, 100 the script."""
        world, chance, script = exam
        world = copy.deepcopy(world).repeated(copies, count)
        renumber = config.positions == "renumbered"
        _, total, cache = worlds.roll_out(gpt, world, config.delay, manage, renumber)
        solved = total >= np.tile(script[:count], copies)
        share = (total - chance.mean()) / (script.mean() - chance.mean())
        return {"score": torch.from_numpy(solved).double(), "cache": cache.cpu(),
                "return": torch.from_numpy(100 * share)}


class Maze(Episodes):
    """See worlds.Maze."""
    world = worlds.Maze


class Boat(Episodes):
    """See worlds.Boat."""
    world = worlds.Boat


class SmolLM2(Text):
    """SmolLM2-135M, and tasks in which facts come back, of 512 of its tokens: 448 to read."""
    name, length, how, settings = "smollm2", 512, ("as_found",), ((1, 224), (1, 112))
    changes, effort = {"evolve_at": (1,)}, (10, 6)

    def __init__(self, config, parts, n_vocab, frames):
        made = evolve.prepare(smollm2.settings(f"{config.out}/transfer"))  # no run is there
        self.parts, self.gpt = made[1], made[2]["gpt"]
        self.tasks = self.evolve_on = smollm2.TASKS
        smollm2.in_bfloat16(self.gpt)


TARGETS = {"architecture": Text, "video": Video, "maze": Maze, "control": Boat,
           "smollm2": SmolLM2}


# --- A target's GPT, and a vector of its own -----------------------------------------------------

def trained(target, how, folder, config):
    """The target's GPT: that in the folder, or a new one. Raises ValueError for one of other
    sizes."""
    if how == "as_found":
        return target.gpt
    path, sizes = folder / "gpt.pt", GPTConfig(**target.sizes)
    gpt = evolve.load_gpt(path, config.device)
    if gpt and gpt.config != sizes:
        raise ValueError(f"{path}: a GPT of other sizes; delete it, and one is trained again")
    if gpt:
        return gpt
    seed = 1000 + config.seed  # another than the run's own GPT had
    torch.manual_seed(seed)
    gpt, share = GPT(sizes).to(config.device), RECALL * (how == "recall")

    def lessons():
        """Each step's batch, words to recall, and seed."""
        for step in range(target.steps):
            rng = np.random.default_rng([seed, 0, step])
            batch, words = target.lesson(rng, step / target.steps, share)
            yield batch, words if share else words[:, :0], seed * 1_000_003 + step

    model.train(gpt, lessons(), target.steps, target.lr, evolve.precision(config.device),
                config.rows * target.length)
    folder.mkdir(parents=True, exist_ok=True)
    evolve.save(path, {"config": vars(gpt.config), "model": gpt.state_dict()})
    return gpt.eval()


def asked(target, part, seed, count, times, config):
    """Prompts of a part, on the device. seed: [numbers]; each part draws others."""
    rng = np.random.default_rng([config.seed, 20 + list(data.SHARES).index(part), *seed])
    return target.prompts(part, rng, count, times).each(lambda x: x.to(config.device))


def evolved(gpt, target, statistics, folder, config):
    """A Solution that is evolved on the target itself, as evolve.evolve does, in fewer generations
    of fewer prompts; the folder's, if it has one."""
    generations, count = target.effort
    path, scale = folder / "evolved.pt", evolve.Solution.steps(config.memory)
    if found := evolve.load(path, {"params"}):
        return evolve.Solution(found["params"], *statistics)
    es = evolve.CMAES(torch.zeros(len(scale)), config.sigma, config.popsize, 1000 + config.seed,
                      diagonal=True)
    average, highest, chosen = es.mean, -math.inf, None

    def likelihood(params, batch, copies):
        """Mean likelihood of the answers, of each of the candidates (P,4172) in their steps."""
        solution = evolve.Solution((params * scale).float(), *statistics)
        got = evolve.evaluate(gpt, batch, config, evolve.manager(solution, config), copies)
        return got[1].view(copies, -1).mean(1)

    choose = [asked(target, "choose", [times], 24, times, config) for times in config.evolve_at]
    for g in tqdm(range(1, generations + 1), f"evolve on {target.name}", disable=None):
        times = config.evolve_at[:1 + len(config.evolve_at) * (g - 1) // generations]
        times = int(np.random.default_rng([config.seed, g]).choice(times))
        batch = asked(target, "evolve", [1, g], count, times, config)
        es.tell(likelihood(es.ask(), batch, config.popsize))
        average = average + (es.mean - average) / min(g, 10)
        if g % 5 == 0 or g == generations:
            value = np.mean([likelihood(average[None], batch, 1).item() for batch in choose])
            if value > highest:
                highest, chosen = value, average
    params = (chosen * scale).float()
    folder.mkdir(parents=True, exist_ok=True)
    evolve.save(path, {"params": params})
    return evolve.Solution(params, *statistics)


# --- Report --------------------------------------------------------------------------------------

def row_of(method, got, namm_got, config):
    """A method's row of a report: means of what it got, a dict of (N,), and how far NAMM with the
    frozen vector is ahead of it on the same prompts."""
    gap = namm_got["score"][:len(got["score"])].double() - got["score"].double()
    row = {name: x.double().mean().item() for name, x in got.items()}
    return row | {"method": method, "lead": gap.mean().item(), "seed": config.seed,
                  "lead_se": (gap.var() / len(gap)).sqrt().item()}


def random_rows(gpt, target, exam, solution, namm_got, config):
    """Two rows of vectors drawn at random, on the first prompts: their mean, and the best."""
    manage = evolve.managed("random_vectors", solution, None, config)
    got = target.sit(gpt, exam, config, manage, evolve.RANDOM, FEWER)
    each = {name: x.cpu().view(evolve.RANDOM, -1) for name, x in got.items()}  # (RANDOM,FEWER)
    best = each["score"].mean(1).argmax()
    mean = {name: x.double().mean(0) for name, x in each.items()}
    return [row_of("random_vectors", mean, namm_got, config),
            row_of("random_vectors_best", {name: x[best] for name, x in each.items()}, namm_got,
                   config)]


def report(gpt, target, how, solutions, config):
    """Rows of all methods at all lengths and slots. solutions: {method: Solution}, "namm_frozen"
    first. A rule keeps as many slots as namm_frozen has. Where even 28 slots serve nobody, in
    plain_once, no fewer are tried."""
    rows, whole = [], {}
    settings = target.settings[:3] if how == "plain_once" else target.settings
    bar = tqdm(settings, f"report on {target.name}", disable=None)
    for times, slots in bar:
        exam = target.exam(np.random.default_rng([config.seed, 30, times]), COUNT, times)
        own, n = dataclasses.replace(config, capacity=slots), times * target.length
        n = exam.context if isinstance(exam, data.Batch) else n
        got = {}

        def sit(method, manage, gpt=gpt):
            """What a method gets."""
            bar.set_postfix_str(f"{n} tokens, {slots} slots, {method}")
            got[method] = {name: x.cpu() for name, x in
                           target.sit(gpt, exam, own, manage).items()}
            return got[method]

        for method, solution in solutions.items():
            sit(method, evolve.manager(solution, own))
        if times in whole:
            got |= whole[times]
        else:
            full = sit("full", None)
            got["ntk"] = full if times == 1 else sit("ntk", None, gpt.scaled(times))
            sit("namm_uncapped", evolve.manager(solutions["namm_frozen"], own, capacity=0))
            whole[times] = {name: got[name] for name in ("full", "ntk", "namm_uncapped")}
        share = got["namm_frozen"]["cache"].mean().item()
        for rule in RULES:
            sit(rule, evolve.managed(rule, None, evolve.slots_of(share, n, own), own))
        new = [row_of(method, x, got["namm_frozen"], own) for method, x in got.items()]
        new += random_rows(gpt, target, exam, solutions["namm_frozen"], got["namm_frozen"], own)
        rows += [row | {"length": times * target.length, "slots": slots} for row in new]
    return rows


def what_is_kept(gpt, target, solution, folder, config):
    """A table of what the slots hold at 8 times the training length, and a picture of a clip at 4
    times, the last layer's first head."""
    counts, lines = {4: 1, 8: 8}, []
    for times, count in counts.items():
        rng = np.random.default_rng([config.seed, 31, times])
        frames = times * target.length // video.PATCHES
        batch, _, kinds = video.clips(rng, count, frames, own=target.own, again=target.again)
        fate = evolve.watch(gpt, solution, batch.each(lambda x: x.to(config.device)), config)
        lives = fate["lives"].cpu().numpy()  # (layers,N,K,n)
        if count == 1:
            title = f"What NAMM keeps of {frames} frames, in the last layer"
            drawn = kinds[0] != video.KINDS.index("comment")
            vectors = batch.vectors[0, :batch.context].numpy()
            evolve.save(folder / "kept.svg", video.picture(
                vectors[drawn], lives[-1][0, 0][drawn], kinds[0][drawn], title))
    for layer, own in enumerate(lives):
        found = video.kept_by_kind(own, kinds)
        lines.append([f"layer {layer}", *(f"{kept:.1%}" for _, kept in found.values())])
    lines.append(["all tokens", *(f"{share:.1%}" for share, _ in found.values())])
    return runs.markdown(f"What the slots hold after {frames} frames", ["", *video.KINDS], lines)


def tables(rows):
    """Markdown, a table of each target: scores, means over seeds, and how far NAMM with the frozen
    vector is ahead, with a 95 % interval."""
    text = []
    for name, how in dict.fromkeys((row["target"], row["trained"]) for row in rows):
        mine = [row for row in rows if (row["target"], row["trained"]) == (name, how)]
        settings = list(dict.fromkeys((row["length"], row["slots"]) for row in mine))
        lines = []
        for method in dict.fromkeys(row["method"] for row in mine):
            lines.append([method])
            for setting in settings:
                own = [row for row in mine if (row["length"], row["slots"]) == setting
                       and row["method"] == method]
                lines[-1].append(cell(own) if own else "")
        head = ["method", *(f"{length} tokens, {slots} slots" for length, slots in settings)]
        seeds = len({row["seed"] for row in mine})
        text.append(runs.markdown(f"{name}, trained {how}, {seeds} seeds", head, lines))
    return "\n".join(text)


def overview(rows):
    """Markdown, one table, a line for each target, length and number of slots: means over seeds,
    and NAMM's leads over the full cache and over the best rules."""
    lines, settings = [], {}
    for row in rows:
        key = row["target"], row["trained"], row["length"], row["slots"]
        settings.setdefault(key, {}).setdefault(row["method"], []).append(row)
    for (name, how, length, slots), own in settings.items():
        def shown(method):
            """What a method got."""
            return cell(own[method], returns=False) if method in own else ""

        def best(rules):
            """The best of some rules, and what it got."""
            rule = max(rules, key=lambda rule: np.mean([row["score"] for row in own[rule]]))
            return f"{rule} {shown(rule)}"

        seeds, score = len(own["namm_frozen"]), lambda name: shown(name).split(" (")[0]
        lines.append([f"{name}, {how} ({seeds})", f"{length}, {slots}", shown("full"), score("ntk"),
                      f"**{shown('namm_frozen')}**", shown("namm_uncapped"),
                      score("namm_own_statistics"), score("namm_evolved"),
                      best([rule for rule in RULES if "+pool" in rule]), best(RULES),
                      f"{score('random_vectors')} / {score('random_vectors_best')}"])
    head = ["target (seeds)", "tokens, slots", "full", "NTK", "NAMM, frozen (cache)", "uncapped",
            "own statistics", "evolved there", "best pooled rule", "best rule",
            "random vectors, mean / best"]
    return runs.markdown("NAMM elsewhere", head, lines)


def cell(rows, returns=True):
    """The score of rows that are seeds of one thing, its return, and NAMM's lead: text."""
    score, lead, cache = (np.mean([row[name] for row in rows]) for name in
                          ("score", "lead", "cache"))
    text = f"{score:.3f}"
    if returns and "return" in rows[0]:
        text += f", return {np.mean([row['return'] for row in rows]):.0f}"
    if rows[0]["method"] in ("namm_frozen", "namm_uncapped"):
        return f"{text} ({cache:.1%})"
    half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in rows)) / len(rows)
    return f"{text} ({lead:+.3f} ± {half:.3f})"


# --- The command ---------------------------------------------------------------------------------

def study(name, how, opened, frames, out):
    """All rows of a target that was trained one way. Raises ValueError for a target that has not
    learned its task."""
    config, _, solution, parts, encoding = opened
    target, folder = TARGETS[name](config, parts, encoding.n_vocab, frames), out / f"{name}-{how}"
    gpt = trained(target, how, folder, config)
    sizes = {key: x for key, x in vars(gpt.config).items() if key in evolve.SIZES}
    config = dataclasses.replace(config, **sizes | target.changes, length=target.length)
    exam = target.exam(np.random.default_rng([config.seed, 29]), COUNT, 1)
    full = target.sit(gpt, exam, config, None)["score"].double().mean().item()
    print(f"{name}, trained {how}: {sum(p.numel() for p in gpt.parameters()):,} weights, the full "
          f"cache scores {full:.3f} at the training length", flush=True)
    if full <= target.no_skill:
        raise ValueError(f"{folder}: this GPT has not learned its task, its full cache scores "
                         f"{full:.3f}; delete the folder, and give a run of another --seed")
    batch = asked(target, "evolve", [0], 24, max(config.evolve_at), config)
    statistics = evolve.feature_statistics(gpt, [batch], config)
    solutions = {"namm_frozen": solution,
                 "namm_own_statistics": evolve.Solution(solution.params, *statistics),
                 "namm_evolved": evolved(gpt, target, statistics, folder, config)}
    rows = report(gpt, target, how, solutions, config)
    if name == "video":
        print(what_is_kept(gpt, target, solution, folder, config), flush=True)
    return [{"target": name, "trained": how} | row for row in rows]


def parse(line):
    """(RUN or files, targets, frames) from the command line. Raises ValueError."""
    parser = argparse.ArgumentParser(prog="python -m extras.transfer")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--frames", default="", metavar="FILE.npy")
    given = parser.parse_intermixed_args(line)
    if not given.run.endswith(".json"):
        unknown = set(given.targets) - set(TARGETS)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no target; any of "
                             f"{', '.join(TARGETS)}")
    return given.run, given.targets, given.frames


def main(line):
    """Study the targets, print their tables, and write RUN/transfer.json after each."""
    run, targets, frames = parse(line)
    if run.endswith(".json"):
        files = [pathlib.Path(path) for path in (run, *targets)]
        rows = [row for file in files for row in json.loads(file.read_text("utf-8"))]
        if not all(isinstance(row, dict) and "target" in row for row in rows):
            raise ValueError(f"{run}: not a transfer.json of this command")
        return print(overview(rows), tables(rows), sep="\n")
    if frames:
        video.load_frames(frames)  # what is wrong with them is said before the work begins
    opened, out = runs.open_with_encoding(run), pathlib.Path(run) / "transfer"
    path = pathlib.Path(run) / "transfer.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    targets = targets or [name for name in TARGETS if name != "smollm2"]
    served = ("recall", "plain_once", "as_found") if opened[0].recall else ("plain", "as_found")
    for how in served:
        for name in [name for name in targets if how in TARGETS[name].how]:
            new = study(name, how, opened, frames, out)
            rows = [row for row in rows if (row["target"], row["trained"]) != (name, how)] + new
            evolve.save(path, evolve.as_json(rows).replace("}, {", "},\n {"))
            print(tables(new), flush=True)


if __name__ == "__main__":
    runs.command("extras.transfer", main)
