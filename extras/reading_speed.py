"""python -m extras.reading_speed [BASE] [--tokens 2048,8192] [--profile]: a checkpoint's reading.

How many tokens a second one row is read at, in blocks of 512, by the full cache and with NAMM, and
by the package transformers with the same weights where it is installed. BASE: what `evolve.py
--base` takes; if not given, smollm2. --profile: where NAMM's time goes. Prints a table; writes
nothing.
"""

import argparse
import importlib.util
import time

import numpy as np
import torch

import model
import namm
from extras import bench, pretrained, runs

BLOCK = 512


def evicting_half(cache, attention):
    """A manager: NAMM with a random vector, of which each head keeps the better half of its slots
    after each block."""
    return manager(cache[0].alive.shape[2] // 2)(cache, attention)


def manager(capacity):
    """NAMM with a random vector, and so many slots a head (0: all)."""
    params = 0.1 * torch.randn(1, namm.N_PARAMS, generator=torch.Generator().manual_seed(0))
    mean, std = torch.zeros(namm.F), torch.ones(namm.F)
    return namm.namm(params, mean, std, -torch.inf, capacity)


def ours(gpt, manage):
    """f(tokens (1,n)): reads them from an empty cache; the last block's hidden states, (1,T,C)."""
    return lambda tokens: model.read(gpt, tokens, gpt.new_cache(1), BLOCK, manage)[0]


def theirs(gpt, attention):
    """As `ours`, by the package transformers; attention: "sdpa" or "eager"."""
    import transformers
    c = gpt.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, tie_word_embeddings=c.tied, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=gpt.trained_length, attn_implementation=attention)
    other = transformers.LlamaForCausalLM(config).eval()
    names = {pretrained.our_name(name): name for name in other.state_dict()}
    weights = {}
    for name, x in gpt.state_dict().items():
        heads = {"wq": c.n_head, "wk": c.n_kv_head}.get(name.split(".")[-2])
        if heads:  # of each head first the first numbers of all pairs
            x = x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[names[name]] = x
    other.load_state_dict(weights)

    @torch.no_grad()
    def read(tokens):
        """Read them in blocks."""
        cache = transformers.DynamicCache(config=config)
        for block in tokens.split(BLOCK, dim=1):
            hidden = other.model(block, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden
    return read


def speeds(kinds, tokens, again=3):
    """{kind: tokens a second}, the median of `again` readings, all kinds in turn."""
    taken = {kind: [] for kind in kinds}
    for _ in range(again):
        for kind, read in kinds.items():
            start = time.perf_counter()
            read(tokens)
            taken[kind].append(time.perf_counter() - start)
    return {kind: tokens.shape[1] / float(np.median(own)) for kind, own in taken.items()}


def show_profile(gpt, tokens):
    """Print what the time of NAMM evicting half is spent on."""
    with torch.profiler.profile() as profile:
        ours(gpt, evicting_half)(tokens)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16,
                                       max_name_column_width=40))


def main(line):
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m extras.reading_speed")
    parser.add_argument("base", nargs="?", default="smollm2")
    parser.add_argument("--tokens", default="2048,8192", help="lengths")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args(line)
    gpt, _ = pretrained.load(given.base)
    kinds = {"full cache, fused": ours(gpt, None), "full cache, weights": ours(gpt, bench.keep_all),
             "NAMM keeps all": ours(gpt, manager(0)), "NAMM evicts half": ours(gpt, evicting_half)}
    if importlib.util.find_spec("transformers"):
        kinds = {"transformers, " + how: theirs(gpt, how) for how in ("sdpa", "eager")} | kinds
    generator, lines = torch.Generator().manual_seed(0), []
    some = torch.randint(gpt.config.vocab_size, (1, 2 * BLOCK), generator=generator)
    last = [read(some) for read in list(kinds.values())[:-1]]  # none of these forgets anything
    error = max((x - last[0]).abs().max().item() for x in last)
    kinds["NAMM evicts half"](some)  # all are warm now
    for n in map(int, given.tokens.split(",")):
        tokens = torch.randint(gpt.config.vocab_size, (1, n), generator=generator)
        if given.profile:
            show_profile(gpt, tokens)
            continue
        got = speeds(kinds, tokens)
        lines.append([str(n), *(f"{speed:,.0f}" for speed in got.values())])
        print(lines[-1], flush=True)
    print(f"1 row, blocks of {BLOCK} tokens, {torch.get_num_threads()} threads; medians of three; "
          f"hidden states of {2 * BLOCK} tokens differ by {error:.1e} at most")
    print(runs.markdown("Tokens a second", ["tokens", *kinds], lines))


if __name__ == "__main__":
    runs.command("extras.reading_speed", main)
