"""python -m pytest extras/test_transfer.py: clips and worlds by hand, roll-outs, refusals."""

import copy
import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest
import torch

import data
import evolve
import model
import namm
from extras import runs, transfer, video, worlds

torch.set_num_threads(1)
SMALL = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16, "head_dim": 8, "n_hidden": 16}


def noisy(**sizes):
    """A GPT with noise in all weights: so that all of it matters."""
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(**SMALL | sizes)).eval()
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return gpt


def manager(capacity=6):
    """A NAMM of random parameters."""
    torch.manual_seed(1)
    params = 0.3 * torch.randn(1, namm.N_PARAMS)
    return namm.namm(params, torch.zeros(namm.F), torch.ones(namm.F), -torch.inf, capacity, True)


# --- Tokens that are vectors ---------------------------------------------------------------------

def test_vectors_are_tokens_where_the_linear_is_the_embedding():
    """Tokens as numbers, and as one-hot vectors of which the Linear is the embedding, give the same
    losses and the same answers, the cache managed, several candidates at once. Catches: vectors
    shifted against their tokens, copies of candidates in another order, targets that are not
    numbers."""
    gpt = noisy(vocab_size=20)
    gpt.tok_embeddings.weight.data[0] = 0
    other = noisy(vocab_size=20, n_vector=20)
    own = {name: p for name, p in gpt.state_dict().items()}
    other.load_state_dict(own | {"vectors.weight": own["tok_embeddings.weight"].T.clone()})
    torch.manual_seed(2)
    tokens = torch.randint(1, 20, (3, 80))
    answer = torch.zeros_like(tokens)
    answer[:, 70], answer[:, 75] = 1, 2
    batch = data.Batch(tokens, answer, 64, ["kv"] * 3)
    # the context as vectors, its numbers zero; what follows as numbers, its vectors zero
    numbers, vectors = tokens.clone(), torch.nn.functional.one_hot(tokens, 20).float()
    numbers[:, :64], vectors[:, 64:] = 0, 0
    config = evolve.Config(delay=16, length=64, device="cpu")
    carried = dataclasses.replace(batch, tokens=numbers, vectors=vectors)
    for copies in (1, 2):
        manage = manager() if copies == 1 else namm.namm(
            0.3 * torch.randn(2, namm.N_PARAMS), torch.zeros(namm.F), torch.ones(namm.F), 0.0, 6)
        want = evolve.answer_logits(gpt, batch, config, manage, copies)
        got = evolve.answer_logits(other, carried, config, manage, copies)
        for a, b in zip(want, got):
            assert torch.allclose(a, b, atol=1e-5)
    draw = lambda *shape: torch.full((3, *shape), 0.5)
    recall = torch.full((3, 79), -1)
    recall[:, 40] = 7
    want, got = (model.losses(g.train(), b, recall, draw)
                 for g, b in ((gpt, batch), (other, carried)))
    for i in (0, 2, 3):  # the text loss asks for the context's numbers
        assert torch.allclose(want[i], got[i], atol=1e-5)
    want, got = (model.losses(g, b, torch.zeros(3, 0), draw)
                 for g, b in ((gpt, batch), (other, carried)))
    assert torch.allclose(want[0], got[0], atol=1e-5) and torch.equal(want[3], got[3])


@pytest.mark.parametrize("how", transfer.Target.how)
def test_plain_has_nothing_to_recall(how, monkeypatch, tmp_path):
    """The lessons of a plain target hold no words to recall, which is what makes model.train read
    without holes; those of the other do. Catches: two names for one training."""
    seen = []
    monkeypatch.setattr(model, "train", lambda gpt, batches, *more: seen.extend(batches))
    monkeypatch.setattr(transfer.Video, "steps", 4)
    monkeypatch.setattr(transfer.Video, "tokens", 1024)
    config = evolve.Config(device="cpu", recall=0.25 * (how != "plain"))
    target = transfer.Video(config, None, None, "")
    transfer.trained(target, how, tmp_path, config)
    assert len(seen) == 4
    if how != "recall":
        assert all(words.shape[1] == 0 for _, words, _ in seen)
    else:
        assert (seen[-1][1] >= 0).any() and seen[-1][1].shape[1] == seen[-1][0].tokens.shape[1] - 1


# --- Clips ---------------------------------------------------------------------------------------

