"""Clips, drawn or brought, with facts in a few of their frames; and a picture of what is kept.

A frame is 24 x 24 grey pixels, 9 tokens: a token's number says which patch of the frame it is, its
vector holds the patch's 8 x 8 pixels. Over a texture that hardly changes two squares bounce. In
some frames, one frame each, a marker and beside it a glyph: a fact. Then text is asked: a marker's
name; the answer is the name of the glyph that was beside it. A commentary may name both on the way.
Letters: N clips, M frames of each, R facts in each.
"""

import base64
import struct
import zlib

import numpy as np
import torch

from data import Batch, by_zipf

SIDE, PATCH = 24, 8  # pixels
PATCHES = (SIDE // PATCH) ** 2  # 9 tokens a frame
N_VECTOR = PATCH * PATCH
NAMES = 16  # markers, and as many glyphs
MARKER, GLYPH, ASK = PATCHES, PATCHES + NAMES, PATCHES + 2 * NAMES  # where their numbers start
VOCABULARY = ASK + 1
MOST = 8  # facts in a clip
KINDS = ("background", "sprite", "marker", "glyph", "comment")


def bitmaps():
    """How markers and glyphs look, (2,NAMES,8,8): mirrored, each like no other."""
    half = np.random.default_rng(7).choice([-1.0, 1.0], (2, NAMES, PATCH, PATCH // 2))
    return np.concatenate([half, half[..., ::-1]], axis=3).astype(np.float32)


# --- Frames --------------------------------------------------------------------------------------

def texture(rng, count, frames):
    """Smooth grey that hardly changes from frame to frame, (N,M,24,24)."""
    start = rng.normal(0, 0.5, (count, 1, 6, 6))
    change = rng.normal(0, 0.03, (count, frames, 6, 6)).cumsum(1)
    coarse = np.tanh(start + change).astype(np.float32) * 0.6
    return coarse.repeat(SIDE // 6, axis=2).repeat(SIDE // 6, axis=3)


def load_frames(path):
    """A user's clips, (clips,M,24,24) in [-0.6,0.6], from a .npy of (M,H,W) or (clips,M,H,W), bytes
    or numbers from 0 to 1. Raises ValueError for anything else."""
    try:
        clips = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"--frames {path}: not a .npy file of numbers ({error})") from None
    if not isinstance(clips, np.ndarray) or clips.ndim not in (3, 4) or min(clips.shape) < 1 or (
            min(clips.shape[-2:]) < SIDE):
        shape = getattr(clips, "shape", "of several arrays")
        raise ValueError(f"--frames {path}: shape {shape}; give (frames, height, width) or (clips, "
                         f"frames, height, width), grey, {SIDE} pixels a side or more")
    if clips.dtype == np.uint8:
        clips = clips / np.float32(255)
    if clips.dtype.kind != "f" or not (0 <= clips.min() and clips.max() <= 1):
        raise ValueError(f"--frames {path}: {clips.dtype}; give bytes (uint8), or floats from 0 to "
                         "1")
    clips = clips if clips.ndim == 4 else clips[None]
    down, across = (np.arange(SIDE) * size // SIDE for size in clips.shape[-2:])
    return (1.2 * clips[:, :, down][..., across] - 0.6).astype(np.float32)


def background(rng, count, frames, clips=None):
    """Frames to draw on, (N,M,24,24): texture, or a user's clips, forth and back."""
    if clips is None:
        return texture(rng, count, frames)
    there = np.arange(clips.shape[1])
    loop = np.concatenate([there, there[-2:0:-1]])  # the last frame's neighbours are alike, too
    order = loop[(np.arange(frames) + rng.integers(len(loop))) % len(loop)]
    return clips[rng.integers(len(clips), size=count)][:, order]


def add_sprites(rng, pixels):
    """Draw two squares of 5 pixels that bounce, in place; where they are, (N,M,24,24) bool."""
    count, frames = pixels.shape[:2]
    size, room = 5, SIDE - 5
    place, speed = rng.uniform(0, 2 * room, (count, 2, 2)), rng.uniform(-2, 2, (count, 2, 2))
    there = (place + speed * np.arange(frames)[:, None, None, None]) % (2 * room)  # (M,N,2,2)
    corner = (room - np.abs(there - room)).round().astype(int)
    mask = np.zeros(pixels.shape, bool)
    for frame in range(frames):
        for clip in range(count):
            for down, across in corner[frame, clip]:
                mask[clip, frame, down:down + size, across:across + size] = True
    pixels[mask] = 0.9
    return mask


def in_patches(pixels):
    """(N,M,24,24) -> (N,9M,64), frame by frame, the patches of a frame line by line."""
    count, frames = pixels.shape[:2]
    n = SIDE // PATCH
    cut = pixels.reshape(count, frames, n, PATCH, n, PATCH).swapaxes(3, 4)
    return cut.reshape(count, frames * PATCHES, N_VECTOR)


# --- Prompts -------------------------------------------------------------------------------------

def clips(rng, count, frames, share=0.0, own=None, again=False):
    """(Batch, words to recall (N,L-1), kinds (N,n)) of drawn clips. kinds: of each token of the
    context, a place in KINDS. Words to recall: at a `share` of the places where no fact stands, the
    name of any glyph seen before. own: a user's clips, from `load_frames`. again: facts are shown
    in the first two fifths of the frames; half of them come back in a commentary, see `commented`,
    and are asked for; no words to recall."""
    early = max(1, frames * 2 // 5) if again else frames
    facts = max(1, min(MOST, early * 4 // 5 if again else frames * 2 // 7))
    asked = (facts + 1) // 2 if again else facts
    pixels = background(rng, count, frames, own).copy()
    sprites = in_patches(add_sprites(rng, pixels)).any(2)  # (N,n)
    vectors, n = in_patches(pixels), frames * PATCHES
    kinds = sprites.astype(int)
    tokens = np.full((count, n + 1 + 2 * asked), ASK)
    tokens[:, :n] = np.arange(n) % PATCHES
    answer, words = np.zeros_like(tokens), np.full((count, tokens.shape[1] - 1), -1)
    looks = bitmaps().reshape(2, NAMES, N_VECTOR)
    for row in range(count):
        frame = np.sort(rng.choice(early, facts, replace=False))
        where = 3 * rng.integers(3, size=facts) + rng.integers(2, size=facts)
        at = frame * PATCHES + where  # (R,) of the marker; the glyph is the next patch
        marker, glyph = (rng.choice(NAMES, facts, replace=False) for _ in range(2))
        vectors[row, at], vectors[row, at + 1] = looks[0, marker], looks[1, glyph]
        kinds[row, at], kinds[row, at + 1] = 2, 3
        order = rng.permutation(facts)[:asked]
        tokens[row, n + 1::2], tokens[row, n + 2::2] = MARKER + marker[order], GLYPH + glyph[order]
        answer[row, n + 2::2] = 1 + np.arange(asked)
        places = np.flatnonzero((rng.random(n) < share) & (kinds[row] < 2))
        before = np.searchsorted(at + 1, places)  # how many glyphs were seen by then
        places, before = places[before > 0], before[before > 0]
        words[row, places] = GLYPH + glyph[(rng.random(len(places)) * before).astype(int)]
    vectors = np.concatenate([vectors, np.zeros((count, 1 + 2 * asked, N_VECTOR), np.float32)], 1)
    if again:
        tokens, answer, vectors, kinds = commented(rng, early, tokens, answer, vectors, kinds)
        n, words = kinds.shape[1], np.zeros((count, 0))
    batch = Batch(torch.from_numpy(tokens), torch.from_numpy(answer), n, ["video"] * count,
                  torch.from_numpy(vectors))
    return batch, torch.from_numpy(words), kinds


def commented(rng, early, *made):
    """tokens, answer (N,L), vectors (N,L,64), kinds (N,n) with comments between frames that follow
    the first `early`: the names of a marker and of its glyph, of facts that will be asked for. Each
    comes once, then some often, some rarely, by Zipf's law, M / 3 in all. The names of glyphs are
    answers on the way, -1."""
    frames, done = made[3].shape[1] // PATCHES, []
    for tokens, answer, vectors, kinds in zip(*made):
        pairs = rng.permutation(tokens[len(kinds) + 1:].reshape(-1, 2))  # of marker and glyph
        more = by_zipf(rng, len(pairs), max(0, frames // 3 - len(pairs)))
        told = pairs[rng.permutation([*range(len(pairs)), *more])]  # (comments,2)
        after = 1 + np.sort(rng.integers(min(early, frames - 1), frames, len(told)))  # frames
        at = PATCHES * after.repeat(2)
        done.append((np.insert(tokens, at, told.ravel()),
                     np.insert(answer, at, [0, -1] * len(told)),
                     np.insert(vectors, at, 0, axis=0),
                     np.insert(kinds, at, KINDS.index("comment"))))
    return map(np.stack, zip(*done))


# --- What is kept --------------------------------------------------------------------------------

def kept_by_kind(lives, kinds):
    """{kind: (its share of the tokens, of the kept slots)}: lives (N,K,n) bool of a layer, kinds
    (N,n)."""
    found = {}
    for number, name in enumerate(KINDS):
        own = kinds == number  # (N,n)
        found[name] = own.mean(), (lives & own[:, None]).sum() / max(1, lives.sum())
    return found


def png(pixels):
    """Bytes of a PNG of grey pixels (height,width), uint8."""
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()

    def chunk(kind, body):
        """Length, kind, body, check sum."""
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I",
                                                                        zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def picture(vectors, lives, kinds, title, across=14):
    """SVG: the frames of a clip in reading order, vectors (n,64), and a frame around each patch
    that is kept, lives (n,) bool, in the colour of its kind, kinds (n,)."""
    frames, n = len(vectors) // PATCHES, SIDE // PATCH
    pixels = vectors.reshape(frames, n, n, PATCH, PATCH).swapaxes(2, 3).reshape(-1, SIDE, SIDE)
    step, lines = SIDE + 3, -(-frames // across)
    sheet = np.full((lines * step, across * step), 255, np.uint8)
    colours = {"background": "#888888", "sprite": "#1f77b4", "marker": "#ff7f0e",
               "glyph": "#d62728"}
    marks = []
    for frame in range(frames):
        down, right = frame // across * step, frame % across * step
        grey = (127 + 80 * pixels[frame]).clip(0, 255)
        sheet[down:down + SIDE, right:right + SIDE] = grey
        for patch in range(PATCHES):
            at = frame * PATCHES + patch
            if lives[at]:
                x, y = right + patch % n * PATCH, down + patch // n * PATCH
                marks.append(f'<rect x="{x + .5}" y="{y + .5}" width="7" height="7" fill="none" '
                             f'stroke="{colours[KINDS[kinds[at]]]}" stroke-width="1.4"/>')
    image = base64.b64encode(png(sheet)).decode()
    legend = "".join(f'<tspan dx="8" fill="{colour}">{name}</tspan>'
                     for name, colour in colours.items())
    height, width = sheet.shape
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-6 -24 {width + 12} {height + 30}" '
            f'width="{2 * width + 24}"><rect x="-6" y="-24" width="{width + 12}" '
            f'height="{height + 30}" fill="#ffffff"/><text y="-9" font-size="9" '
            f'font-family="sans-serif">{title}:{legend}</text><image width="{width}" '
            f'height="{height}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{image}"/>{"".join(marks)}</svg>\n')
