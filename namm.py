"""Neural Attention Memory Models: a tiny evolved network that decides which cached tokens live.

After Cetin, Sun, Zhao, Tang: An Evolved Universal Transformer Memory, ICLR 2025 (arXiv 2410.13166). In the paper's order:

  1. spectrogram      attention that each cached token received, over time  ->  its short-time Fourier magnitudes
  2. moving_average   ... averaged over time, what is recent counting most  ->  one spectrum a token
  3. features         ... normalised, with the token's age beside it        ->  25 numbers a token
  4. bam_scores       backward attention memory: each token is judged beside all newer ones  ->  one score a token
  5. keep_mask        a token whose score is below zero leaves that head's cache; `evict`: of the others the best stay
  6. namm             the five together, as a manager of a cache; `spectra` joins 1 and 2, and adds a frame to the paper's
  7. BASELINES        hand-made rules behind the same interface

To see what a part is worth, there are plainer ones in its place: `values` and `moments` for 1, `linear_scores`,
`mlp_scores` and "unmasked" for 4, and SEES, which blinds the scorer to one half of its features. A first reading may skip them.

This file knows nothing of the GPT: it sees attention tensors, and each layer's cache (keys, values, positions, alive, state, seen,
copies, repeat, evict).
Letters: P candidates (parameter vectors), B rows = P x prompts, candidate-major (all prompts of the first candidate,
then all of the second), K key/value heads, T tokens of the last block, S slots in the cache, F frequency bins.
"""

from functools import lru_cache, partial

import torch
from torch.nn.functional import avg_pool1d, pad, scaled_dot_product_attention
from torch.profiler import record_function

N_FFT, HOP = 32, 16                # samples in a window, and from one window to the next
F = N_FFT // 2 + 1                 # 17 frequency bins
MEMORY = 0.99 ** 512               # weight that a block leaves to all before it in the moving average: the paper's 0.99 a
                                   # token over its 512; shorter blocks forget as much
N_AGE = 8                          # features of a token's age
N_IN = N_AGE + F                   # 25 features a token
WIDTH = 32                         # of the backward attention
SHAPES = {"Wqkv": (N_IN, 3 * WIDTH), "bqkv": (3 * WIDTH,), "Wo": (WIDTH, 2 * N_IN), "bo": (2 * N_IN,),
          "w": (N_IN, 1), "b": (1,)}                                      # the flat vector, in this order, row-major
N_PARAMS = sum(torch.Size(shape).numel() for shape in SHAPES.values())    # 4172
HIDDEN = 16                        # of the scorer "mlp"


# --- 1. Attention -> spectrogram (section 3.1) -----------------------------------------------------------------------

@lru_cache
def fourier(device):
    """The Fourier matrix under a periodic Hann window, F cosines above 15 sines (the first and last are zero): (32,32)."""
    turn = torch.outer(torch.arange(F), torch.arange(N_FFT)) * (2 * torch.pi / N_FFT)            # (F,32)
    return (torch.cat([turn.cos(), turn[1:-1].sin()]) * torch.hann_window(N_FFT)).to(device)


def magnitudes(windows):
    """Fourier magnitudes of windows (...,n,S) of n <= 32 samples, zeros in place of the last if they are fewer: (...,F,S)."""
    cosines, sines = (fourier(windows.device)[:, :windows.shape[-2]] @ windows).square_().split([F, F - 2], dim=-2)
    cosines[..., 1:-1, :] += sines                                         # (...,F,S), and sines (...,15,S)
    return cosines.sqrt_()


def spectrogram(samples):
    """Short-time Fourier magnitudes of the attention that each slot received: as torch.stft, not centred.

    samples (B,K,HOP+T,S): what each slot received from each of T queries, T a multiple of HOP, and before them from the last HOP
    queries of the block before, zero for a new slot. Returns magnitudes (B,K,S,frames,F), frames = T / HOP; a frame's window is the
    HOP samples before it and the HOP in it, so where a text is cut into blocks does not change a frame.
    """
    return magnitudes(samples.unfold(2, N_FFT, HOP).mT).permute(0, 1, 4, 2, 3)                   # of windows (B,K,frames,32,S)


