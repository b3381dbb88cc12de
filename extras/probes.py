"""python -m extras.probes RUN [--report_at 1,4 ...]: the same question asked in other ways.

  stream         bits per token of text that is read on and on
  kept_by_kind   which kinds of tokens NAMM keeps
  quote_probe    what no manager can know in advance

Prints a table of each, and writes all rows to RUN/probes.json.
"""

import math
import pathlib

import numpy as np
import torch

import data
import evolve
import model
from extras import runs


# --- Stream --------------------------------------------------------------------------------------

STREAMED = ("namm", "namm_uncapped", "full", "recent", "streaming", "h2o", "tova")


@torch.no_grad()
def bits_per_token(gpt, text, config, manage):
    """Bits that each token of text (B,n) costs but the first, (B,n-1), and the share of the tokens
    that is in the cache at the end: text read in blocks, the cache managed all the time."""
    cache, bits = gpt.new_cache(len(text), config.positions == "renumbered"), []
    for block in text.split(config.delay, dim=1):
        with evolve.precision(config.device):
            hidden, _ = model.read(gpt, block, cache, config.delay, manage)
            logits = gpt.output(hidden).float()  # (B,T,V)
        seen = cache[0].seen
        following = text[:, seen - block.shape[1] + 1:seen + 1]  # (B,T); one fewer at the end
        logits = logits[:, :following.shape[1]].transpose(1, 2)  # (B,V,T)
        nats = torch.nn.functional.cross_entropy(logits, following, reduction="none")
        bits.append(nats / math.log(2))
    return torch.cat(bits, dim=1), model.kept(cache).mean().item()


def stream(gpt, solution, part, config):
    """Bits per token of streamed text: [{method, from, to, bits, cache, seed}], places in tokens.
    The rules keep as many slots as NAMM has at the end."""
    rng, rows, slots = np.random.default_rng([config.seed, 6]), [], None
    ends = [times * config.length for times in config.report_at]
    texts = [part.text(rng, ends[-1]) for _ in range(min(16, config.rows))]
    text = torch.from_numpy(np.stack(texts)).long().to(config.device)
    for method in STREAMED:
        manage = evolve.managed(method, solution, slots, config)
        bits, share = bits_per_token(gpt, text, config, manage)
        if slots is None:
            slots = evolve.slots_of(share, ends[-1], config)
        for start, end in zip([0] + ends, ends):
            rows.append({"method": method, "from": start, "to": end, "cache": share,
                         "bits": bits[:, start:end].mean().item(), "seed": config.seed})
    return rows


# --- What is kept --------------------------------------------------------------------------------

def kinds_of(part, batch):
    """{kind: (N,n) bool}, which tokens of N contexts of n tokens are of it."""
    n, tokens = batch.context, batch.tokens[:, :batch.context]
    place = torch.arange(n, device=tokens.device).expand(tokens.shape)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    for row, own, answer in zip(asked, batch.tokens.cpu().numpy(), batch.answer.cpu().numpy()):
        row[data.fact_positions(own, answer, n)] = True
    before = asked.roll(-1, 1) & ~asked
    ends = torch.from_numpy(part.ends_line).to(tokens.device)[tokens] & ~asked
    return {"all": place >= 0, "to be asked for": asked, "before such a token": before,
            "first four": place < 4, "newest 32": place >= n - 32, "line ends": ends}


