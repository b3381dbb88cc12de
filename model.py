"""A GPT in the form of Llama 3, with a key/value cache that anyone can print and cut.

Read in this order:
  1. GPTConfig      the sizes
  2. KVCache        what one layer remembers of the tokens it read, and how slots are appended and evicted
  3. attend         attention over the cache: written out where the weights are wanted, fused elsewhere
  4. GPT            rotary positions, grouped-query attention, SwiGLU, RMSNorm; parameters named as in Meta's own files
  5. losses, train  Muon and AdamW, on prompts that somebody else draws; the heads are asked to recall as well
  6. read, generate the prompt in blocks through the cache, which a manager may cut after each block; then answers

Letters: B rows, H query heads, K key/value heads, g = H / K query heads for each of them, T new tokens, S slots now in
one layer's cache (survivors and the T new ones), D width of a head, C width of the model, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Sizes --------------------------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The sizes of a GPT; the defaults are those of the CPU preset. A real Llama 3 has tied and smear off."""
    vocab_size: int = 2048
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 1
    n_embd: int = 64
    head_dim: int = 32               # width of a head
    n_hidden: int = 176              # width inside SwiGLU
    rope_theta: float = 500_000.0    # base of the rotary angles
    rope_scale: float = 1.0          # NTK scaling: stretches the slow angles by this factor, leaves the fast ones
    rope_scaling: tuple = ()         # of Llama 3.1: factor, low and high frequency factor, trained length
    norm_eps: float = 1e-5
    tied: bool = True                # the output layer is the embedding
    smear: bool = True               # keys and queries mix in those just before: lets a tiny GPT retrieve; off in Llama


# --- 2. The cache ----------------------------------------------------------------------------------------------------

class KVCache:
    """What one layer remembers: for each row and KV head, S slots, oldest first.

    keys (B,K,S,D), before rotation    values (B,K,S,D)    positions (B,K,S), in the text    alive (B,K,S) bool
    state {name: (B,K,S,...)}: whatever a manager wants to keep for each slot; it travels with the slot, and is zero for a new one.
    Where heads or rows keep fewer slots than others, dead padding on the left fills up, which no query sees. `renumber`: keys are
    rotated to their place in the cache (the survivors close ranks) instead of their place in the text.
    """

    def __init__(self, keys, renumber=False):
        """An empty cache like `keys` (B,K,0,D)."""
        B, K, _, _ = keys.shape
        self.keys, self.values, self.renumber = keys, keys, renumber
        self.positions = torch.zeros(B, K, 0, dtype=torch.long, device=keys.device)
        self.alive = torch.zeros(B, K, 0, dtype=torch.bool, device=keys.device)
        self.last = None                                                   # inputs of the newest tokens, to smear
        self.received = self.mixed = None                                  # what a layer notes here: see GPT.hidden
        self.state, self.seen, self.copies, self.ragged = {}, 0, 1, False  # ragged: some slot is dead

    def append(self, keys, values):
        """Add T new slots, keys and values (B,K,T,D), on the right."""
        B, K, T, _ = keys.shape
        positions = torch.arange(self.seen, self.seen + T, device=keys.device).expand(B, K, T)
        self.keys = torch.cat([self.keys.to(keys.dtype), keys], dim=2)     # autocast decides the type of the first
        self.values = torch.cat([self.values.to(values.dtype), values], dim=2)
        self.positions = torch.cat([self.positions, positions], dim=2)
        self.alive = F.pad(self.alive, (0, T), value=True)
        self.state = {name: torch.cat([x, x.new_zeros(B, K, T, *x.shape[3:])], dim=2) for name, x in self.state.items()}
        self.seen += T

    def with_last(self, x, n):
        """x (B,T,C) preceded by the n inputs before it (zeros at the start); remembers the last n: (B,n+T,C)."""
        x = F.pad(x, (0, 0, n, 0)) if self.last is None else torch.cat([self.last, x], dim=1)
        self.last = x[:, -n:].clone()                                      # not a view, which would keep all of x
        return x

    def evict(self, keep):
        """Forget every slot outside `keep` (B,K,S) bool. Memory shrinks to the largest number of survivors; a head or
        row that keeps fewer is padded with dead slots on the left."""
        keep = keep & self.alive
        count = keep.sum(-1)                                               # (B,K)
        fewest, most = torch.stack(count.aminmax()).tolist()               # one wait for the device
        S = max(1, most)
        if fewest == keep.shape[-1]:
            return
        order = (keep * torch.arange(1, keep.shape[-1] + 1, device=keep.device)).sort(-1).values[..., -S:] - 1
        index = order.clamp(min=0)                                         # (B,K,S) survivors in order, on the right

        def take(x):
            """x (B,K,S',...) -> (B,K,S,...)."""
            return x.gather(2, index.view(*index.shape, *[1] * (x.dim() - 3)).expand(*index.shape, *x.shape[3:]))

        self.keys, self.values, self.positions = take(self.keys), take(self.values), take(self.positions)
        self.state = {name: take(x) for name, x in self.state.items()}
        self.alive = order >= 0
        self.ragged = fewest < S

    def repeat(self, times):
        """Stack `times` copies of all rows, one below the other."""
        copies = lambda x: x if x is None else x.repeat(times, *[1] * (x.dim() - 1))
        for name in ("keys", "values", "positions", "alive", "last"):
            setattr(self, name, copies(getattr(self, name)))
        self.state = {name: copies(x) for name, x in self.state.items()}
        self.copies *= times


