"""A GPT in the form of Llama 3, with a key/value cache of plain tensors.

  1. GPTConfig       the sizes
  2. KVCache         what a layer remembers of the tokens it read; slots are appended and evicted
  3. attend          attention over the cache: written out where its weights are wanted, else fused
  4. GPT             rotary positions, grouped-query attention, SwiGLU, RMSNorm; named as by Meta
  5. losses, train   Muon and AdamW, on prompts from data.py
  6. read, generate  a prompt in blocks; after each a manager says which slots stay; then answers

Letters: B rows, H query heads, K key/value heads, g = H / K query heads for each, T new tokens, S
slots in a layer's cache (the T new ones are the last), D width of a head, C width of the model, V
vocabulary.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Sizes ------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The sizes of a GPT; the defaults are those of the CPU preset."""
    vocab_size: int = 2048
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 1
    n_embd: int = 64
    head_dim: int = 32  # width of a head
    n_hidden: int = 176  # width inside SwiGLU
    rope_theta: float = 500_000.0  # base of the rotary angles
    rope_scale: float = 1.0  # NTK scaling: stretches the slow angles so much, leaves the fast
    rope_scaling: tuple = ()  # of Llama 3.1: factor, low and high frequency factor, trained length
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding
    smear: bool = True  # keys and queries mix in those of the three tokens before; off in Llama
    n_vector: int = 0  # width of the vector that a token may carry, such as a patch of a picture


# --- 2. The cache --------------------------------------------------------------------------------

class KVCache:
    """What one layer remembers: for each row and KV head, S slots, oldest first.

    keys (B,K,S,D), before rotation    values (B,K,S,D)    positions (B,K,S), in the text
    alive (B,K,S) bool: a head or row that keeps fewer slots than others has dead ones, which no
        query sees, on its left
    state {name: (B,K,S,...)}: what a manager remembers of each slot; zero for a new one
    renumber: keys are rotated to their place in the cache, instead of their place in the text
    """

    def __init__(self, keys, renumber=False):
        """An empty cache like `keys` (B,K,0,D)."""
        B, K, _, _ = keys.shape
        self.keys, self.values, self.renumber = keys, keys, renumber
        self.positions = torch.zeros(B, K, 0, dtype=torch.long, device=keys.device)
        self.alive = torch.zeros(B, K, 0, dtype=torch.bool, device=keys.device)
        self.state, self.seen = {}, 0
        self.ragged = False  # whether a slot is dead
        self.last = None  # inputs of the three newest tokens, to smear

    def append(self, keys, values):
        """Add T new slots, keys and values (B,K,T,D), on the right."""
        B, K, T, _ = keys.shape
        positions = torch.arange(self.seen, self.seen + T, device=keys.device).expand(B, K, T)
        self.keys = torch.cat([self.keys.to(keys.dtype), keys], dim=2)  # autocast decides
        self.values = torch.cat([self.values.to(values.dtype), values], dim=2)
        self.positions = torch.cat([self.positions, positions], dim=2)
        self.alive = F.pad(self.alive, (0, T), value=True)
        for name, x in self.state.items():
            self.state[name] = torch.cat([x, x.new_zeros(B, K, T, *x.shape[3:])], dim=2)
        self.seen += T

    def with_last(self, x):
        """Inputs x (B,T,C) after the three before them, zeros at the start: (B,3+T,C)."""
        x = F.pad(x, (0, 0, 3, 0)) if self.last is None else torch.cat([self.last, x], dim=1)
        self.last = x[:, -3:].clone()  # not a view, which would keep all of x
        return x

    def evict(self, keep):
        """Forget all slots outside `keep` (B,K,S) bool; memory shrinks to the largest number of
        slots that a head of a row keeps."""
        keep = keep & self.alive
        B, K, S = keep.shape
        fewest, most = torch.stack(keep.sum(-1).aminmax()).tolist()  # one wait for the device
        if fewest == S:
            return
        most = max(1, most)
        number = torch.arange(1, S + 1, device=keep.device)
        place = (keep * number).sort(-1).values[..., -most:]  # (B,K,most), 0 for a dead slot
        first = torch.arange(0, B * K * S, S, device=keep.device).view(B, K, 1)
        survivors = (first + (place - 1).clamp(min=0)).flatten()  # among all slots (B K S)

        # whole slots at once: faster than gather
        self.each(lambda x: x.flatten(0, 2).index_select(0, survivors).unflatten(0, (B, K, most)))
        self.alive, self.ragged = place > 0, fewest < most

    def repeat(self, times):
        """Stack `times` copies of all rows, one below the other."""
        self.each(lambda x: torch.cat([x] * times))
        self.last = None if self.last is None else torch.cat([self.last] * times)

    def each(self, f):
        """Put f(x) in the place of all x (B,K,S,...)."""
        for name in ("keys", "values", "positions", "alive"):
            setattr(self, name, f(getattr(self, name)))
        self.state = {name: f(x) for name, x in self.state.items()}