def test_clips_hold_what_is_asked():
    """Every answer is the glyph right of the marker that is asked, found by comparing pixels; every
    word to recall is a glyph's shown before. Catches: markers and glyphs swapped, facts drawn over,
    a glyph in the next line of patches, words that are not yet known."""
    batch, words, kinds = video.clips(np.random.default_rng(0), 4, 28, share=0.5)
    marker, glyph = video.bitmaps().reshape(2, video.NAMES, -1)
    n = batch.context
    assert n == 28 * 9 and batch.tokens[0, :n].tolist() == list(range(9)) * 28
    for row in range(4):
        patches, beside, when = batch.vectors[row, :n].numpy(), {}, {}
        for at in range(n):
            name = np.flatnonzero((patches[at] == marker).all(1))
            if len(name):
                [shown] = np.flatnonzero((patches[at + 1] == glyph).all(1))
                beside[int(name[0])], when[int(shown)] = int(shown), at + 1
                assert at % 3 < 2 and list(kinds[row, at:at + 2]) == [2, 3]
        assert len(beside) == video.MOST
        asked = batch.tokens[row, n + 1::2] - video.MARKER
        told = batch.tokens[row, n + 2::2] - video.GLYPH
        assert {int(a): int(b) for a, b in zip(asked, told)} == beside
        assert batch.answer[row].nonzero()[:, 0].tolist() == list(range(n + 2, n + 18, 2))
        places = (words[row] >= 0).nonzero()[:, 0].tolist()
        assert len(places) > 50
        assert all(when[int(words[row, at]) - video.GLYPH] < at for at in places)


def test_a_commentary_names_what_was_shown_and_will_be_asked():
    """Without its comments the context is a clip whose facts are in the first frames; each comment
    is a marker and the glyph beside it, half of the facts come back, and these are asked. Catches:
    comments before their fact, pairs mixed up, names that carry a patch."""
    batch, words, kinds = video.clips(np.random.default_rng(0), 4, 28, again=True)
    n, looks = batch.context, video.bitmaps().reshape(2, video.NAMES, -1)
    assert words.shape == (4, 0) and n == 28 * 9 + 2 * 9
    for row in range(4):
        tokens, vectors = batch.tokens[row].numpy(), batch.vectors[row].numpy()
        said = np.flatnonzero(tokens[:n] >= video.MARKER)  # names, in pairs
        assert (np.flatnonzero(kinds[row] == 4) == said).all() and not vectors[said].any()
        assert (tokens[np.delete(np.arange(n), said)] == np.tile(np.arange(9), 28)).all()
        assert (np.flatnonzero(batch.answer[row, :n] == -1) == said[1::2]).all()
        shown = {}
        for at in np.flatnonzero(kinds[row] == 2):
            own = [np.flatnonzero((vectors[at + i] == looks[i]).all(1))[0] for i in (0, 1)]
            shown[video.MARKER + own[0]] = video.GLYPH + own[1]
            assert at < 11 * 9 < said[0]
        assert len(shown) == 8
        pairs = [tuple(pair) for pair in tokens[said].reshape(-1, 2)]
        asked = [tuple(pair) for pair in tokens[n + 1:].reshape(-1, 2)]
        assert len(pairs) == 9 and len(set(asked)) == 4 and set(pairs) == set(asked)
        assert set(asked) <= set(shown.items())