def kept(cache):
    """Share of the tokens read that is alive in a cache (a list, a KVCache for each layer): mean over layers and heads, (B,)."""
    alive = sum(layer.alive.sum((1, 2)) for layer in cache)                # (B,)
    return alive.double() / (len(cache) * cache[0].alive.shape[1] * max(1, cache[0].seen))


# --- 3. Attention over the cache -------------------------------------------------------------------------------------

PIECE = 64                         # queries at once where attention is written out, on a CPU


def attend(q, k, v, alive=None, weights=False):
    """Causal attention of the T newest tokens over S slots.

    q (B,K,g,T,D), k and v (B,K,S,D), alive (B,K,S) bool or None when no slot is dead. Returns the output,
    (B,K,g,T,D), and, if `weights`, what each slot received: softmax weights, mean over the group, (B,K,T,S).
    """
    B, K, g, T, D = q.shape
    S = k.shape[2]
    if not weights:
        if S == T and alive is None:
            out = F.scaled_dot_product_attention(q.reshape(B, K * g, T, D), k, v, is_causal=True, enable_gqa=g > 1)
        else:
            seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            seen = seen if alive is None else seen & alive[:, :, None]     # (T,S) or (B,K,T,S)
            mask = torch.cat([seen] * g, dim=-2)                           # a group's queries share keys: one matmul
            out = F.scaled_dot_product_attention(q.reshape(B, K, g * T, D), k, v, attn_mask=mask)
        return out.view(B, K, g, T, D), None
    out, received = [], torch.zeros(B, K, T, S, device=q.device)
    dead = None if alive is None else torch.zeros(B, K, S, device=q.device).masked_fill(~alive, -math.inf)      # (B,K,S)
    at_once = PIECE if q.device.type == "cpu" else T
    for start in range(0, T, at_once):                                     # piece by piece: scores fit the cache of a CPU, and
        piece = q[:, :, :, start:start + at_once]                          # no piece looks at slots after it: twice as fast
        n = piece.shape[3]
        there = S - T + start + n                                          # slots that this piece may look at
        scores = (piece.reshape(B, K, g * n, D) * D ** -0.5) @ k[:, :, :there].transpose(-1, -2)        # (B,K,gn,there)
        future = torch.full((n, n), -math.inf, device=q.device).triu(1)    # to add it takes a seventh of masked_fill's time
        scores.view(B, K, g, n, there)[..., there - n:] += future
        if dead is not None:
            scores += dead[:, :, None, :there]
        scores = scores.softmax(-1)
        out.append((scores.to(v.dtype) @ v[:, :, :there]).view(B, K, g, n, D))
        received[:, :, start:start + n, :there] = scores.view(B, K, g, n, there).mean(2)
    return torch.cat(out, dim=3), received