def kept(cache):
    """Share of the tokens read that is alive in a cache [KVCache of each layer]: mean over layers
    and heads, (B,)."""
    alive = sum(layer.alive.sum((1, 2)) for layer in cache)  # (B,)
    return alive.double() / (len(cache) * cache[0].alive.shape[1] * max(1, cache[0].seen))


# --- 3. Attention over the cache -----------------------------------------------------------------

def attend(q, k, v, alive=None):
    """Causal attention of the T newest tokens over S slots, written out, since a manager looks at
    its weights.

    q (B,K,g,T,D), k and v (B,K,S,D), alive (B,K,S) bool, or None when no slot is dead. Returns the
    output (B,K,g,T,D), and the softmax weights, mean over a group's query heads, (B,K,T,S)."""
    B, K, g, T, D = q.shape
    S = k.shape[2]
    if T > 64:  # in pieces: scores that fit a processor's cache, and none for slots after a piece
        out, received = torch.empty_like(q), q.new_zeros(B, K, T, S, dtype=torch.float)
        for i in range(0, T, 64):
            own, n = slice(i, i + 64), S - max(0, T - i - 64)
            out[..., own, :], received[:, :, own, :n] = attend(
                q[..., own, :], k[:, :, :n], v[:, :, :n], None if alive is None else alive[..., :n])
        return out, received
    mask = torch.full((T, S), -math.inf, device=q.device).triu(S - T + 1).repeat(g, 1)  # (gT,S)
    if alive is not None:
        mask = mask + torch.where(alive, 0.0, -math.inf).view(B * K, 1, S)  # (B K,gT,S)
    q, k, v = q.reshape(B * K, g * T, D), k.reshape(B * K, S, D), v.reshape(B * K, S, D)
    scores = torch.baddbmm(mask.to(q.dtype), q, k.mT, alpha=D ** -0.5)  # (B K,gT,S)
    weights = scores.float().softmax(-1)
    out = (weights.to(v.dtype) @ v).view(B, K, g, T, D)
    return out, weights.view(B, K, g, T, S).mean(2)


def attend_fused(q, k, v, alive=None):
    """The output of `attend` by PyTorch's own kernel, and None, since that shows no weights."""
    B, K, g, T, D = q.shape
    S = k.shape[2]
    if S == T and alive is None:
        q = q.reshape(B, K * g, T, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=g > 1)
    else:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if alive is not None:
            seen = seen & alive[:, :, None]  # (B,K,T,S)
        mask = torch.cat([seen] * g, dim=-2)  # a group's queries share keys: one product
        out = F.scaled_dot_product_attention(q.reshape(B, K, g * T, D), k, v, attn_mask=mask)
    return out.view(B, K, g, T, D), None