def values(samples):
    """In place of `spectrogram`, to see what Fourier is worth: a frame's 16 new values as they are, and a zero."""
    return pad(samples[:, :, HOP:].unflatten(2, (-1, HOP)).permute(0, 1, 4, 2, 3), (0, F - HOP))         # (B,K,S,frames,F)


def moments(samples):
    """In place of `spectrogram`: mean and maximum of a frame's 16 new values, and zeros."""
    new = values(samples)
    return pad(torch.stack([new.sum(-1) / HOP, new.amax(-1)], dim=-1), (0, F - 2))


# --- 2. Spectrogram -> one spectrum a token (section 3.1) ------------------------------------------------------------

def moving_average(frames, old, gamma):
    """E = gamma^n * old + sum over the n frames t of (1 - gamma) * gamma^(n - 1 - t) * frame t.

    frames (B,K,S,n,F), old (B,K,S,F), zero for a new slot -> (B,K,S,F). No correction of the start's bias."""
    for frame in frames.unbind(3):                                         # (B,K,S,F)
        old = frame.lerp(old, gamma)                                       # gamma * old + (1 - gamma) * frame
    return old


# --- 3. Spectrum and age -> features ---------------------------------------------------------------------------------

def asinh(x):
    """The same as torch.asinh, in a quarter of its time on a CPU; that one alone was a fifteenth of all that reading takes."""
    return (x.abs() + (x * x + 1).sqrt_()).log_().copysign_(x)