def test_patches_and_sprites():
    """Patches put together again are the frame, and a square's patches are called sprites. Catches:
    rows and columns of patches mixed up."""
    pixels = np.zeros((2, 3, 24, 24), np.float32)
    mask = video.add_sprites(np.random.default_rng(0), pixels)
    assert 25 <= mask[0, 0].sum() <= 50 and (pixels[mask] == 0.9).all()
    assert (mask[:, 0] != mask[:, 2]).any()
    patches = video.in_patches(pixels)
    for frame in range(3):
        for patch in range(9):
            down, across = 8 * (patch // 3), 8 * (patch % 3)
            want = pixels[1, frame, down:down + 8, across:across + 8]
            assert (patches[1, 9 * frame + patch].reshape(8, 8) == want).all()


def test_own_frames(tmp_path):
    """A user's clips become the background, forth and back; what is no clip is refused in a line.
    Catches: colour pictures, floats of another range, a pickle."""
    path = tmp_path / "clips.npy"
    brightness = np.arange(5, dtype=np.uint8)[None, :, None, None] * 50
    np.save(path, np.broadcast_to(brightness, (2, 5, 48, 60)))
    got = video.load_frames(path)
    assert got.shape == (2, 5, 24, 24)
    assert np.allclose(got[0, :, 0, 0], 1.2 * np.arange(5) * 50 / 255 - 0.6)
    frames = video.background(np.random.default_rng(0), 3, 12, got)[0, :, 0, 0]
    steps = np.abs(np.diff(frames)) / (1.2 * 50 / 255)
    assert np.allclose(steps, 1, atol=1e-4)  # neighbours are neighbours, at the turns, too
    for bad in (np.zeros((5, 24)), np.zeros((5, 10, 24)), np.full((5, 24, 24), 7.0),
                np.zeros((5, 24, 24), int), np.full((2, 24, 24), np.nan), np.array([None])):
        np.save(path, bad, allow_pickle=True)
        with pytest.raises(ValueError, match="--frames.*clips.npy") as error:
            video.load_frames(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="none.npy"):
        video.load_frames(tmp_path / "none.npy")


def test_picture_and_kinds():
    """The picture's grey is the clip, a frame stands around each kept patch, and shares are counted
    right. Catches: a damaged PNG, marks at the wrong place."""
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = video.png(pixels)
    start = image.index(b"IDAT") + 4
    size = int.from_bytes(image[start - 8:start - 4], "big")
    rows = np.frombuffer(zlib.decompress(image[start:start + size]), np.uint8).reshape(3, 5)
    assert (rows[:, 1:] == pixels).all() and (rows[:, 0] == 0).all()
    lives, kinds = np.zeros(27, bool), np.zeros(27, int)
    lives[[5, 22]], kinds[22] = True, 3
    drawn = video.picture(np.zeros((27, 64)), lives, kinds, "title")
    # patch 5 of frame 0: column 2, line 1; patch 4 of frame 2: the middle, two frames on
    assert 'x="16.5" y="8.5"' in drawn and 'x="62.5" y="8.5"' in drawn
    assert drawn.count("<rect") == 3 and drawn.count('stroke="#d62728"') == 1
    found = video.kept_by_kind(lives[None, None], kinds[None])
    assert found["glyph"] == (1 / 27, 0.5) and found["background"] == (26 / 27, 0.5)


# --- Worlds --------------------------------------------------------------------------------------

def test_maze_by_hand():
    """The script passes all doors in as many steps as there are cells; a wrong bend loses the step,
    a wrong handle the reward and not the step. Catches: signs of other doors, a door that pays
    twice, rewards after the end."""
    world = worlds.Maze(np.random.default_rng(0), 3, 128)
    for row in range(3):
        for fact in range(8):
            sign, door = world.shown[row, fact], world.asked[row, fact]
            assert sign + 1 < 64 <= door < 128
            mark, word = world.mark[row, fact], world.word[row, fact]
            assert world.pictures[row, sign, 0].nonzero()[0].tolist() == [mark]
            assert world.pictures[row, sign + 1, 1].nonzero()[0].tolist() == [word]
            assert world.pictures[row, door, 0].nonzero()[0].tolist() == [mark]
        assert world.pictures[row].sum() == 24
    actions = []
    for step in range(128):
        actions.append(world.script())
        seen = world.look(np.zeros(3))
        assert (seen[:, 1:33] == world.pictures[np.arange(3), step].reshape(3, 32)).all()
        world.act(actions[-1])
    assert world.passed.all() and (world.at == 128).all()
    assert not world.act(world.script()).any()
    other = worlds.Maze(np.random.default_rng(0), 3, 128)
    assert other.act((actions[0] + 1) % 3).sum() == 0 and (other.at == 0).all()
    for step in range(127):
        action = actions[step].copy()
        action[other.asks() == 2] = 3 + (other.word[:, 2] + 1)[other.asks() == 2] % 16
        other.act(action)
    assert (other.at == 127).all() and not other.passed[:, 2].any()


@pytest.mark.parametrize("kind", [worlds.Maze, worlds.Boat])
def test_marks_that_come_back(kind):
    """Half of the facts are asked for, each once or more, by their own mark; the script knows all
    words and is paid for nearly all. Catches: a question with another fact's mark, a question that
    cannot be answered."""
    world = kind(np.random.default_rng(0), 16, 256, again=True)
    questions = world.fact.shape[1]
    assert questions == 16 and world.passed.shape == (16, 16)
    for row in range(16):
        assert len(set(world.fact[row])) == 4
        for q, fact in enumerate(world.fact[row]):
            pictures = world.pictures[row, world.asked[row, q]:][:kind.wide, 0]
            assert pictures.sum() == kind.wide and pictures[:, world.mark[row, fact]].all()
            assert world.shown[row, fact] + 1 < 128 <= world.asked[row, q]
    assert worlds.earned(world, world.script).sum() >= 0.95 * world.passed.size


def test_boat_by_hand():
    """The boat moves as in a loop over floats, the script earns nearly all, doing nothing nearly
    nothing, and in the fog nothing is seen of x and v. Catches: currents of the wrong sign, rewards
    for drifting, senses that tell what is to be remembered."""
    world = worlds.Boat(np.random.default_rng(0), 32, 128)
    x, v = float(world.x[0]), float(world.v[0])
    for step in range(128):
        fact, action = world.asks()[0], world.script()
        seen = world.look(np.zeros(32))[0, 33:]
        assert seen[0] == (fact >= 0) and (fact < 0 or (seen[1:3] == 0).all())
        assert fact >= 0 or np.allclose(seen[1:3], [x, v], atol=1e-5)
        pushes = 0.2 * float(world.noise[0, step, 7])
        if fact >= 0:
            assert world.asked[0, fact] <= step < world.asked[0, fact] + 4
            pushes = world.currents[world.word[0, fact]]
        v = min(2, max(-2, v + 0.5 * (world.forces[action[0]] + pushes)))
        x = min(3, max(-3, x + 0.5 * v))
        world.act(action)
        assert np.allclose([world.x[0], world.v[0]], [x, v], atol=1e-5)
    assert world.passed.mean() > 0.97
    idle = worlds.Boat(np.random.default_rng(0), 32, 128)
    for step in range(128):
        action = idle.script()
        action[idle.asks() >= 0] = 16  # no force
        idle.act(action)
    assert idle.passed.mean() < 0.1


@pytest.mark.parametrize("kind", [worlds.Maze, worlds.Boat])
def test_episodes(kind):
    """Returns to come are sums over a loop, the answers are the words of the marks shown, and words
    to recall were shown before. Catches: returns of the step before, answers beside their step."""
    batch, words, world = worlds.episodes(kind, np.random.default_rng(1), 8, 128, 64, 0.5, 0.0, 0.5)
    replayed = kind(np.random.default_rng(1), 8, 128)
    actions, n = worlds.asked_actions(world), batch.context
    rewards = np.stack([replayed.act(batch.tokens[:, step + 1].numpy()) for step in range(128)], 1)
    assert 0 < rewards.sum() < 64
    fails = 0
    for row in range(8):
        for step in range(128):
            to_come = sum(rewards[row, step:])
            assert batch.vectors[row, step, 0] * 8 == pytest.approx(to_come)
            if batch.answer[row, step + 1]:
                fact = int(batch.answer[row, step + 1]) - 1
                mark = batch.vectors[row, step, 1:17].numpy()
                assert mark.nonzero()[0].tolist() == [world.mark[row, fact]]
                fails += int(batch.tokens[row, step + 1]) != actions[world.word[row, fact]]
        for step in (words[row] >= 0).nonzero()[:, 0].tolist():
            [fact] = (actions[world.word[row]] == int(words[row, step])).nonzero()[0]
            assert world.shown[row, fact] + 1 <= step < n
    assert (batch.answer > 0).sum() == 8 * 8 * kind.wide and 0 < fails < 32 * kind.wide
    assert (words >= 0).sum() > 50


@pytest.mark.parametrize("kind", [worlds.Maze, worlds.Boat])
def test_roll_out_is_one_without_a_cache(kind):
    """Acting with a cache is acting by a GPT that reads the whole episode anew at each step.
    Catches: vectors of the step before, a cache that loses a step, returns that are not counted
    down."""
    gpt = noisy(vocab_size=kind.actions + 1, n_vector=worlds.N_VECTOR)
    got, total, share = worlds.roll_out(gpt, kind(np.random.default_rng(0), 3, 40), 16)
    world, tokens = kind(np.random.default_rng(0), 3, 40), []
    to_come, action, earned = np.full(3, 2.0), np.full(3, kind.actions), np.zeros(3)
    for step in range(40):
        seen = world.look(to_come)
        tokens.append(np.concatenate([action[:, None], seen], 1, dtype=np.float32))
        logits = gpt(torch.from_numpy(np.stack(tokens, 1)))[:, -1, :kind.actions]
        action = logits.argmax(-1).numpy()
        reward = world.act(action)
        to_come, earned = to_come - reward, earned + reward
        assert (action == got[:, step]).all()
    assert (total == earned).all() and (share == 1).all()


def test_managed_roll_out_is_a_managed_reading():
    """A roll-out leaves the slots that reading the same tokens in blocks leaves. Catches: attention
    of a block that is lost between steps, evictions at other steps."""
    gpt = noisy(vocab_size=20, n_vector=worlds.N_VECTOR)
    caches, new_cache = [], gpt.new_cache
    gpt.new_cache = lambda *own: caches.append(new_cache(*own)) or caches[-1]
    world = worlds.Maze(np.random.default_rng(0), 2, 64)
    tokens, look = [], world.look
    world.look = lambda to_come: tokens.append(look(to_come)) or tokens[-1]
    actions = worlds.roll_out(gpt, world, 16, manager())[0]
    number = np.concatenate([np.full((2, 1), 19), actions[:, :-1]], 1)
    whole = np.concatenate([number[..., None], np.stack(tokens, 1)], 2, dtype=np.float32)
    cache = new_cache(2, True)
    model.read(gpt, torch.from_numpy(whole), cache, 16, manager())
    for own, other in zip(cache, caches[0]):
        assert (own.positions == other.positions)[own.alive].all()
        assert (own.alive == other.alive).all() and own.alive.sum() < 2 * 2 * 32


# --- The command ---------------------------------------------------------------------------------

def test_leads_and_tables():
    """Leads are paired, on the same first prompts; a table's interval is that of a mean over seeds.
    Catches: a lead of the wrong sign, an interval of one seed."""
    ours = {"score": torch.tensor([1.0, 1, 0, 1]), "cache": torch.ones(4)}
    other = {"score": torch.tensor([1.0, 0, 0]), "cache": torch.ones(3)}
    row = transfer.row_of("tova", other, ours, evolve.Config(seed=5))
    assert row["lead"] == pytest.approx(1 / 3) and row["score"] == pytest.approx(1 / 3)
    assert row["lead_se"] == pytest.approx(np.std([0, 1, 0], ddof=1) / 3 ** 0.5)
    seeds = [row | {"lead": lead, "lead_se": 0.3, "target": "maze", "trained": "plain",
                    "length": 8, "slots": 4, "seed": seed} for seed, lead in enumerate((0, 1, 2))]
    text = transfer.tables(seeds)
    assert f"0.333 (+1.000 ± {1.96 * 0.3 / 3 ** 0.5:.3f})" in text and "3 seeds" in text


def small(monkeypatch, no_skill=-1.0):
    """Make every target as small as can be, but SmolLM2, which needs its package."""
    monkeypatch.delitem(transfer.TARGETS, "smollm2")
    for kind in transfer.TARGETS.values():
        monkeypatch.setattr(kind, "steps", 3)
        monkeypatch.setattr(kind, "tokens", 512)
        monkeypatch.setattr(kind, "no_skill", no_skill)
        scarce_at = 2 if kind is transfer.Video else 1
        monkeypatch.setattr(kind, "settings", ((1, 6), (scarce_at, 4)))
        monkeypatch.setattr(kind, "effort", (2, 2))
    monkeypatch.setattr(transfer.Video, "length", 7 * video.PATCHES)
    monkeypatch.setattr(transfer.Episodes, "length", 64)
    monkeypatch.setattr(transfer, "RULES", ("recent", "tova+pool"))
    monkeypatch.setattr(transfer, "COUNT", 8)
    monkeypatch.setattr(evolve, "RANDOM", 2)
    monkeypatch.setattr(transfer, "FEWER", 4)


class Found(transfer.Video):
    """A GPT that nobody trains, as SmolLM2 is one."""
    name, how = "found", ("as_found",)

    def __init__(self, config, parts, n_vocab, frames):
        super().__init__(config, parts, n_vocab, frames)
        self.gpt = model.GPT(model.GPTConfig(**self.sizes)).eval()


def test_smoke(finished, monkeypatch, capsys, tmp_path):
    """All of it, as small as can be, but for control, which is a maze to the command; a second time
    nothing is trained or evolved, to the same rows. Catches: a target that cannot be served, rows
    that depend on chance."""
    small(monkeypatch)
    monkeypatch.delitem(transfer.TARGETS, "control")
    for kind in transfer.TARGETS.values():
        monkeypatch.setattr(kind, "how", ("plain_once",))
    monkeypatch.setitem(transfer.TARGETS, "found", Found)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    np.save(tmp_path / "own.npy", np.random.default_rng(0).random((2, 9, 24, 24)))
    line = [str(run), "--frames", str(tmp_path / "own.npy")]
    transfer.main(line)
    rows = json.loads((run / "transfer.json").read_text())
    named = {(row["target"], row["trained"]) for row in rows}
    assert named == {(name, kind.how[0]) for name, kind in transfer.TARGETS.items()}
    for name, how in named:
        for slots in (6, 4):
            own = [row["method"] for row in rows if row["slots"] == slots
                   and (row["target"], row["trained"]) == (name, how)]
            assert len(own) == len(set(own)) == 3 + 2 + len(transfer.RULES) + 1 + 2
    assert all(0 <= row["score"] <= 1 and 0 < row["cache"] <= 1 for row in rows)
    assert (run / "transfer" / "video-plain_once" / "kept.svg").exists()
    monkeypatch.setattr(model, "train", None)
    monkeypatch.setattr(evolve.CMAES, "tell", None)
    transfer.main([*line, "maze"])
    again = json.loads((run / "transfer.json").read_text())
    key = lambda row: tuple(map(str, (row["target"], row["trained"], row["slots"], row["method"])))
    assert sorted(again, key=key) == sorted(rows, key=key)
    transfer.main([str(run / "transfer.json")])
    assert "### maze, trained plain_once" in capsys.readouterr().out


def refused(line):
    """What a command line is refused by: runs.command and evolve.main print it, exit code 2."""
    with pytest.raises(ValueError) as error:
        if line[0] == "-m":
            transfer.main(line[2:])
        else:
            evolve.prepare(*evolve.parse(line[1:]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals(finished, monkeypatch, tmp_path):
    """What cannot be served ends in one line that says what to do. Catches: tracebacks, work that
    begins before the input is looked at."""
    command = ["-m", "extras.transfer"]
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    (run / "namm.pt").unlink()
    assert "no namm.pt" in refused([*command, str(run)])
    assert "no target; any of" in refused([*command, str(finished), "chess"])
    np.save(tmp_path / "bad.npy", np.zeros((3, 3)))
    assert "--frames" in refused([*command, str(finished), "--frames", str(tmp_path / "bad.npy")])
    shutil.copytree(finished, other)
    state = torch.load(other / "namm.pt", weights_only=True)
    torch.save(state | {"params": state["params"][:26]}, other / "namm.pt")
    assert "26 parameters" in refused([*command, str(other)])
    serve = ["evolve.py", "--device", "cpu", "--out", str(tmp_path / "out"), "--eval",
             str(finished)]
    assert "26 parameters" in refused([*serve, "--vector", str(other)])
    assert "no namm.pt" in refused([*serve, "--vector", str(run)])
    assert "holds no run" in refused([*serve, "--vector", str(tmp_path)])
    assert "--eval TARGET" in refused(["evolve.py", "--device", "cpu", "--vector", str(finished)])
    assert not (tmp_path / "out").exists()
    small(monkeypatch, no_skill=1.0)
    with pytest.raises(ValueError, match="has not learned its task.*delete the folder"):
        transfer.main([str(finished), "maze"])


def test_eval_with_the_vector_of_another_run(finished, tmp_path):
    """`--eval TARGET --vector RUN` serves the GPT of TARGET, which needs no vector of its own, with
    the parameters and statistics of RUN. Catches: the target's own statistics, or vector."""
    target, run = tmp_path / "target", tmp_path / "run"
    shutil.copytree(finished, target)
    shutil.copytree(finished, run)
    (target / "namm.pt").unlink()
    state = torch.load(run / "namm.pt", weights_only=True)
    state["params"], state["std"] = state["params"] + 1, state["std"] + 1
    torch.save(state, run / "namm.pt")
    config, task = evolve.parse(["--eval", str(target), "--vector", str(run), "--device", "cpu",
                                  "--out", str(tmp_path / "out")])
    found = evolve.prepare(config, task)[2]
    assert torch.equal(found["namm"].params, state["params"])
    assert torch.equal(found["namm"].std, state["std"])
    assert found["gpt"].config.n_layer == config.n_layer
