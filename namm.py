"""Neural Attention Memory Models: a tiny evolved network decides which cached tokens stay.

After Cetin, Sun, Zhao, Tang: An Evolved Universal Transformer Memory, ICLR 2025 (arXiv 2410.13166).
`namm` is the whole method; its parts follow, in the paper's order:

  1. spectrogram      the attention that each cached token received, over time -> its spectrum
  2. moving_average   ... averaged over time, what is recent counting most -> one spectrum a token
  3. features         ... normalised, the token's age beside it -> 25 numbers a token
  4. bam_scores       backward attention memory: a token is judged beside newer ones -> one score
  5. stays            a token below zero leaves that head's cache; of the others the best stay
  6. RULES            hand-made rules behind the same interface

This file knows nothing of the GPT. It sees attention, and each layer's cache: `keys`, `values`,
`positions`, `alive`, `seen`, and `state`, where a manager keeps what it remembers of each slot.
Letters: P candidates (parameter vectors), B rows = P x prompts, candidate-major (all prompts of the
first candidate, then all of the second), K key/value heads, T tokens of the last block, S slots in
the cache, F frequency bins.
"""

from functools import lru_cache

import torch
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

N_FFT, HOP = 32, 16  # samples in a window, and from one window to the next
F = N_FFT // 2 + 1  # 17 frequency bins
MEMORY = 0.99 ** 512  # what a block leaves of all before it in the moving average: the
                                   # paper's 0.99 a token over its 512; short blocks forget as much
N_AGE = 8  # features of a token's age
N_IN = N_AGE + F  # 25 features a token
WIDTH = 32  # of the backward attention
SHAPES = {"Wqkv": (N_IN, 3 * WIDTH), "bqkv": (3 * WIDTH,), "Wo": (WIDTH, 2 * N_IN),
          "bo": (2 * N_IN,), "w": (N_IN, 1), "b": (1,)}  # the flat vector, in this order
N_PARAMS = sum(torch.Size(shape).numel() for shape in SHAPES.values())  # 4172


def namm(params, mean, std, threshold=0.0, capacity=0, shared=False, opened=True, squash=True):
    """A manager of a cache: manage(cache, attention) -> (scores, keep), [(B,K,S)] of each layer.

    params (P,4172), mean and std (F,): statistics of the spectra, frozen (see `statistics`). A
    manager is called after each block, with the cache of all layers and the attention (B,K,T,S)
    that the block's T queries paid in each. What scores `threshold` or more stays; with a
    `capacity`, at most so many a head; if `shared`, so many in the mean over all heads of all
    layers. Three departures from the paper can be undone: capacity, `opened` (see `spectra`) and
    `squash` (see `features`)."""
    def manage(cache, attention):
        """Judge all slots after a block."""
        scores = []
        with torch.autocast(mean.device.type, enabled=False):  # float32, whatever the GPT has
            for layer, received in zip(cache, attention):
                spectrum = spectra(layer, received, opened)  # (B,K,S,F)
                age = layer.seen - 1 - layer.positions  # (B,K,S)
                x = features(spectrum, age, mean, std, squash)  # (B,K,S,25)
                scores.append(bam_scores(x, params))  # (B,K,S)
        budgets = [capacity] * len(cache) if capacity else None
        return scores, stays(cache, scores, threshold, budgets, shared)
    return manage


# --- 1. Attention -> spectrogram (section 3.1) ---------------------------------------------------

@lru_cache
def fourier(device):
    """The Fourier matrix under a periodic Hann window: F cosines above 15 sines (of 17 the first
    and the last are zero), (32,32)."""
    turn = torch.outer(torch.arange(F), torch.arange(N_FFT)) * (2 * torch.pi / N_FFT)  # (F,32)
    return (torch.cat([turn.cos(), turn[1:-1].sin()]) * torch.hann_window(N_FFT)).to(device)


