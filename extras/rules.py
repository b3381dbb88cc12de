"""python -m extras.rules RUN [--report_at 1,4 ...]: more published rules beside NAMM.

A rule is f(a layer's cache, attention (B,K,T,S), budget) -> scores (B,K,S), as in namm.py. Each is
reported on with as many slots as NAMM keeps: in each head; with +pool, in the mean over all heads;
with +lastlayer, the same number in the last layer first. Prints tables; writes nothing.
"""

import dataclasses

import torch

import evolve
import namm
from extras import runs


def random(seed):
    """The rule that keeps any slots, drawn anew at each eviction."""
    generator = torch.Generator().manual_seed(seed)

    def rule(layer, attention, budget):
        """Uniform random scores."""
        return torch.rand(layer.alive.shape, generator=generator).to(layer.keys.device)
    return rule


def l2(layer, attention, budget):
    """Small keys (Devoto et al. 2024): the slots whose keys have the smallest L2 norm."""
    return -layer.keys.float().norm(dim=-1)


def fastgen(layer, attention, budget):
    """FastGen (Ge et al. 2024), which tells kinds of heads apart: a head that finds 95 % of its
    attention in the first four tokens and the newest keeps those, any other its heavy hitters."""
    local = namm.streaming(layer, attention, budget)
    heavy = namm.h2o(layer, attention, budget)
    live = local.masked_fill(~layer.alive, -torch.inf)
    near = namm.best(namm.newest(live, 1), budget)  # (B,K,S)
    received = attention.float().sum(2)  # (B,K,S)
    share = (received * near).sum(-1, keepdim=True) / received.sum(-1, keepdim=True)  # (B,K,1)
    return torch.where(share >= 0.95, local, heavy)


def main(line):
    """Report on the rules, NAMM and the full cache."""
    folder, options = runs.run_and_options(line, "python -m extras.rules RUN [--OPTION VALUE ...]")
    config, gpt, solution, parts = runs.open_run(folder, options)
    rules = {"random": random(config.seed), "l2": l2, "fastgen": fastgen}
    methods = ["namm", "full"]
    for name in rules:
        methods += [name, name + "+pool", name + "+lastlayer"]
    config = dataclasses.replace(config, methods=",".join(methods))
    print(evolve.table(evolve.report(gpt, solution, parts["report"], config, rules)))


if __name__ == "__main__":
    runs.command("extras.rules", main)