def rotate(x, turns):
    """Rotary positions: each pair of neighbours in x (...,D) is a complex number, multiplied by its turn, (...,D/2) complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))        # (...,D/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


# --- 4. The GPT ------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Grouped-query attention over a cache."""

    def __init__(self, config):
        super().__init__()
        H, K, D, C = config.n_head, config.n_kv_head, config.head_dim, config.n_embd
        self.sizes, self.smear = (K, H // K, D), config.smear
        self.wq = nn.Linear(C, H * D, bias=False)
        self.wk = nn.Linear(C, K * D, bias=False)
        self.wv = nn.Linear(C, K * D, bias=False)
        self.wo = nn.Linear(H * D, C, bias=False)
        if config.smear:                                                   # taps[j] of a head weighs what is j back
            self.k_taps = nn.Parameter(torch.eye(4)[:1].repeat(K, 1))      # (K,4), at first x itself
            apart = torch.arange(H // K) % 4                               # a group's query heads start 0, 1, 2, 3 tokens back
            self.q_taps = nn.Parameter(torch.eye(4)[apart].repeat(K, 1))   # (H,4)

    def forward(self, x, table, cache, weights=False):
        """x (B,T,C), table: the turns of all positions -> (B,T,C). Appends to the cache, and notes in it what `hidden` says."""
        B, T, _ = x.shape
        K, g, D = self.sizes
        v = self.wv(x).view(B, T, K, D).transpose(1, 2)                    # (B,K,T,D)
        if self.smear:                                                     # x of the three tokens before these, first
            x = cache.with_last(x, 3)
        q = self.wq(x).view(B, -1, K, g, D).permute(0, 2, 3, 1, 4)         # (B,K,g,T,D), or (B,K,g,3+T,D)
        k = self.wk(x).view(B, -1, K, D).transpose(1, 2)                   # (B,K,T,D), or (B,K,3+T,D)
        if self.smear:
            q_taps, k_taps = self.q_taps.to(q.dtype), self.k_taps.to(k.dtype)              # autocast skips elementwise products
            q = sum(q_taps[:, j].view(K, g, 1, 1) * q[..., 3 - j:3 - j + T, :] for j in range(4))
            k = sum(k_taps[:, j].view(K, 1, 1) * k[..., 3 - j:3 - j + T, :] for j in range(4))
        cache.append(k, v)
        at = torch.arange(cache.keys.shape[2], device=x.device) if cache.renumber else cache.positions   # (S,) or (B,K,S)
        q, k = rotate(q, table[at[..., None, -T:]]), rotate(cache.keys, table[at])       # the T newest slots are the queries
        out, received = attend(q, k, cache.values, cache.alive if cache.ragged else None, weights)
        if weights and cache.received is not None:                         # until the manager runs the cache only grows
            received = torch.cat([F.pad(cache.received, (0, T)), received], dim=2)
        mixed = out.permute(0, 3, 1, 2, 4).reshape(B, T, -1)               # (B,T,H D)
        cache.received, cache.mixed = received, mixed if torch.is_grad_enabled() else None
        return self.wo(mixed)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.w2 = nn.Linear(config.n_hidden, config.n_embd, bias=False)
        self.w3 = nn.Linear(config.n_embd, config.n_hidden, bias=False)

    def forward(self, x):
        """(B,T,C) -> (B,T,C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each on the normalised stream and added to it."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.n_embd, config.norm_eps)


class GPT(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.output = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.zeros_(p)                                          # every layer starts as the identity
            elif p.dim() == 2 and "taps" not in name:
                nn.init.normal_(p, std=config.n_embd ** -0.5)
        if config.smear:
            # Queries start equal to keys: from the first step on heads attend to tokens like this one, or like the one, two or
            # three before it. Two heads that start alike in all would stay alike: their gradients would be the same.
            for layer in self.layers:
                K, g, _ = layer.attention.sizes                            # (K,g,D C) becomes (K,1,D C)
                layer.attention.wq.weight.data.view(K, g, -1)[:, :4] = layer.attention.wk.weight.data.view(K, 1, -1)
            # in the last layer keys start as those of the token before: there facts are found
            self.layers[-1].attention.k_taps.data = torch.eye(4)[1:2].repeat(config.n_kv_head, 1)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def new_cache(self, rows, renumber=False):
        """An empty cache for `rows` rows: a list with a KVCache for each layer."""
        c, weight = self.config, self.tok_embeddings.weight
        return [KVCache(weight.new_zeros(rows, c.n_kv_head, 0, c.head_dim), renumber) for _ in self.layers]

    def rotary_table(self, n):
        """The turns at positions 0..n-1, complex numbers of length 1, (n, D/2)."""
        c, D, device = self.config, self.config.head_dim, self.tok_embeddings.weight.device
        theta = c.rope_theta * c.rope_scale ** (D / (D - 2))
        speed = theta ** (-torch.arange(0, D, 2, device=device) / D)       # (D/2,) radians a token
        if c.rope_scaling:                                # Llama 3.1 slows the slow angles by a factor
            factor, low, high, length = c.rope_scaling
            rounds = length * speed / (2 * math.pi)       # full turns in the trained length, (D/2,)
            fast = ((rounds - low) / (high - low)).clamp(0, 1)         # 1: left alone, 0: slowed
            speed = fast * speed + (1 - fast) * speed / factor
        angles = torch.arange(n, device=device)[:, None] * speed
        return torch.complex(angles.cos(), angles.sin())

    def hidden(self, tokens, cache=None, weights=False):
        """tokens (B,T) -> (B,T,C), what the output layer reads. With a cache the tokens follow those it has seen. Each layer of it
        notes in `received`, if `weights`, the attention that each slot got, (B,K,T,S), of all calls since somebody made it None, as
        `read` does after each block; and in `mixed`, if gradients are on, what its heads read of it in this call, (B,T,H D)."""
        cache = cache or self.new_cache(len(tokens), renumber=True)
        x, table = self.tok_embeddings(tokens), self.rotary_table(tokens.shape[1] + cache[0].seen)
        for layer, own in zip(self.layers, cache):
            x = x + layer.attention(layer.attention_norm(x), table, own, weights)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return self.norm(x)

    def forward(self, tokens, cache=None, weights=False):
        """As `hidden`, but logits (B,T,V)."""
        return self.output(self.hidden(tokens, cache, weights))


# --- 5. Training -----------------------------------------------------------------------------------------------------

def world():
    """(rank, number of processes) of a run that torchrun started, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(x):
    """x, summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def losses(gpt, batch, recall, draw):
    """Losses of N prompts, (N,) each: mean cross-entropy of a prompt's answers, of a quarter of its other tokens, and of
    `recall`; and the share of its answer tokens that are right. draw(*shape): uniform random numbers (N,*shape).

    recall (N,L-1): a word to name at some places of a context, -1 elsewhere. One KV head, drawn for each place from those of the
    middle layer and all above, must name it by what it alone reads from the cache there; the GPT only predicts text. After either
    half of the context each prompt forgets a random share of its slots, mostly a large one, in all layers but the last, where the
    facts are found: so the GPT has met caches with holes."""
    c, n = gpt.config, batch.context
    width = c.n_head // c.n_kv_head * c.head_dim                           # columns of wo that a KV head's queries write through
    heads = [(i, slice(k * width, (k + 1) * width)) for i in range(c.n_layer // 2, c.n_layer) for k in range(c.n_kv_head)]
    cache, hidden, mixed = gpt.new_cache(len(batch.tokens), renumber=True), [], []
    for half in batch.tokens[:, :n].split((n + 1) // 2, dim=1):
        hidden.append(gpt.hidden(half, cache))
        mixed.append({i: cache[i].mixed for i in range(c.n_layer // 2, c.n_layer)})          # what the heads read of the cache
        for layer in cache[:-1]:                                           # holes: a share of its own for each prompt and layer
            luck = draw(c.n_kv_head, n).gather(2, layer.positions)         # (N,K,S), of a token wherever it now is
            keep = luck < draw(1, 1) ** 3                                  # half of the time an eighth or less stays
            keep[..., -1] = True
            layer.evict(keep)
    hidden = torch.cat([*hidden, gpt.hidden(batch.tokens[:, n:-1], cache)], dim=1)        # (N,L-1,C)

    def mean(loss, where):
        """Mean of loss (M,) over the places of each prompt: where (N,L) bool has M of them. -> (N,)"""
        of_row = torch.zeros(len(where), device=loss.device).index_add(0, where.nonzero()[:, 0], loss.float())
        return of_row / where.sum(1).clamp(min=1)

    recall = recall[:, :n]                                                 # (N,n)
    who = (draw(n) * len(heads)).long().masked_fill(recall < 0, -1)        # (N,n)
    mixed = {i: torch.cat([half[i] for half in mixed], dim=1) for i in mixed[0]}             # (N,n,H D) of each layer
    named = sum((mixed[i][..., own] @ gpt.layers[i].attention.wo.weight[:, own].T) * (who == h)[..., None]
                for h, (i, own) in enumerate(heads))[recall >= 0]          # (places,C)
    recalled = F.cross_entropy(gpt.output(gpt.norm(named)), recall[recall >= 0], reduction="none")

    answer, target = batch.answer[:, 1:] > 0, batch.tokens[:, 1:]          # (N,L-1) each
    # the vocabulary is the most expensive part of so small a GPT: of the text, a quarter of the places is enough; of the line
    # ends after the last answer, none
    text = ~answer & (answer.flip(1).cumsum(1).flip(1) > 0) & (draw(answer.shape[1]) < 0.25)        # (N,L-1)
    right = gpt.output(hidden[answer])                                     # (M,V)
    answers = F.cross_entropy(right, target[answer], reduction="none")
    return (mean(answers, answer), mean(F.cross_entropy(gpt.output(hidden[text]), target[text], reduction="none"), text),
            mean(recalled, recall >= 0), mean(right.argmax(-1) == target[answer], answer))


def gradient(gpt, batch, recall, seed, rows, precision):
    """Add the gradient of some rows (n,) of a batch, with noise that does not depend on which; their losses, (4,n)."""
    own, generator = batch.each(lambda x: x[rows]), torch.Generator(rows.device).manual_seed(seed)
    draw = lambda *shape: torch.rand(len(recall), *shape, generator=generator, device=rows.device)[rows]
    with precision:
        answers, text, recalled, right = losses(gpt, own, recall[rows], draw)
    ((answers + 0.5 * text + recalled).sum() / len(recall)).backward()
    return torch.stack([answers, text, recalled, right]).detach()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is a step (Jordan 2024). As torch.optim.Muon, which computes in bfloat16
    whatever the device: on a CPU without such instructions that takes ten times as long, a quarter of the whole training."""

    def __init__(self, matrices, lr=0.0, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        for p in matrices:
            self.state[p]["average"] = torch.zeros_like(p)                 # of its gradients

    @torch.no_grad()
    def step(self):
        """Move each matrix, by its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                average, tall = self.state[p]["average"], len(p) > p.shape[1]
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"])                # Nesterov's
                x = (x.T if tall else x) / x.norm().clamp(min=1e-7)        # the smaller matrix of products
                for _ in range(5):                                         # Newton and Schulz: all singular values go to about 1
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                p.sub_(x.T if tall else x, alpha=group["lr"] * max(1, len(p) / p.shape[1]) ** 0.5)


def train(gpt, batches, steps, lr, precision, state=None, keep=None):
    """Train the matrices of the layers by Muon, all else by AdamW: a short warm-up, then a straight decay to 5 %.

    `batches` gives for each step to come its prompts, a data.Batch of tokens (N,L) and answer (N,L); words to recall (N,L-1);
    and a seed: the same in all processes, each of which takes its rows. `precision`: a context to compute the loss in. Out of
    memory, it goes on with half the rows at once: the gradient is the same. keep(state) is called every 100 steps; from that
    state, and the batches from its `step` on, the training goes on to the same bits."""
    matrices = [p for name, p in gpt.layers.named_parameters() if p.dim() == 2 and "taps" not in name]
    others = [p for p in gpt.parameters() if not any(p is matrix for matrix in matrices)]
    muon, adamw = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = {muon: 5 * lr, adamw: lr}
    (rank, size), accuracy, device, most = world(), {}, matrices[0].device, math.inf
    first, saved = state["step"] if state else 0, {"model": gpt, "muon": muon, "adamw": adamw}
    for name in saved if state else ():
        saved[name].load_state_dict(state[name])
    bar = tqdm(range(first, steps), desc="train GPT", initial=first, total=steps, mininterval=1, dynamic_ncols=True,
               disable=True if rank else None)
    for step, (batch, recall, seed) in zip(bar, batches):
        if keep and step % 100 == 0 and step > first:
            keep({"step": step} | {name: part.state_dict() for name, part in saved.items()})
        N, L = batch.tokens.shape
        batch = batch.each(lambda x: x.to(device))
        rows, recall = torch.arange(rank, N, size, device=device), recall.to(device)
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps)
        done = None
        while done is None:
            at_once = max(1, min(most, len(rows) * L) // L)                # rows; most: tokens
            try:
                done = [gradient(gpt, batch, recall, seed, some, precision) for some in rows.split(at_once)]
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                most = at_once * L // 2
                tqdm.write(f"out of memory: training on {most} tokens at once from here on")
                gpt.zero_grad()
        for p in gpt.parameters():
            summed(p.grad)
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        for optimizer in optimizers:
            with precision:                                                # for Muon's products of matrices
                optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:                                                 # to print costs a wait for the device
            loss, text, _, right = torch.cat(done, dim=1)                  # (rows of this process,) each
            for task, share in zip(batch.tasks[rank::size], right.tolist()):
                accuracy[task] = 0.9 * accuracy.get(task, share) + 0.1 * share
            bar.set_postfix_str(f"length {L} loss {loss.mean().item():.2f} text {text.mean().item():.2f} right "
                                + " ".join(f"{task} {share:.2f}" for task, share in sorted(accuracy.items())))


# --- 6. Reading a prompt in blocks, and writing on -------------------------------------------------------------------

@torch.no_grad()
def read(gpt, tokens, cache, delay, manage=None, weights=False):
    """Read tokens (B,T) into the cache, in blocks that end where the tokens seen are a multiple of `delay`. After each
    whole block manage(cache, received) may evict, with what all the block's tokens attended to in each layer, in however many
    calls they came: [(B,K,T,S)], or [None] unless `weights`. If it stacks copies of the rows, all copies read on. Returns the
    last block's hidden states."""
    ends = range(delay - cache[0].seen % delay, tokens.shape[1], delay)    # where blocks end, without the last
    for block in tokens.tensor_split(list(ends), dim=1):
        out = gpt.hidden(block.repeat(cache[0].copies, 1), cache, weights)
        if cache[0].seen % delay == 0:
            if manage:
                manage(cache, [layer.received for layer in cache])
            for layer in cache:
                layer.received = None
    return out


@torch.no_grad()
def generate(gpt, tokens, count, delay, manage=None, weights=False, renumber=False):
    """Greedy continuation of tokens (B,T) by `count` tokens, (B,count). The cache is managed, by one candidate, while the
    prompt is read and while the answer is written, each time the tokens seen reach a multiple of `delay`."""
    cache, written = gpt.new_cache(len(tokens), renumber), []
    for _ in range(count):
        hidden = read(gpt, tokens, cache, delay, manage, weights)
        tokens = gpt.output(hidden[:, -1:]).argmax(-1)                     # (B,1) the only new token of the next round
        written.append(tokens)
    return torch.cat(written, dim=1)