def magnitudes(windows):
    """Fourier magnitudes of windows (...,n,S) of n <= 32 samples: (...,F,S). Fewer than 32: the
    last ones are zero."""
    waves = fourier(windows.device)[:, :windows.shape[-2]] @ windows  # (...,32,S)
    cosines, sines = waves.square_().split([F, F - 2], dim=-2)
    cosines[..., 1:-1, :] += sines
    return cosines.sqrt_()


def spectrogram(samples):
    """Short-time Fourier magnitudes of the attention that each slot received: torch.stft, not
    centred.

    samples (B,K,HOP+T,S): what each slot received from T queries, T a multiple of HOP, and before
    them from the last HOP queries of the block before, zero for a new slot. Returns
    (B,K,S,frames,F), frames = T / HOP. A frame's window is the HOP samples before it and the HOP in
    it: so where a text is cut into blocks changes no frame."""
    windows = samples.unfold(2, N_FFT, HOP).mT  # (B,K,frames,32,S)
    return magnitudes(windows).permute(0, 1, 4, 2, 3)


# --- 2. Spectrogram -> one spectrum a token (section 3.1) ----------------------------------------

def moving_average(frames, old, gamma):
    """E = gamma^n * old + the sum over the n frames t of (1 - gamma) * gamma^(n - 1 - t) * frame t.

    frames (B,K,S,n,F), old (B,K,S,F), zero for a new slot -> (B,K,S,F). The start is not
    corrected."""
    for frame in frames.unbind(3):  # (B,K,S,F)
        old = frame.lerp(old, gamma)  # gamma * old + (1 - gamma) * frame
    return old


def spectra(layer, attention, opened=True):
    """The spectrum of each slot of one layer, (B,K,S,F), after a block with attention (B,K,T,S):
    the block's frames, averaged with what the layer's cache remembers in its `state`.

    Not in the paper: a Hann window falls to zero, so complete frames hardly count the newest
    queries, which know best what will be asked for. If `opened`, they count in the frame that they
    have opened as well, which is half of what a block of 32 shows: it is judged by, not
    remembered."""
    B, K, T, S = attention.shape
    attention, gamma = attention.float(), MEMORY ** (HOP / T)
    if "spectrum" not in layer.state:
        layer.state = {"tail": attention.new_zeros(B, K, S, HOP),
                       "spectrum": attention.new_zeros(B, K, S, F)}
    average = layer.state["spectrum"].mT.contiguous().mT  # slots last in memory, as in attention
    step = HOP if attention.device.type == "cpu" else T  # frame by frame: fits a CPU's cache
    for start in range(0, T, step):
        before = attention[:, :, start - HOP:start] if start else layer.state["tail"].mT
        samples = torch.cat([before, attention[:, :, start:start + step]], dim=2)
        there = S - T + start + step  # younger slots received nothing yet
        frames = spectrogram(samples[..., :there])
        average[:, :, :there] = moving_average(frames, average[:, :, :there], gamma)
    tail = attention[:, :, -HOP:]  # (B,K,HOP,S)
    layer.state = {"tail": tail.mT.contiguous(), "spectrum": average}
    if opened:
        frame = magnitudes(tail).mT  # half full: then zeros, (B,K,S,F)
        average = moving_average(frame[:, :, :, None], average, gamma)
    return average


# --- 3. Spectrum and age -> features -------------------------------------------------------------

def asinh(x):
    """As torch.asinh, in a quarter of its time on a CPU."""
    return (x.abs() + (x * x + 1).sqrt_()).log_().copysign_(x)