def rotate(x, turns):
    """Rotary positions: two neighbours in x (...,D) are a complex number, and are multiplied by
    their turn (...,D/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (...,D/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


# --- 4. The GPT ----------------------------------------------------------------------------------

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
        if config.smear:  # taps[j] of a head weighs what is j back
            self.k_taps = nn.Parameter(torch.eye(4)[:1].repeat(K, 1))  # (K,4)
            apart = torch.arange(H // K) % 4  # query heads start 0, 1, 2, 3 tokens back
            self.q_taps = nn.Parameter(torch.eye(4)[apart].repeat(K, 1))  # (H,4)

    def forward(self, x, table, cache, want=None):
        """x (B,T,C), table: the turns of all positions. Appends to the cache. Returns what is added
        to x, (B,T,C), and what is wanted, see `GPT.hidden`."""
        B, T, _ = x.shape
        K, g, D = self.sizes
        v = self.wv(x).view(B, T, K, D).transpose(1, 2)  # (B,K,T,D)
        if self.smear:
            x = cache.with_last(x)  # (B,3+T,C)
        q = self.wq(x).view(B, -1, K, g, D).permute(0, 2, 3, 1, 4)  # (B,K,g,T,D), 3 more to smear
        k = self.wk(x).view(B, -1, K, D).transpose(1, 2)  # (B,K,T,D), 3 more to smear
        if self.smear:
            q_taps, k_taps = self.q_taps.to(q.dtype), self.k_taps.to(k.dtype)
            back = [slice(3 - j, 3 - j + T) for j in range(4)]
            q = sum(q_taps[:, j].view(K, g, 1, 1) * q[..., back[j], :] for j in range(4))
            k = sum(k_taps[:, j].view(K, 1, 1) * k[..., back[j], :] for j in range(4))
        cache.append(k, v)
        S = cache.keys.shape[2]
        turns = table[:S] if cache.renumber else table[cache.positions]  # (S,D/2) or (B,K,S,D/2)
        q = rotate(q, turns[..., None, -T:, :])  # the T newest slots are the queries
        k = rotate(cache.keys, turns)
        attention = attend if want == "attention" else attend_fused
        out, received = attention(q, k, cache.values, cache.alive if cache.ragged else None)
        heads = out.permute(0, 3, 1, 2, 4).reshape(B, T, -1)  # (B,T,H D)
        return self.wo(heads), heads if want == "heads" else received


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
        if config.n_vector:
            self.vectors = nn.Linear(config.n_vector, config.n_embd, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.output = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.zeros_(p)  # every layer starts as the identity
            elif p.dim() == 2 and "taps" not in name:
                nn.init.normal_(p, std=config.n_embd ** -0.5)
        if config.smear:
            # Queries start equal to keys: heads attend at once to tokens like this one, or like the
            # one, two or three before it. No two are equal: they would get the same gradient.
            for layer in self.layers:
                K, g, _ = layer.attention.sizes
                keys = layer.attention.wk.weight.data.view(K, 1, -1)
                layer.attention.wq.weight.data.view(K, g, -1)[:, :4] = keys
            # in the last layer, which finds facts, keys start as those of the token before
            self.layers[-1].attention.k_taps.data = torch.eye(4)[1:2].repeat(config.n_kv_head, 1)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def new_cache(self, rows, renumber=False):
        """An empty cache for `rows` rows, [KVCache of each layer]."""
        c, weight = self.config, self.tok_embeddings.weight
        empty = weight.new_zeros(rows, c.n_kv_head, 0, c.head_dim)
        return [KVCache(empty, renumber) for _ in self.layers]

    def scaled(self, times):
        """The same weights with rotary angles for texts `times` as long: NTK scaling."""
        other = copy.copy(self)
        other.config = replace(self.config, rope_scale=self.config.rope_scale * times)
        return other

    def rotary_table(self, n):
        """The turns at positions 0..n-1, complex numbers of length 1, (n,D/2)."""
        c, D, device = self.config, self.config.head_dim, self.tok_embeddings.weight.device
        theta = c.rope_theta * c.rope_scale ** (D / (D - 2))
        speed = theta ** (-torch.arange(0, D, 2, device=device) / D)  # (D/2,) a token
        if c.rope_scaling:  # slow angles are slowed by a factor
            factor, low, high, length = c.rope_scaling
            rounds = length * speed / (2 * math.pi)  # full turns in the trained length, (D/2,)
            fast = ((rounds - low) / (high - low)).clamp(0, 1)  # 1: left alone, 0: slowed
            speed = fast * speed + (1 - fast) * speed / factor
        angles = torch.arange(n, device=device)[:, None] * speed
        return torch.complex(angles.cos(), angles.sin())

    def embedded(self, tokens):
        """tokens (B,T), or each with its vector behind it, (B,T,1+n_vector) -> (B,T,C)."""
        if tokens.dim() == 2:
            return self.tok_embeddings(tokens)
        return self.tok_embeddings(tokens[..., 0].long()) + self.vectors(tokens[..., 1:])

    def hidden(self, tokens, cache=None, want=None):
        """tokens, see `embedded`, after those that the cache has seen -> the output layer's input
        (B,T,C), and a list with what is wanted of each layer, or None: "attention", its weights,
        (B,K,T,S); "heads", what its heads read of the cache, (B,T,H D)."""
        cache, noted = cache or self.new_cache(len(tokens), renumber=True), []
        x, table = self.embedded(tokens), self.rotary_table(tokens.shape[1] + cache[0].seen)
        for layer, own in zip(self.layers, cache):
            added, note = layer.attention(layer.attention_norm(x), table, own, want)
            x = x + added
            x = x + layer.feed_forward(layer.ffn_norm(x))
            noted.append(note)
        return self.norm(x), noted

    def forward(self, tokens, cache=None):
        """tokens (B,T) -> logits (B,T,V)."""
        return self.output(self.hidden(tokens, cache)[0])


# --- 5. Training ---------------------------------------------------------------------------------

def world():
    """(rank, number of processes) of a run that torchrun started, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(x):
    """x, summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def read_with_holes(gpt, tokens, draw):
    """Read contexts (N,n) in two halves. After each, all layers but the last, which finds facts,
    forget a random share of each prompt's slots, mostly a large one: so the GPT learns to read
    caches with holes. -> hidden states (N,n,C), head outputs [(N,n,H D)] of each layer, and the
    cache."""
    n, K = tokens.shape[1], gpt.config.n_kv_head
    cache, hidden, heads = gpt.new_cache(len(tokens), renumber=True), [], []
    for half in tokens.split((n + 1) // 2, dim=1):
        x, read_of_cache = gpt.hidden(half, cache, "heads")
        hidden.append(x)
        heads.append(read_of_cache)
        for layer in cache[:-1]:
            luck = draw(K, n).gather(2, layer.positions)  # (N,K,S), of the slots' tokens
            keep = luck < draw(1, 1) ** 3  # half of the time an eighth or less stays
            keep[..., -1] = True
            layer.evict(keep)
    return torch.cat(hidden, dim=1), [torch.cat(own, dim=1) for own in zip(*heads)], cache


def recall_loss(gpt, heads, recall, draw):
    """Mean cross-entropy of each prompt's words to recall, (N,). recall (N,n): a word, or -1. At
    each place one KV head, drawn from the upper half of the layers, must name the word by what it
    alone reads of the cache: heads [(N,n,H D)] of each layer. The GPT itself only predicts text."""
    c, at = gpt.config, recall >= 0
    layers, K = range(c.n_layer // 2, c.n_layer), c.n_kv_head
    who, named = (draw(recall.shape[1]) * (len(layers) * K)).long(), 0.0  # (N,n), (N,n,C)
    width = c.n_head // K * c.head_dim  # columns of wo that a KV head writes by
    for number in range(len(layers) * K):
        i, own = layers[number // K], slice(number % K * width, (number % K + 1) * width)
        wrote = heads[i][..., own] @ gpt.layers[i].attention.wo.weight[:, own].T
        named = named + wrote * (who == number)[..., None]
    loss = F.cross_entropy(gpt.output(gpt.norm(named[at])), recall[at], reduction="none")
    return prompt_mean(loss, at)


def prompt_mean(values, where):
    """Mean of the values (M,) over each prompt's places: where (N,L) bool has M. -> (N,)"""
    total = torch.zeros(len(where), device=values.device)
    return total.index_add(0, where.nonzero()[:, 0], values.float()) / where.sum(1).clamp(min=1)


