"""python -m extras.ablations RUN --out FOLDER, and what to replace: what is a part of NAMM worth?

  --scorer linear     a weight for each feature, instead of attention
           mlp        one hidden layer: a token is judged without the others
           unmasked   attention in which a token sees older ones as well
  --features values   the attention of each query as it is, instead of its spectrum
             moments  mean and maximum of it
             age      the age alone
             spectrum the spectrum alone
  --heads together    all heads of a layer drop the same tokens

Evolves a NAMM that has the plainer part, on the GPT of a finished run and with its settings; other
options are those of evolve.py. Prints the report beside the run's own, writes FOLDER/namm.pt and
FOLDER/results.json.
"""

import argparse
import math
import pathlib

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

import evolve
import namm
from extras import runs
from namm import F, HOP, N_AGE, N_IN, WIDTH

HIDDEN = 16  # width of the scorer "mlp"


# --- In place of bam_scores ----------------------------------------------------------------------
#     f(features (B,K,S,25), params (P,n), slots of each layer, alive (B,K,S)) -> scores (B,K,S)

LINEAR = {"w": (N_IN, 1), "b": (1,)}  # 26 parameters
MLP = {"W1": (N_IN, HIDDEN), "b1": (HIDDEN,), "w": (HIDDEN, 1), "b": (1,)}  # 433


def bam_scores(features, params, sizes, alive):
    """NAMM's own."""
    return namm.bam_scores(features, params, sizes)


def linear_scores(features, params, sizes, alive):
    """w x + b."""
    p, x = namm.unpack(params, LINEAR), features.reshape(len(params), -1, N_IN)
    return torch.baddbmm(p["b"][:, None], x, p["w"]).view(features.shape[:3])


def mlp_scores(features, params, sizes, alive):
    """One hidden layer of tanh."""
    p, x = namm.unpack(params, MLP), features.reshape(len(params), -1, N_IN)
    h = torch.baddbmm(p["b1"][:, None], x, p["W1"]).tanh()  # (P, prompts K S, 16)
    return torch.baddbmm(p["b"][:, None], h, p["w"]).view(features.shape[:3])


def unmasked_scores(features, params, sizes, alive):
    """As namm.bam_scores, but a token sees all live ones of its layer, older and newer."""
    B, K, S, _ = features.shape
    p, x = namm.unpack(params), features.reshape(len(params), -1, N_IN)  # (P, prompts K S, 25)
    qkv = torch.baddbmm(p["bqkv"][:, None], x, p["Wqkv"]).view(B, K, S, 3 * WIDTH)
    o = []
    for layer, live in zip(qkv.split(sizes, dim=2), alive[:, :, None].split(sizes, dim=3)):
        o.append(scaled_dot_product_attention(*layer.split(WIDTH, dim=-1), attn_mask=live))
    o = torch.cat(o, dim=2).reshape(len(params), -1, WIDTH)  # (P, prompts K S, 32)
    r, m = torch.baddbmm(p["bo"][:, None], o, p["Wo"]).chunk(2, dim=-1)
    return torch.baddbmm(p["b"][:, None], x * (1 + m) + r, p["w"]).view(B, K, S)


SCORERS = {"bam": (bam_scores, namm.SHAPES), "linear": (linear_scores, LINEAR),
           "mlp": (mlp_scores, MLP), "unmasked": (unmasked_scores, namm.SHAPES)}


def scale(shapes):
    """As namm.scale, also for the bias b1 of the mlp: (n,)."""
    inputs = {"bqkv": N_IN, "b1": N_IN, "bo": WIDTH, "b": shapes["w"][0]}
    return torch.cat([torch.full((math.prod(shape),), inputs.get(name, shape[0]) ** -0.5)
                      for name, shape in shapes.items()])


# --- In place of the spectrogram -----------------------------------------------------------------
#     attention (B,K,T,S) -> n = T / HOP frames (B,K,n,F,S)

def values(attention):
    """The 16 queries of a frame as they are, and a zero."""
    return pad(attention.unflatten(2, (-1, HOP)), (0, 0, 0, F - HOP))


def moments(attention):
    """Mean and maximum of the 16 queries of a frame, and zeros."""
    frames = attention.unflatten(2, (-1, HOP))  # (B,K,n,16,S)
    return pad(torch.stack([frames.mean(3), frames.amax(3)], dim=3), (0, 0, 0, F - 2))