def features(average, age, mean, std):
    """[sin and cos of the age at four speeds, normalised spectrum]: average (B,K,S,F), age (B,K,S) in tokens of the text
    (newest token 0), mean and std (F,) -> (B,K,S,25). asinh, not in the paper, tames outliers: a lone fact draws more attention
    than evolution ever saw."""
    speed = 50_000.0 ** (-torch.arange(N_AGE // 2, device=age.device) / (N_AGE // 2))
    angle = age[..., None] * speed                                         # (B,K,S,4)
    return torch.cat([angle.sin(), angle.cos(), asinh((average - mean) / std.clamp(min=1e-7))], dim=-1)


# --- 4. Features -> scores: backward attention memory (section 3.2) --------------------------------------------------

SEES = ("all", "closed", "spectrum", "age", "values", "moments")          # what the scorer is given; closed: as the paper
BLIND = {"spectrum": slice(0, N_AGE), "age": slice(N_AGE, N_IN)}          # which of the 25 it is then given as zero


def unpack(params, shapes):
    """params (P, n) -> {name: (P, *shape)}, views, in the order of `shapes`."""
    pieces = params.split([torch.Size(shape).numel() for shape in shapes.values()], dim=1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def bam_scores(features, params, alive=None, newer=True):
    """Scores: below zero, the token goes.

    features (B,K,S,25), params (P,4172), B = P x prompts, candidate-major; slots oldest first, dead ones on the left
    -> (B,K,S). One head of attention in which a token sees itself and newer tokens only (is it redundant, given what
    came after?): with the slots flipped, newest first, that is the ordinary causal mask, and dead slots, now last, are
    seen by no live one. Its output is a residual and a multiplier for the features: h = x (1 + m) + r, score = h.w + b.
    Without `newer`, for an ablation, a token sees all that are `alive` (B,K,S), older and newer.
    """
    B, K, S, _ = features.shape
    p = unpack(params, SHAPES)
    x = features.flip(2).reshape(len(params), -1, N_IN)                    # (P, prompts K S, 25), newest first
    qkv = torch.baddbmm(p["bqkv"][:, None], x, p["Wqkv"]).view(B, K, S, 3 * WIDTH)
    mask = None if newer else alive.flip(2)[:, :, None]                    # (B,K,1,S)
    o = scaled_dot_product_attention(*qkv.split(WIDTH, dim=-1), attn_mask=mask, is_causal=newer)     # (B,K,S,32)
    o = o.reshape(len(params), -1, WIDTH)                                  # (P, prompts K S, 32)
    r, m = torch.baddbmm(p["bo"][:, None], o, p["Wo"]).chunk(2, dim=-1)    # (P, prompts K S, 25) each
    return torch.baddbmm(p["b"][:, None], x * (1 + m) + r, p["w"]).view(B, K, S).flip(2)


def linear_scores(features, params, alive):
    """In place of `bam_scores`: w.x + b, 26 parameters."""
    p, x = unpack(params, SCORERS["linear"][1]), features.reshape(len(params), -1, N_IN)
    return torch.baddbmm(p["b"][:, None], x, p["w"]).view(features.shape[:3])


def mlp_scores(features, params, alive):
    """In place of `bam_scores`: one hidden layer, 433 parameters; a token is judged without the others."""
    p, x = unpack(params, SCORERS["mlp"][1]), features.reshape(len(params), -1, N_IN)
    x = torch.baddbmm(p["b1"][:, None], x, p["W1"]).tanh()                 # (P, prompts K S, 16)
    return torch.baddbmm(p["b"][:, None], x, p["w"]).view(features.shape[:3])


SCORERS = {"bam": (bam_scores, SHAPES), "unmasked": (partial(bam_scores, newer=False), SHAPES),
           "linear": (linear_scores, {"w": (N_IN, 1), "b": (1,)}),
           "mlp": (mlp_scores, {"W1": (N_IN, HIDDEN), "b1": (HIDDEN,), "w": (HIDDEN, 1), "b": (1,)})}


def scale(scorer):
    """1 / sqrt(number of inputs) of each parameter, (n,): the unit of its steps, so that one sigma fits all. A bias has that
    of its matrix."""
    shapes = SCORERS[scorer][1]
    fan_in = {"bqkv": N_IN, "bo": WIDTH, "b1": N_IN, "b": shapes["w"][0]}
    return torch.cat([torch.full(shape, fan_in.get(name, shape[0]) ** -0.5).flatten() for name, shape in shapes.items()])


# --- 5. Scores -> who stays ------------------------------------------------------------------------------------------

def newest(scores, count):
    """A copy of the scores (B,K,S) in which the `count` newest slots stay whatever they had; NaN is the worst score."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores[..., max(0, scores.shape[-1] - count):] = torch.inf
    return scores


def keep_mask(scores, threshold=0.0):
    """Keep what scores `threshold` or more, and the newest token always: (B,K,S) -> (B,K,S) bool. Parameters that are all
    zero score 0 everywhere: then only the capacity evicts."""
    return newest(scores, 1) >= threshold


def keep_best(scores, budget):
    """The newest slot and the best others, `budget` in all, or all when there are fewer; among equals the newer one:
    (B,K,S) -> (B,K,S) bool."""
    order = newest(scores, 1).argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., -budget:], True)


def keep_best_of_all(scores, budget):
    """For heads that share their slots, scores of each layer [(B,K,S)], of as many slots as it has: the newest slot of each head,
    and the best others of a row, in whatever layer and head, `budget` in all; among equals those of upper layers, then newer ones:
    heads with equal scores keep the same. -> [(B,K,S)] bool."""
    best = keep_best(torch.cat([newest(own, 1).mT.flatten(1) for own in scores], dim=1), budget)     # (B, slots of a row)
    return [piece.view(own.mT.shape).mT for piece, own in zip(best.split([own[0].numel() for own in scores], dim=1), scores)]


def evict(cache, scores, threshold, most=None, shared=False):
    """Evict from each layer of a cache, by its scores [(B,K,S)], what scores less than `threshold`, and what is not among the best:
    in each of its heads as many as `most`, a list, says; if `shared` so many in the mean over all heads of all layers."""
    keep = [keep_mask(own, threshold) for own in scores]
    if most:
        scores = [own.masked_fill(~layer.alive, -torch.inf) for own, layer in zip(scores, cache)]
        best = keep_best_of_all(scores, sum(most) * scores[0].shape[1]) if shared else map(keep_best, scores, most)
        keep = [own & top for own, top in zip(keep, best)]
    for layer, own in zip(cache, keep):
        layer.evict(own)


# --- 6. The manager --------------------------------------------------------------------------------------------------

def spectra(layer, attention, sees):
    """Steps 1 and 2 for one layer: what each slot received in this block, attention (B,K,T,S), added to what its cache
    remembers of it. -> moving averages (B,K,S,F).

    Not in the paper: a Hann window falls to zero, so complete frames hardly count the newest queries, which know best what will be
    asked for. Unless `sees` is "closed" they count in the frame that they have opened as well: half of what a block of 32 shows."""
    B, K, T, S = attention.shape
    attention = attention.float()
    if "spectrum" not in layer.state:
        layer.state = {"tail": attention.new_zeros(B, K, S, HOP), "spectrum": attention.new_zeros(B, K, S, F)}
    transform, gamma = {"values": values, "moments": moments}.get(sees, spectrogram), MEMORY ** (HOP / T)
    average = layer.state["spectrum"].mT.contiguous().mT                   # slots last in memory, as in the attention
    step = HOP if attention.device.type == "cpu" else T                    # frame by frame: it fits the cache of a CPU
    for start in range(0, T, step):
        samples = attention[:, :, start - HOP:start + step] if start else torch.cat(             # (B,K,HOP+step,S)
            [layer.state["tail"].mT, attention[:, :, :step]], dim=2)
        there = S - T + start + step
        frames = transform(samples[..., :there])                           # younger slots have received nothing yet
        average[:, :, :there] = moving_average(frames, average[:, :, :there], gamma)
    layer.state = {"tail": attention[:, :, -HOP:].mT.contiguous(), "spectrum": average}
    if transform is spectrogram and sees != "closed":                      # a frame half full: the newest HOP queries, then zeros;
        opened = magnitudes(attention[:, :, -HOP:]).mT                     # judged by, not remembered
        average = moving_average(opened[:, :, :, None], average, gamma)    # opened (B,K,S,F)
    return average


def namm(params, mean, std, threshold=0.0, capacity=None, sees="all", scorer="bam", per_head=True, shared=False):
    """A manager for model.read: called after each block, it evicts.

    params (P,n), n = 4172 for BAM; mean and std (F,). Of what scores `threshold` or more the best stay, `capacity` a head, or any
    number if that is None or 0: see `evict`. Until the first eviction all candidates share one computation: the cache comes with
    one row a prompt, and leaves with P. The other switches are for ablations: see SEES and SCORERS; without `per_head` all heads
    of a layer drop the same tokens, by the mean of their scores."""
    def judge(layer, attention):
        """Steps 1 to 4 for one layer's cache and the attention (B,K,T,S) of the block just read: scores (B,K,S)."""
        with record_function("spectrogram"):                               # the names that `evolve.py --bench` prints
            x = features(spectra(layer, attention, sees), layer.seen - 1 - layer.positions, mean, std)
        if sees in BLIND:
            x[..., BLIND[sees]] = 0.0
        with record_function("BAM"):
            if layer.copies < len(params):
                layer.repeat(len(params))
                x = x.repeat(len(params), 1, 1, 1)
            scores = SCORERS[scorer][0](x, params, layer.alive)
        layer.state["score"] = scores if per_head else scores.mean(1, keepdim=True).expand_as(scores)
        return layer.state["score"]                                        # there for whoever wants to see it

    def manage(cache, attention):
        """Steps 1 to 5, for a cache and the attention of all layers."""
        with torch.autocast(mean.device.type, enabled=False):              # float32 here, whatever the GPT computes in
            scores = [judge(layer, received) for layer, received in zip(cache, attention)]
            with record_function("eviction"):
                evict(cache, scores, threshold, [capacity] * len(cache) if capacity else None, shared)
    return manage


def statistics(totals, sees="all"):
    """A manager that evicts nothing and adds up count, sum and sum of squares of the spectra, in `totals` (3,F) float64,
    over rows, heads, slots, layers and runs. See `mean_std`."""
    def manage(cache, attention):
        """Add each layer's spectra to the totals."""
        with torch.autocast(totals.device.type, enabled=False):
            for layer, received in zip(cache, attention):
                x = spectra(layer, received, sees).double().flatten(0, 2)  # (B K S, F)
                totals.add_(torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]))
    return manage


def mean_std(totals):
    """Mean and (biased) standard deviation of each bin from the totals of `statistics`, (F,) each."""
    mean, square = totals[1:] / totals[0]
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


# --- 7. Baselines: f(a layer's cache, attention, budget, generator) -> scores (B,K,S), the higher stay. budget: how many stay, in
#        each head, or, if heads share their slots, in the mean over all

def random(cache, attention, budget, generator):
    """Any slots, drawn anew at each eviction."""
    return torch.rand(cache.alive.shape, generator=generator).to(cache.keys.device)


def recent(cache, attention, budget, generator):
    """The newest slots."""
    return cache.positions.float()


def streaming(cache, attention, budget, generator):
    """StreamingLLM (Xiao et al. 2024): the first four tokens of the text, and the newest."""
    return cache.positions.float().masked_fill(cache.positions < 4, 1e9)


def h2o(cache, attention, budget, generator):
    """Heavy hitters (Zhang et al. 2023): the newest half of the budget, and of the rest those that received most
    attention, summed over every query so far."""
    received = cache.state.get("received", torch.zeros_like(cache.positions, dtype=torch.float))
    cache.state["received"] = received + attention.float().sum(2)
    return newest(cache.state["received"], budget // 2)


def l2(cache, attention, budget, generator):
    """Small keys (Devoto et al. 2024): the slots whose keys have the smallest L2 norm."""
    return -cache.keys.float().norm(dim=-1)


def tova(cache, attention, budget, generator):
    """TOVA (Oren et al. 2024): what the newest query attends to, mean over heads, the same for all heads of a layer."""
    return attention[:, :, -1].float().mean(1, keepdim=True).expand(cache.alive.shape)


def snapkv(cache, attention, budget, generator):
    """SnapKV (Li et al. 2024): a window of the newest slots, and what its queries attend to, smoothed over five
    neighbours in the cache. The window is 32 queries, at most half a block and half the budget."""
    window = max(1, min(32, attention.shape[2] // 2, budget // 2))
    votes = attention[:, :, -window:].float().mean(2)                      # (B,K,S), 0 for dead slots, which are no neighbours
    total, neighbours = (avg_pool1d(x, 5, stride=1, padding=2) for x in (votes, cache.alive.float()))        # of five, each
    return newest(total / neighbours.clamp(min=0.1), window)


def fastgen(cache, attention, budget, generator):
    """FastGen (Ge et al. 2024), which tells kinds of heads apart: a head that finds 95 % of its attention in the first
    four tokens and the newest keeps those, any other its heavy hitters."""
    local, heavy = streaming(cache, attention, budget, generator), h2o(cache, attention, budget, generator)
    received = attention.float().sum(2)                                    # (B,K,S)
    near = received * keep_best(local.masked_fill(~cache.alive, -torch.inf), budget)
    return torch.where(near.sum(-1, keepdim=True) / received.sum(-1, keepdim=True) >= 0.95, local, heavy)


def attended(cache, attention, budget, generator):
    """What the queries of the newest half block attend to: ours, written once we knew what evolved vectors keep."""
    return attention[:, :, attention.shape[2] // 2:].float().mean(2)


BASELINES = {f.__name__: f for f in (random, recent, streaming, h2o, fastgen, l2, tova, snapkv, attended)}
ATTENTIVE = {"h2o", "fastgen", "tova", "snapkv", "attended"}               # those that look at the attention


def baseline(name, budget, seed=0, shared=False, last=False):
    """A manager that keeps `budget` slots in every row, layer and head, by the rule `name` of BASELINES. If `shared`, or `last`, so
    many in the mean over all heads: those that score best, or all that the last layer can fill, then the one below it, and one in
    each other (28 a head, three layers, 64 tokens read: 1, 19 and 64)."""
    generator = torch.Generator().manual_seed(seed)
    def manage(cache, attention):
        """Keep the best by the rule, from the attention [(B,K,T,S)] of the block just read; [None] if it looks at none."""
        n = len(cache)                                                     # `last`: what one in each layer below and all above leave
        most = [max(1, budget * n - i - (n - 1 - i) * cache[0].seen) if last else budget for i in range(n)]
        scores = [BASELINES[name](layer, received, own, generator) for layer, received, own in zip(cache, attention, most)]
        evict(cache, scores, -torch.inf, most, shared)
    return manage
