"""Neural Attention Memory Models: a tiny evolved network decides which cached tokens stay.

After Cetin, Sun, Zhao, Tang: An Evolved Universal Transformer Memory, ICLR 2025 (arXiv 2410.13166).
`namm` is the whole method; its parts follow, in the paper's order:

  1. spectrogram      the attention that each cached token received, over time -> its spectrum
  2. moving_average   ... averaged over time, what is recent counting most -> one spectrum a token
  3. features         ... normalised, the token's age beside it -> 25 numbers a token
  4. bam_scores       backward attention memory: a token is judged beside newer ones -> one score
  5. stays            a token below zero leaves that head's cache; of the others the best stay
  6. RULES            hand-made rules behind the same interface

This file knows nothing of the GPT. It sees attention, and of each layer a `model.KVCache`, in whose
`state` it keeps what it remembers of each slot. All layers are judged in one call, since many small
tensors are slow: their slots stand side by side in S.
Letters: P candidates (parameter vectors), B rows = P x prompts (all prompts of the first candidate,
then all of the second), K key/value heads, T tokens of the last block, S slots in the cache, F
frequency bins.
"""

from functools import lru_cache

import torch
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

N_FFT, HOP = 32, 16  # samples in a window, and from one window to the next
F = N_FFT // 2 + 1  # 17 frequency bins
MEMORY = 0.99 ** 512  # what the old average counts after a block, 0.6 %; the paper's have 512
MEMORIES = {"block": (MEMORY,), "both": (MEMORY, 0.9)}  # the second, slower, is not in the paper
N_AGE = 8  # features of a token's age
N_IN = N_AGE + F  # 25 features a token
WIDTH = 32  # of the backward attention


def shapes(n_in=N_IN):
    """{name: shape} of the parameters for n_in features a token, in the order of the vector."""
    return {"Wqkv": (n_in, 3 * WIDTH), "bqkv": (3 * WIDTH,), "Wo": (WIDTH, 2 * n_in),
            "bo": (2 * n_in,), "w": (n_in, 1), "b": (1,)}


SHAPES = shapes()
N_PARAMS = sum(torch.Size(shape).numel() for shape in SHAPES.values())  # 4172


def namm(params, mean, std, threshold=0.0, capacity=0, shared=False, opened=True, squash=True,
         memories=MEMORIES["block"]):
    """A manager of a cache: manage(cache, attention) -> (scores, keep), (B,K,S) of each layer. It
    is called after each block, with the attention [(B,K,T,S)] of the block's T queries.

    params (P,4172); mean and std (F,) of the spectra (see `statistics`). Slots that score
    `threshold` or more stay; with a `capacity`, at most so many a head, or, if `shared`, so many in
    the mean over all heads of all layers. opened, memories: see `spectra`; squash: see `features`.
    """
    def manage(cache, attention):
        """Score all slots after a block."""
        with torch.autocast(mean.device.type, enabled=False):  # float32, whatever the GPT has
            spectrum = spectra(cache, attention, opened, memories)  # (B,K,S,F)
            age = cache[0].seen - 1 - side_by_side(cache, "positions")  # (B,K,S)
            x = features(spectrum, age, mean, std, squash)  # (B,K,S,25)
            scores = bam_scores(x, params, slots_of_layers(cache))  # (B,K,S)
        return stays(cache, scores, threshold, [capacity] * len(cache), shared)
    return manage


def slots_of_layers(cache):
    """How many slots each layer has, dead ones too: [int]."""
    return [layer.alive.shape[2] for layer in cache]


def side_by_side(cache, name):
    """This attribute of all layers' caches, (B,K,S) each, in one tensor (B,K,S)."""
    return torch.cat([getattr(layer, name) for layer in cache], dim=2)


# --- 1. Attention -> spectrogram (section 3.1) ---------------------------------------------------