def features(average, age, mean, std, squash=True):
    """[sin and cos of the age at four speeds, normalised spectrum]: average (B,K,S,F), age (B,K,S)
    in tokens of the text (newest token 0), mean and std (F,) -> (B,K,S,25). `squash`, not in the
    paper: asinh tames outliers, since a lone fact draws more attention than evolution ever saw."""
    speed = 50_000.0 ** (-torch.arange(N_AGE // 2, device=age.device) / (N_AGE // 2))
    angle = age[..., None] * speed  # (B,K,S,4)
    z = (average - mean) / std.clamp(min=1e-7)  # (B,K,S,F)
    return torch.cat([angle.sin(), angle.cos(), asinh(z) if squash else z], dim=-1)


def statistics(totals, opened=True):
    """A manager that keeps everything and adds up count, sum and sum of squares of the spectra,
    over rows, heads, slots, layers and blocks, in `totals` (3,F) float64. See `mean_std`."""
    def manage(cache, attention):
        """Add each layer's spectra to the totals."""
        with torch.autocast(totals.device.type, enabled=False):
            for layer, received in zip(cache, attention):
                x = spectra(layer, received, opened).double().flatten(0, 2)  # (B K S, F)
                count = torch.full_like(x[0], len(x))
                totals.add_(torch.stack([count, x.sum(0), x.square().sum(0)]))
        return None, [layer.alive for layer in cache]
    return manage


def mean_std(totals):
    """Mean and (biased) standard deviation of each bin from the totals of `statistics`, (F,)
    each."""
    mean, square = totals[1:] / totals[0]
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


# --- 4. Features -> scores: backward attention memory (section 3.2) ------------------------------

def unpack(params, shapes=SHAPES):
    """params (P,n) -> {name: (P,*shape)}, views, in the order of `shapes`."""
    pieces = params.split([torch.Size(shape).numel() for shape in shapes.values()], dim=1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def bam_scores(features, params):
    """Scores: below zero, the token goes.

    features (B,K,S,25), params (P,4172), B = P x prompts, candidate-major; slots oldest first, dead
    ones on the left -> (B,K,S). One head of attention, in which a token sees itself and newer
    tokens only: is it redundant, given what came after? With the slots flipped, newest first, that
    is the ordinary causal mask, and dead slots, now last, are seen by no live one. Its output is a
    residual r and a multiplier m for the features: h = x (1 + m) + r, score = h w + b."""
    B, K, S, _ = features.shape
    p = unpack(params)
    x = features.flip(2).reshape(len(params), -1, N_IN)  # (P, prompts K S, 25), newest first
    qkv = torch.baddbmm(p["bqkv"][:, None], x, p["Wqkv"]).view(B, K, S, 3 * WIDTH)
    o = scaled_dot_product_attention(*qkv.split(WIDTH, dim=-1), is_causal=True)  # (B,K,S,32)
    o = o.reshape(len(params), -1, WIDTH)  # (P, prompts K S, 32)
    r, m = torch.baddbmm(p["bo"][:, None], o, p["Wo"]).chunk(2, dim=-1)  # 25 wide each
    h = x * (1 + m) + r
    return torch.baddbmm(p["b"][:, None], h, p["w"]).view(B, K, S).flip(2)


def scale(shapes=SHAPES):
    """1 / sqrt(number of inputs) of each parameter, (n,): the unit of its steps, so that one sigma
    fits all. A bias has that of its matrix."""
    inputs = {"bqkv": N_IN, "bo": WIDTH, "b": shapes["w"][0]}
    return torch.cat([torch.full(shape, inputs.get(name, shape[0]) ** -0.5).flatten()
                      for name, shape in shapes.items()])


# --- 5. Scores -> who stays ----------------------------------------------------------------------

def newest(scores, count):
    """Scores (B,K,S) in which the `count` newest slots stay whatever they had; NaN is the worst."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores[..., max(0, scores.shape[-1] - count):] = torch.inf
    return scores


def keep_mask(scores, threshold=0.0):
    """Keep what scores `threshold` or more, and the newest token always: (B,K,S) -> (B,K,S) bool.
    Parameters that are all zero score 0 everywhere: then only the capacity evicts."""
    return newest(scores, 1) >= threshold


def keep_best(scores, budget):
    """The newest slot and the best others, `budget` in all, or all when there are fewer; among
    equals the newer one: (B,K,S) -> (B,K,S) bool."""
    order = newest(scores, 1).argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., -budget:], True)


def keep_best_of_all(scores, budget):
    """One pool for all heads of all layers: scores [(B,K,S)] of each layer -> [(B,K,S)] bool. The
    newest slot of each head stays, and the best others of a row, in whatever layer and head,
    `budget` in all; among equals those of upper layers, then newer ones: equal heads keep the
    same."""
    pool = torch.cat([newest(own, 1).mT.flatten(1) for own in scores], dim=1)  # (B, slots of a row)
    best = keep_best(pool, budget).split([own[0].numel() for own in scores], dim=1)
    return [piece.view(own.mT.shape).mT for piece, own in zip(best, scores)]


def stays(cache, scores, threshold, budgets=None, shared=False):
    """Who stays in each layer, [(B,K,S)] bool, by its scores [(B,K,S)]: what scores `threshold` or
    more and is among the best: in each head of a layer as many as its entry of `budgets` says, or,
    if `shared`, as many in the mean over all heads of all layers."""
    keep = [keep_mask(own, threshold) for own in scores]
    if budgets:
        scores = [own.masked_fill(~layer.alive, -torch.inf) for own, layer in zip(scores, cache)]
        if shared:
            best = keep_best_of_all(scores, sum(budgets) * scores[0].shape[1])
        else:
            best = [keep_best(own, budget) for own, budget in zip(scores, budgets)]
        keep = [own & top for own, top in zip(keep, best)]
    return keep


# --- 6. Rules: f(a layer's cache, attention (B,K,T,S), budget) -> scores (B,K,S), the higher stay -

def recent(layer, attention, budget):
    """The newest slots."""
    return layer.positions.float()


def streaming(layer, attention, budget):
    """StreamingLLM (Xiao et al. 2024): attention sinks, the first four tokens, and the newest."""
    return layer.positions.float().masked_fill(layer.positions < 4, 1e9)


def h2o(layer, attention, budget):
    """Heavy hitters (Zhang et al. 2023): the newest half of the budget, and of the rest those that
    received most attention, summed over every query so far."""
    before = layer.state.get("received", torch.zeros_like(layer.positions, dtype=torch.float))
    layer.state["received"] = before + attention.float().sum(2)
    return newest(layer.state["received"], budget // 2)


def tova(layer, attention, budget):
    """TOVA (Oren et al. 2024): what the newest query attends to, mean over a layer's heads."""
    return attention[:, :, -1].float().mean(1, keepdim=True).expand(layer.alive.shape)


def snapkv(layer, attention, budget):
    """SnapKV (Li et al. 2024): a window of the newest slots, and what its queries attend to,
    smoothed over five neighbours. The window is 32 queries, at most half a block and half the
    budget."""
    window = max(1, min(32, attention.shape[2] // 2, budget // 2))
    votes = attention[:, :, -window:].float().mean(2)  # (B,K,S)
    total = avg_pool1d(votes, 5, stride=1, padding=2)
    live = avg_pool1d(layer.alive.float(), 5, stride=1, padding=2)  # share of neighbours
    return newest(total / live.clamp(min=0.1), window)


def recent_attention(layer, attention, budget):
    """What the queries of the newest half block attend to: ours, written once we knew what evolved
    vectors keep."""
    return attention[:, :, attention.shape[2] // 2:].float().mean(2)


RULES = {f.__name__: f for f in (recent, streaming, h2o, tova, snapkv, recent_attention)}


def by_rule(rule, budget, pool=False, last=False):
    """A manager, as `namm` is one, that keeps `budget` slots in each head, the best by a rule of
    RULES. `pool`: so many in the mean over all heads of all layers. `last`: the same number, but
    the last layer takes all it can fill, then the one below, and each other head keeps one."""
    def manage(cache, attention):
        """Keep the best by the rule."""
        n = len(cache)
        budgets = [budget] * n
        if last:  # what one a layer below and all above leave
            budgets = [max(1, budget * n - i - (n - 1 - i) * cache[0].seen) for i in range(n)]
        scores = [rule(layer, received, most)
                  for layer, received, most in zip(cache, attention, budgets)]
        return scores, stays(cache, scores, -torch.inf, budgets, pool)
    return manage