def losses(gpt, batch, recall, draw):
    """Losses of N prompts, (N,) each: mean cross-entropy of a prompt's answers, of an eighth of its
    other tokens, and of its words to recall; and the share of its answer tokens that are right.

    recall (N,L-1): words to recall, -1 elsewhere. A plain GPT, for which it is (N,0), reads its
    prompts in one go, without holes; its third loss is that of answers on the way, where
    batch.answer is -1. draw(*shape): uniform random numbers (N,*shape)."""
    n, inputs, plain = batch.context, batch.inputs(), recall.shape[1] == 0
    if plain:
        hidden = gpt.hidden(inputs[:, :-1])[0]  # (N,L-1,C)
    else:
        hidden, heads, cache = read_with_holes(gpt, inputs[:, :n], draw)
        hidden = torch.cat([hidden, gpt.hidden(inputs[:, n:-1], cache)[0]], dim=1)
        recalled = recall_loss(gpt, heads, recall[:, :n], draw)
    answer, target = batch.answer[:, 1:], batch.tokens[:, 1:]  # (N,L-1) each
    # an eighth of the text is enough: the vocabulary is the costliest part of so small a GPT
    text = (answer == 0) & (draw(answer.shape[1]) < 0.125)
    text &= (answer > 0).flip(1).cumsum(1).flip(1) > 0  # not the line ends after the last answer

    def predicted(where):
        """Mean cross-entropy of each prompt's tokens at M places (N,L-1), (N,); logits (M,V)."""
        logits = gpt.output(hidden[where])
        loss = F.cross_entropy(logits, target[where], reduction="none")
        return prompt_mean(loss, where), logits

    (answers, logits), (texts, _) = predicted(answer > 0), predicted(text)
    if plain:
        recalled, _ = predicted(answer < 0)
    right = logits.argmax(-1) == target[answer > 0]
    return answers, texts, recalled, prompt_mean(right, answer > 0)