@lru_cache  # sent to a device once
def fourier(device):
    """The Fourier matrix times a periodic Hann window, (32,32): 17 cosines, then 15 sines, since of
    17 the first and the last are zero."""
    angles = torch.outer(torch.arange(F), torch.arange(N_FFT)) * (2 * torch.pi / N_FFT)  # (17,32)
    return (torch.cat([angles.cos(), angles[1:-1].sin()]) * torch.hann_window(N_FFT)).to(device)


def spectrogram(samples):
    """Short-time Fourier magnitudes: torch.stft, not centred.

    samples (B,K,N,S): the attention that each slot received from N queries, a multiple of HOP.
    Returns n = N / HOP - 1 frames, (B,K,n,F,S), each of 32 queries, 16 of them also in the next."""
    waves = fourier(samples.device) @ samples.unfold(2, N_FFT, HOP).mT  # (B,K,n,32,S)
    cosines, sines = waves.square_().split([F, F - 2], dim=3)
    cosines[..., 1:-1, :] += sines
    return cosines.sqrt_()


# --- 2. Spectrogram -> one spectrum a token (section 3.1) ----------------------------------------

def moving_average(frames, old, gamma):
    """After each frame, E = gamma * E + (1 - gamma) * frame. frames (B,K,n,F,S); old: the E before
    them, (B,K,F,S), zero for a new slot -> (B,K,F,S)."""
    for frame in frames.unbind(2):
        old = frame.lerp(old, gamma)
    return old


def spectra(cache, attention, opened=True, memories=MEMORIES["block"]):
    """The spectrum of each slot, (B,K,S,F), after a block with attention [(B,K,T,S)]: the average
    of the block's frames and of those before. Each layer's state["memory"] (B,K,S,HOP+F) holds
    the last HOP values of a slot's attention, and this average. memories: weights that a block
    leaves to all before it; two of them give two averages, and 2F in place of F.

    Not in the paper: a Hann window falls to zero, so complete frames hardly count the newest
    queries, which know best what will be asked for. If `opened`, the frame that these have begun
    counts as well, its other half zeros; it is not remembered. In blocks of 32 it has 92 % of the
    weight, the last complete frame 7 %."""
    if attention[0].shape[2] > 64 and len(attention) > 1:  # large blocks: faster layer by layer
        each = [spectra([layer], [own], opened, memories) for layer, own in zip(cache, attention)]
        return torch.cat(each, dim=2)
    new = torch.cat(attention, dim=3).float()  # (B,K,T,S)
    B, K, T, S = new.shape
    memory = new.new_zeros(B, K, HOP + len(memories) * F, S)
    if "memory" in cache[0].state:
        memory = torch.cat([layer.state["memory"] for layer in cache], dim=2).mT
    tail, *averages = memory.split([HOP] + [F] * len(memories), dim=2)
    samples = torch.cat([tail, new, new.new_zeros(B, K, HOP, S)], dim=2)  # (B,K,HOP+T+HOP,S)
    frames = spectrogram(samples)  # (B,K,T/HOP+1,F,S)
    gammas = [left ** (HOP / T) for left in memories]  # of a frame
    averages = [moving_average(frames[:, :, :-1], old, gamma)
                for old, gamma in zip(averages, gammas)]
    memory = torch.cat([new[:, :, -HOP:], *averages], dim=2).mT
    for layer, own in zip(cache, memory.split(slots_of_layers(cache), dim=2)):
        layer.state["memory"] = own
    if opened:
        averages = [frames[:, :, -1].lerp(old, gamma) for old, gamma in zip(averages, gammas)]
    return torch.cat(averages, dim=2).mT


# --- 3. Spectrum and age -> features -------------------------------------------------------------