def kept_by_kind(gpt, solution, part, config):
    """What NAMM keeps: [{layer, head, kind, kept, spectrum_kept, spectrum_dropped, seed}], over
    prompts of all tasks but `lm` at the longest length of evolution: the share of the tokens of a
    kind that is there at the end of the context, None if there are none; and the mean spectra (F,)
    of those that stayed and of those that went, each when it was last judged, zeros for none."""
    count, rows = min(8, config.rows), []
    longest = config.length * max(config.evolve_at)
    batch = evolve.every_task(part, config, count, [config.seed, 8], longest)
    chosen = np.array(batch.tasks) != "lm"  # which asks for nothing that was said
    batch = batch.each(lambda x: x[torch.from_numpy(chosen).to(x.device)])
    fate, kinds = evolve.watch(gpt, solution, batch, config), kinds_of(part, batch)

    def mean(spectrum):
        """(M,F) -> [F]."""
        return spectrum.mean(0).nan_to_num().tolist()

    for layer in range(config.n_layer):
        for head in range(config.n_kv_head):
            for kind, mask in kinds.items():
                lives = fate["lives"][layer, :, head][mask]  # (M,) tokens of the kind
                judged = fate["score"][layer, :, head][mask].isfinite()  # (M,)
                spectrum = fate["spectrum"][layer, :, head][mask]  # (M,F)
                rows.append(dict(layer=layer, head=head, kind=kind, seed=config.seed,
                                 kept=lives.double().mean().item() if len(lives) else None,
                                 spectrum_kept=mean(spectrum[judged & lives]),
                                 spectrum_dropped=mean(spectrum[judged & ~lives])))
    return rows


# --- What nobody can know ------------------------------------------------------------------------

def quote(part, rng, n, room):
    """A task as those of data.py: six tokens from anywhere in the text, and the two after them.
    Nothing tells in advance what to keep.
    Context: `...for key in sorted(self.keys()):` question: `for key in sorted(self`."""
    text, end = part.text(rng, n), part.encode("\n")
    questions = []
    for at in rng.integers(n - 8, size=4):
        questions.append((np.concatenate([end, text[at:at + 6]]), text[at + 6:at + 8]))
    return text, questions


def quote_probe(gpt, solution, part, config):
    """Scores of `quote`, which nothing was trained or evolved on: [{method, length, score, logprob,
    cache, seed}], up to 4 times the training length."""
    rows = []
    for times in [times for times in config.report_at if times <= 4]:
        rng, length = np.random.default_rng([config.seed, 9, times]), times * config.length
        batch = evolve.prompts(part, quote, config.report_prompts, rng, length, config.device)
        for method in ("full", "namm", "namm_uncapped"):
            manage = evolve.managed(method, solution, None, config)
            exact, _, logprob, cache = evolve.evaluate(gpt, batch, config, manage)
            rows.append(dict(method=method, length=length, score=exact.mean().item(),
                             logprob=logprob.mean().item(), cache=cache.mean().item(),
                             seed=config.seed))
    return rows


# --- Tables --------------------------------------------------------------------------------------

# probe: the title of its table, names of its lines and of its columns, and what a cell holds
TABLES = {
    stream: ("Bits per token of streamed text, up to a position", "{method}", "{to}", "bits"),
    kept_by_kind: ("Share of a kind of tokens that is kept", "{kind}", "layer {layer} head {head}",
                   "kept"),
    quote_probe: ("Score of the quote probe, by length", "{method}", "{length}", "score")}


def table(probe, rows):
    """Markdown of the rows of a probe."""
    title, name, column, value = TABLES[probe]
    columns = list(dict.fromkeys(column.format(**row) for row in rows))
    cells = {}
    for row in rows:
        text = "" if row[value] is None else f"{row[value]:.2f}"
        cells.setdefault(name.format(**row), {})[column.format(**row)] = text
    lines = [[own] + [line.get(column, "") for column in columns] for own, line in cells.items()]
    return runs.markdown(title, ["", *columns], lines)


def main(line):
    """Measure, print, and write RUN/probes.json."""
    folder, options = runs.run_and_options(line, "python -m extras.probes RUN [--OPTION VALUE ...]")
    config, gpt, solution, parts = runs.open_run(folder, options)
    if config.tasks == "lm":
        raise ValueError("--tasks: give one that asks for what was said")
    found = {}
    for probe in TABLES:
        rows = found[probe.__name__] = probe(gpt, solution, parts["report"], config)
        print(table(probe, rows), flush=True)
    evolve.save(pathlib.Path(folder) / "probes.json", evolve.as_json(found))


if __name__ == "__main__":
    runs.command("extras.probes", main)