def gradient(gpt, batch, recall, seed, rows, precision):
    """Add the gradient of some rows (n,) of a batch; their `losses`, (4,n)."""
    generator = torch.Generator(rows.device).manual_seed(seed)

    def draw(*shape):
        """Uniform random numbers (n,*shape). Those of all rows are drawn, so that a row's do not
        depend on which others are read with it."""
        return torch.rand(len(recall), *shape, generator=generator, device=rows.device)[rows]

    with precision:
        found = losses(gpt, batch.each(lambda x: x[rows]), recall[rows], draw)
    answers, texts, recalled, _ = found
    ((answers + 0.5 * texts + recalled).sum() / len(recall)).backward()
    return torch.stack(found).detach()


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before it is a step (Jordan 2024). As torch.optim.Muon, but that
    always computes in bfloat16, which is slow on many CPUs."""

    def __init__(self, matrices, lr=0.0):
        super().__init__(matrices, {"lr": lr})
        for p in matrices:
            self.state[p]["average"] = torch.zeros_like(p)  # of its gradients

    @torch.no_grad()
    def step(self):
        """Move each matrix, by its gradient."""
        [group] = self.param_groups
        for p in group["params"]:
            average, tall = self.state[p]["average"], len(p) > p.shape[1]
            average.lerp_(p.grad, 0.05)
            x = p.grad.lerp(average, 0.95)  # Nesterov momentum
            x = (x.T if tall else x) / x.norm().clamp(min=1e-7)
            for _ in range(5):  # all singular values go to about 1
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            p.sub_(x.T if tall else x, alpha=group["lr"] * max(1, len(p) / p.shape[1]) ** 0.5)


def train(gpt, batches, steps, lr, precision, at_once, state=None, keep=None):
    """Train the matrices of the layers with Muon, all else with AdamW: a short warm-up, then a
    linear decay to 5 %.

    batches: of each step to come, (data.Batch of N prompts, words to recall, seed), the same in all
    processes; each trains on its own rows, at most `at_once` tokens at a time. precision: the
    context to compute in. keep(state) is called every 100 steps; with that state, and the batches
    from state["step"] on, training goes on to the same bits. Raises FloatingPointError when the
    gradient is not finite any more."""
    named = gpt.layers.named_parameters()
    matrices = [p for name, p in named if p.dim() == 2 and "taps" not in name]
    others = [p for p in gpt.parameters() if not any(p is matrix for matrix in matrices)]
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    (rank, size), device = world(), matrices[0].device
    first, saved = state["step"] if state else 0, {"model": gpt, "muon": muon, "adamw": adamw}
    for name in saved if state else ():
        saved[name].load_state_dict(state[name])
    bar = tqdm(range(first, steps), desc="train GPT", initial=first, total=steps, mininterval=1,
               dynamic_ncols=True, disable=True if rank else None)
    for step, (batch, recall, seed) in zip(bar, batches):
        if keep and step % 100 == 0 and step > first:
            keep({"step": step} | {name: part.state_dict() for name, part in saved.items()})
        N, L = batch.tokens.shape
        batch, recall = batch.each(lambda x: x.to(device)), recall.to(device)
        rows = torch.arange(rank, N, size, device=device).split(max(1, at_once // L))
        done = [gradient(gpt, batch, recall, seed, some, precision) for some in rows]
        for p in gpt.parameters():
            summed(p.grad)
        norm = nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        if (step % 10 == 0 or step == steps - 1) and not norm.isfinite():
            raise FloatingPointError(f"training diverged at step {step}; lower --lr")
        rate = min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps)
        for optimizer, peak in ((muon, 2 * lr), (adamw, lr)):
            optimizer.param_groups[0]["lr"] = peak * rate
            with precision:  # for Muon's products of matrices
                optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:  # to print costs a wait for the device
            loss, text, _, right = torch.cat(done, dim=1).mean(1).tolist()
            bar.set_postfix_str(f"length {L} loss {loss:.2f} text {text:.2f} right {right:.2f}")


# --- 6. Reading a prompt in blocks, and writing on -----------------------------------------------

def evict(cache, attention, manage, observe=None):
    """Evict from all layers what manage(cache, attention) says, after a look by observe; see
    `read`."""
    scores, keep = manage(cache, attention)
    if observe:
        observe(cache, scores, keep)
    for layer, own in zip(cache, keep):
        layer.evict(own)


@torch.no_grad()
def read(gpt, tokens, cache, delay, manage=None, begun=None, observe=None):
    """Read tokens (B,T) into the cache, in blocks that end where the tokens seen are a multiple of
    `delay`. After each whole block manage(cache, attention) -> (scores, keep), [(B,K,S)] each, says
    which slots stay, and observe(cache, scores, keep) may look on; attention [(B,K,T,S)] is what
    the block's T tokens paid. A block may come in several calls: `begun` is the attention of what
    came before. Returns the last block's hidden states, and the attention of a block begun."""
    ends = range(delay - cache[0].seen % delay, tokens.shape[1], delay)  # of all but the last
    for block in tokens.tensor_split(list(ends), dim=1):
        hidden, attention = gpt.hidden(block, cache, "attention" if manage else None)
        if begun and manage:  # until the block ends the cache only grows
            T = block.shape[1]
            attention = [torch.cat([F.pad(old, (0, T)), new], dim=2)
                         for old, new in zip(begun, attention)]
        begun = attention
        if cache[0].seen % delay == 0:
            if manage:
                evict(cache, begun, manage, observe)
            begun = None
    return hidden, begun


@torch.no_grad()
def generate(gpt, tokens, count, delay, manage=None, renumber=False):
    """Greedy continuation of tokens (B,T) by `count` tokens, (B,count). The cache is managed, see
    `read`, while the prompt is read and while the answer is written."""
    cache, begun, written = gpt.new_cache(len(tokens), renumber), None, []
    for _ in range(count):
        hidden, begun = read(gpt, tokens, cache, delay, manage, begun)
        tokens = gpt.output(hidden[:, -1:]).argmax(-1)  # (B,1), the only new token of the next
        written.append(tokens)
    return torch.cat(written, dim=1)