def features(average, age, mean, std, squash=True):
    """Features (B,K,S,25): sine and cosine of the age at four speeds, and the normalised spectrum.

    average (B,K,S,F); age (B,K,S) in tokens of the text, 0 of the newest; mean and std (F,).
    squash, not in the paper: asinh tames outliers, such as the attention to the only fact."""
    speed = 50_000.0 ** (-torch.arange(N_AGE // 2, device=age.device) / (N_AGE // 2))
    angle = age[..., None] * speed  # (B,K,S,4)
    z = (average - mean) / std.clamp(min=1e-7)  # (B,K,S,F)
    if squash:  # asinh, in a quarter of torch.asinh's time on a CPU
        z = (z.abs() + (z * z + 1).sqrt_()).log_().copysign_(z)
    return torch.cat([angle.sin(), angle.cos(), z], dim=-1)


def statistics(totals, opened=True, memories=MEMORIES["block"], spectra=spectra):
    """A manager that keeps everything, and adds the count, the sum and the sum of squares of the
    spectra to `totals` (3,F) float64; see `mean_std`."""
    def manage(cache, attention):
        """Add the spectra to the totals."""
        with torch.autocast(totals.device.type, enabled=False):
            x = spectra(cache, attention, opened, memories).double().flatten(0, 2)  # (B K S, F)
            count = torch.full_like(x[0], len(x))
            totals.add_(torch.stack([count, x.sum(0), x.square().sum(0)]))
        return None, [layer.alive for layer in cache]
    return manage


def mean_std(totals):
    """Mean and (biased) standard deviation of the spectra, (F,) each, from these totals."""
    mean, square = totals[1:] / totals[0]
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


# --- 4. Features -> scores: backward attention memory (section 3.2) ------------------------------

def unpack(params, shapes=SHAPES):
    """params (P,n) -> {name: (P,*shape)}, views."""
    pieces = params.split([torch.Size(shape).numel() for shape in shapes.values()], dim=1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def bam_scores(features, params, sizes):
    """Scores (B,K,S): below zero, the token goes.

    features (B,K,S,25), the slots of each layer oldest first, dead ones on the left; params
    (P,4172); sizes: slots of each layer. One head of attention, in which a token sees itself and
    the newer tokens of its layer: is it redundant, given what came after? Its output is a residual
    r and a multiplier m for the features: h = x (1 + m) + r, score = h w + b. With all slots
    flipped the mask is the ordinary causal one, and no live slot sees a dead one."""
    B, K, S, n_in = features.shape
    p = unpack(params, shapes(n_in))
    x = features.flip(2).reshape(len(params), -1, n_in)  # (P, prompts K S, 25), newest first
    qkv = torch.baddbmm(p["bqkv"][:, None], x, p["Wqkv"]).view(B, K, S, 3 * WIDTH)
    o = [scaled_dot_product_attention(*layer.split(WIDTH, dim=-1), is_causal=True)
         for layer in qkv.split(sizes[::-1], dim=2)]  # (B,K,S of a layer,32), last layer first
    o = torch.cat(o, dim=2).reshape(len(params), -1, WIDTH)  # (P, prompts K S, 32)
    r, m = torch.baddbmm(p["bo"][:, None], o, p["Wo"]).chunk(2, dim=-1)  # 25 wide each
    h = torch.addcmul(x + r, x, m)
    return torch.baddbmm(p["b"][:, None], h, p["w"]).view(B, K, S).flip(2)


def scale(shapes=SHAPES):
    """1 / sqrt(number of inputs) of each parameter, (n,), a bias as its matrix: the unit of its
    steps, so that one sigma fits all."""
    inputs = {"bqkv": shapes["w"][0], "bo": WIDTH, "b": shapes["w"][0]}
    return torch.cat([torch.full(shape, inputs.get(name, shape[0]) ** -0.5).flatten()
                      for name, shape in shapes.items()])


# --- 5. Scores -> who stays ----------------------------------------------------------------------

def best(scores, count):
    """Where the `count` highest of each row are, among equals the last: (...,n) -> (...,n) bool."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., -count:], True)


def stays(cache, scores, threshold, budgets, shared=False):
    """(scores, keep), (B,K,S) of each layer, from all layers' scores (B,K,S). Each head keeps its
    newest slot, and the best of those that score `threshold` or more. budgets, a number for each
    layer: at most so many a head; if `shared`, K times their sum for all heads and layers together;
    all zero: no limit. Among equals the newer stay, if shared those of upper layers. NaN is worst.
    """
    sizes, alive = slots_of_layers(cache), side_by_side(cache, "alive")
    rank = scores.masked_fill(scores.isnan() | ~alive, -torch.inf)
    rank[..., torch.tensor(sizes).cumsum(0) - 1] = torch.inf  # the newest of each layer
    keep = rank >= threshold
    if shared and sum(budgets):
        pool = rank.mT.flatten(1)  # (B, slots of a row)
        keep &= best(pool, sum(budgets) * rank.shape[1]).view(rank.mT.shape).mT
    elif sum(budgets):
        layers = zip(rank.split(sizes, dim=2), budgets)
        keep &= torch.cat([best(own, budget) for own, budget in layers], dim=2)
    return scores.split(sizes, dim=2), keep.split(sizes, dim=2)


# --- 6. Rules: f(a layer's cache, attention (B,K,T,S), budget) -> scores (B,K,S), the higher stay -

def newest(scores, count):
    """Scores (B,K,S) with those of the `count` newest slots infinite."""
    scores = scores.clone()
    scores[..., max(0, scores.shape[-1] - count):] = torch.inf
    return scores


def recent(layer, attention, budget):
    """The newest slots."""
    return layer.positions.float()


def streaming(layer, attention, budget):
    """StreamingLLM (Xiao et al. 2024): attention sinks, the first four tokens, and the newest."""
    return layer.positions.float().masked_fill(layer.positions < 4, 1e9)


def h2o(layer, attention, budget):
    """H2O (Zhang et al. 2023): the newest, half of the budget, and those that received most
    attention, summed over all queries so far."""
    before = layer.state.get("received", torch.zeros_like(layer.positions, dtype=torch.float))
    layer.state["received"] = before + attention.float().sum(2)
    return newest(layer.state["received"], budget // 2)


def tova(layer, attention, budget):
    """TOVA (Oren et al. 2024): what the newest query attends to, mean over a layer's heads."""
    return attention[:, :, -1].float().mean(1, keepdim=True).expand(layer.alive.shape)


def snapkv(layer, attention, budget):
    """SnapKV (Li et al. 2024): a window of the newest slots, and what its queries attend to,
    smoothed over five neighbours. The window is 32, at most half a block and half the budget."""
    window = max(1, min(32, attention.shape[2] // 2, budget // 2))
    votes = attention[:, :, -window:].float().mean(2)  # (B,K,S)
    total = avg_pool1d(votes, 5, stride=1, padding=2)
    live = avg_pool1d(layer.alive.float(), 5, stride=1, padding=2)  # share of neighbours
    return newest(total / live.clamp(min=0.1), window)


def recent_attention(layer, attention, budget):
    """What the newest half block attends to: ours, written after we saw what NAMM keeps."""
    return attention[:, :, attention.shape[2] // 2:].float().mean(2)


RULES = {f.__name__: f for f in (recent, streaming, h2o, tova, snapkv, recent_attention)}


def by_rule(rule, budget, pool=False, last=False):
    """A manager, as `namm` makes, that keeps the best `budget` slots of each head by a rule. pool:
    so many in the mean over all heads of all layers. last: the last layer is filled first, then the
    one below, and so on; each head of the others keeps one."""
    def manage(cache, attention):
        """Keep the best by the rule."""
        n = len(cache)
        budgets = [budget] * n
        if last:  # the total, less one for each layer below, less all tokens for each above
            budgets = [max(1, budget * n - i - (n - 1 - i) * cache[0].seen) for i in range(n)]
        scores = [rule(layer, received, most)
                  for layer, received, most in zip(cache, attention, budgets)]
        for layer, own in zip(cache, scores):
            if own.shape != layer.alive.shape:
                raise ValueError(f"{rule.__name__}: scores {tuple(own.shape)}, and the slots are "
                                 f"{tuple(layer.alive.shape)}")
        return stays(cache, torch.cat(scores, dim=2), -torch.inf, budgets, pool)
    return manage