def plain_spectra(frames_of):
    """As namm.spectra, of plainer frames: f(cache, attention [(B,K,T,S)], opened) -> (B,K,S,F)."""
    def spectra(cache, attention, opened, memories=None):
        """The block's frames, averaged with what the cache remembers; none is half full."""
        new = torch.cat(attention, dim=3).float()  # (B,K,T,S)
        B, K, T, S = new.shape
        old = new.new_zeros(B, K, F, S)
        if "memory" in cache[0].state:
            old = torch.cat([layer.state["memory"] for layer in cache], dim=2)[..., HOP:].mT
        average = namm.moving_average(frames_of(new), old, namm.MEMORY ** (HOP / T)).mT
        memory = pad(average, (HOP, 0))  # in the place where namm.spectra has it
        for layer, own in zip(cache, memory.split(namm.slots_of_layers(cache), dim=2)):
            layer.state["memory"] = own
        return average
    return spectra


SPECTRA = {"values": plain_spectra(values), "moments": plain_spectra(moments)}
BLIND = {"spectrum": slice(0, N_AGE), "age": slice(N_AGE, N_IN)}  # these of the 25 are then zero


# --- A NAMM with a part replaced -----------------------------------------------------------------

def ablated(scorer="bam", features="all", heads="apart"):
    """A kind of evolve.Solution, for evolve.evolve."""
    scores_of, shapes = SCORERS[scorer]
    spectra = SPECTRA.get(features, namm.spectra)

    def method(params, mean, std, threshold, capacity, shared, opened, squash,
               memories=namm.MEMORIES["block"]):
        """As namm.namm."""
        def manage(cache, attention):
            """Judge all slots after a block."""
            with torch.autocast(mean.device.type, enabled=False):
                age = cache[0].seen - 1 - namm.side_by_side(cache, "positions")  # (B,K,S)
                spectrum = spectra(cache, attention, opened, memories)
                x = namm.features(spectrum, age, mean, std, squash)
                if features in BLIND:
                    x[..., BLIND[features]] = 0.0
                alive = namm.side_by_side(cache, "alive")
                scores = scores_of(x, params, namm.slots_of_layers(cache), alive)  # (B,K,S)
            if heads == "together":
                scores = scores.mean(1, keepdim=True).expand_as(scores)
            return namm.stays(cache, scores, threshold, [capacity] * len(cache), shared)
        return manage

    def statistics(totals, opened, memories):
        """As namm.statistics, of these spectra."""
        return namm.statistics(totals, opened, memories, spectra)

    def steps(memory):
        """The unit of each parameter's steps, (n,)."""
        return scale(shapes)
    parts = {"method": method, "steps": steps, "statistics": statistics}
    return type("Ablated", (evolve.Solution,), {name: staticmethod(f) for name, f in parts.items()})


def parse(line):
    """(RUN, --out, {part: what replaces it}, options of evolve.py). Raises ValueError."""
    parser = argparse.ArgumentParser(prog="python -m extras.ablations", allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--scorer", choices=[name for name in SCORERS if name != "bam"])
    parser.add_argument("--features", choices=[*SPECTRA, *BLIND])
    parser.add_argument("--heads", choices=["together"])
    given, options = parser.parse_known_args(line)
    given = vars(given)
    folder, out = given.pop("run"), pathlib.Path(given.pop("out"))
    if len(given) != 1:
        raise ValueError("give one of --scorer, --features and --heads")
    if (out / "config.json").exists() or (out / "results.json").exists():
        raise ValueError(f"{out} holds a run; give another --out, or delete it")
    return folder, out, given, options


def main(line):
    """Evolve the plainer NAMM, report on it and on the run's own, write both files."""
    folder, out, changed, options = parse(line)
    config, gpt, solution, parts = runs.open_run(folder, options)
    if config.memory != "block":
        raise ValueError(f"{folder}: has --memory {config.memory}; plainer parts have one")
    if "heads" in changed and config.n_kv_head == 1:
        raise ValueError(f"--heads together: the GPT of {folder} has one KV head a layer")
    config.methods = config.methods or "namm,full"
    out.mkdir(parents=True, exist_ok=True)
    plainer = evolve.evolve(gpt, parts, config, print, None, lambda state: None, ablated(**changed))
    evolve.save(out / "namm.pt", vars(plainer))
    rows = evolve.report(gpt, plainer, parts["report"], config)
    whole = evolve.report(gpt, solution, parts["report"], config)
    [(part, name)] = changed.items()
    print(f"\nNAMM with --{part} {name}:\n" + evolve.table(rows))
    print("NAMM as it is:\n" + evolve.table(whole))
    result = {"config": vars(config) | {"out": str(out)} | changed,
              "evolution": plainer.cost, "report": rows}
    evolve.save(out / "results.json", evolve.as_json(result))


if __name__ == "__main__":
    runs.command("extras.ablations", main)
