"""Two worlds in which something has to be remembered, a decision transformer, and its roll-outs.

  Maze    a corridor of bends; signs along the way say which handle opens the door with a mark
  Boat    control of a boat in a channel, by its place x and speed v; buoys say what current blows
          later, in a fog with a mark. In the fog nothing is seen of x and v

A step is one token: its number is the action before, its vector the return still to come and what
is seen. The next token's number, the action, is read from it. Facts are shown in the first half of
an episode, in two steps: a mark, then its word, a picture of 16 pixels each. In the second half the
mark is shown again, and only the word's own action earns the reward. Letters: N episodes, L steps,
R facts in each, Q questions, W pixels.
"""

import numpy as np
import torch

from data import Batch, by_zipf
from model import kept, read

W = 16  # pixels of a mark, or of a word; as many of either
SENSES = 8  # numbers that are seen beside them
N_VECTOR = 1 + 2 * W + SENSES  # return to come, mark, word, senses
MOST = 8  # facts in an episode


class World:
    """N episodes of L steps, side by side. All chance is drawn at the start, so that two runs of
    the same actions are equal. A subclass says what is sensed, done, and what earns a reward."""
    actions, free = 0, 0  # how many there are; of them those for steps that ask for nothing
    wide = 1  # steps that a mark asks for
    spare = 0.0  # share of the second half in which nothing is asked, at the end

    def __init__(self, rng, count, steps, again=False):
        """Scatter the facts: shown (N,R) and asked (N,Q), steps; mark and word (N,R), numbers; fact
        (N,Q), which is asked. Each is asked once; or, `again`, half of them: each once, then some
        often, some rarely, by Zipf's law."""
        facts, half = min(MOST, steps // 16), steps // 2
        draw = lambda n, k: np.argsort(rng.random((count, n)), axis=1)[:, :k]  # k of n, (N,k)
        self.steps, self.rows = steps, np.arange(count)
        self.shown = 2 * draw(half // 2, facts)
        # a cell holds an asking mark, and as many steps before or after it
        cells = int(half * (1 - self.spare)) // (2 * self.wide)
        questions = min(cells, 2 * facts) if again else facts
        last = np.full((count, 1), cells - 1)  # the last cell always asks
        cell = np.concatenate([draw(cells - 1, questions - 1), last], axis=1)
        self.asked = half + self.wide * (2 * cell + rng.integers(2, size=cell.shape))
        self.mark, self.word = draw(W, facts), draw(W, facts)
        self.fact = np.tile(np.arange(questions), (count, 1))
        if again:
            often = (facts + 1) // 2
            self.fact[:, often:] = by_zipf(rng, often, (count, questions - often))
            self.fact = rng.permuted(self.fact, axis=1)
        self.pictures = np.zeros((count, steps, 2, W), np.float32)  # of marks, of words
        # which question a place asks, and which fact's word it shows, -1 for none
        self.question, self.told = np.full((2, count, steps), -1)
        own = self.rows
        for fact in range(facts):
            at = self.shown[:, fact]
            self.pictures[own, at, 0, self.mark[:, fact]] = 1
            self.pictures[own, at + 1, 1, self.word[:, fact]] = 1
            self.told[own, at + 1] = fact
        for q in range(questions):
            mark = self.mark[own, self.fact[:, q]]
            for at in range(self.wide):
                self.pictures[own, self.asked[:, q] + at, 0, mark] = 1
                self.question[own, self.asked[:, q] + at] = q
        self.noise = rng.standard_normal((count, steps, SENSES)).astype(np.float32)
        self.at = np.zeros(count, int)  # the step of each episode, or its place
        self.passed = np.zeros((count, questions), bool)  # what earned a reward

    def repeated(self, times, count=None):
        """The first `count` episodes `times` times, one below the other."""
        for name, own in vars(self).items():
            if isinstance(own, np.ndarray):
                setattr(self, name, np.concatenate([own[:count]] * times))
        self.rows = np.arange(len(self.at))
        return self

    def look(self, to_come):
        """The vector of a step, (N,N_VECTOR), for returns to_come (N,)."""
        place = self.at.clip(max=self.steps - 1)
        pictures = self.pictures[self.rows, place].reshape(-1, 2 * W)
        to_come = to_come[:, None] / MOST
        return np.concatenate([to_come, pictures, self.senses(place)], axis=1, dtype=np.float32)

    def asks(self):
        """The question that each episode's step asks, (N,), -1 for none."""
        return self.question[self.rows, self.at.clip(max=self.steps - 1)]

    def answer(self, question):
        """The word that answers a question (N,), (N,)."""
        return self.word[self.rows, self.fact[self.rows, question]]


class Maze(World):
    """A corridor of L cells. At a straight cell or a bend the right action leads on, another one
    loses the step. A door lets through whoever comes; it pays for the handle of its sign."""
    name, actions, free = "maze", 3 + W, 3  # on, left, right; handles
    spare = 0.125  # who has lost some steps still comes to the last door

    def __init__(self, rng, count, steps, again=False):
        super().__init__(rng, count, steps, again)
        self.bend = rng.choice(3, (count, steps), p=(0.6, 0.2, 0.2))  # (N,L)

    def senses(self, place):
        """Where it is open, at a door nowhere, and walls of noise, (N,SENSES)."""
        seen = 0.3 * self.noise[self.rows, place]
        seen[:, :3] = np.eye(3)[self.bend[self.rows, place]] * (self.asks() < 0)[:, None]
        return seen

    def script(self):
        """The best actions, (N,)."""
        place, question = self.at.clip(max=self.steps - 1), self.asks()
        return np.where(question < 0, self.bend[self.rows, place], 3 + self.answer(question))

    def act(self, action):
        """Act (N,). Returns the reward, (N,)."""
        question, right = self.asks(), action == self.script()
        reward = (question >= 0) & right & (self.at < self.steps)
        self.passed[self.rows[reward], question[reward]] = True
        self.at += right | (question >= 0)
        return reward.astype(float)


class Boat(World):
    """A boat at x with speed v, in a channel |x| <= 1, driven by a force in [-2, 2] in 33 steps,
    and by gusts. A fog with a mark lasts four steps; the current in it is what its buoy said, and
    no gust blows. Who leaves the fog in the channel is paid."""
    name, actions, free, wide = "control", 33, 33, 4
    forces = np.linspace(-2, 2, 33)
    currents = np.concatenate([np.linspace(-2, -0.5, W // 2), np.linspace(0.5, 2, W // 2)])

    def __init__(self, rng, count, steps, again=False):
        super().__init__(rng, count, steps, again)
        self.x, self.v = 0.2 * rng.standard_normal((2, count))

    def senses(self, place):
        """x and v, or fog; and noise, (N,SENSES)."""
        seen, fog = 0.3 * self.noise[self.rows, place], self.asks() >= 0
        seen[:, 0], seen[:, 1], seen[:, 2] = fog, self.x * ~fog, self.v * ~fog
        return seen

    def script(self):
        """The best actions, (N,): in the fog against the current, else back to the middle."""
        question = self.asks()
        against = -self.currents[self.answer(question)]
        force = np.where(question < 0, -0.8 * self.x - 1.2 * self.v, against)
        return np.abs(force[:, None] - self.forces).argmin(1)

    def act(self, action):
        """Half a second under the force of action (N,). Returns the reward, (N,)."""
        question = self.asks()
        gust = 0.2 * self.noise[self.rows, self.at, SENSES - 1]
        blows = np.where(question < 0, gust, self.currents[self.answer(question)])
        self.v = np.clip(self.v + 0.5 * (self.forces[action] + blows), -2, 2)
        self.x = np.clip(self.x + 0.5 * self.v, -3, 3)
        self.at += 1
        leaves = (question >= 0) & (self.at == self.asked[self.rows, question] + self.wide)
        reward = leaves & (np.abs(self.x) <= 1)
        self.passed[self.rows[reward], question[reward]] = True
        return reward.astype(float)


# --- Episodes to learn from ----------------------------------------------------------------------

def scripted(world, rng, skill, slips):
    """What the script does: tokens (N,L+1), vectors (N,L+1,N_VECTOR), the question that is asked
    and the fact that is told at each step, (N,L), -1 for none. In an episode of skill (N,) below 1
    an asked action is, as often, any that can be asked for: returns differ. A share `slips` of the
    others is any, too."""
    count, steps = len(world.at), world.steps
    tokens = np.full((count, steps + 1), world.actions)  # the first action has none before it
    vectors = np.zeros((count, steps + 1, N_VECTOR), np.float32)
    rewards, (asked, told) = np.zeros((count, steps)), np.full((2, count, steps), -1)
    for step in range(steps):
        vectors[:, step], action = world.look(np.zeros(count)), world.script()
        asked[:, step], place = world.asks(), world.at.clip(max=steps - 1)
        told[:, step] = world.told[world.rows, place]
        any_asked = asked_actions(world)[rng.integers(W, size=count)]
        any_free = rng.integers(world.free, size=count)
        fails = rng.random(count) >= np.where(asked[:, step] >= 0, skill, 1 - slips)
        other = np.where(asked[:, step] >= 0, any_asked, any_free)
        tokens[:, step + 1] = np.where(fails, other, action)
        rewards[:, step] = world.act(tokens[:, step + 1])
    to_come = rewards[:, ::-1].cumsum(1)[:, ::-1]  # (N,L)
    vectors[:, :-1, 0] = to_come / MOST
    return tokens, vectors, asked, told


def asked_actions(world):
    """The action of each word, (W,)."""
    if world.name == "maze":
        return 3 + np.arange(W)
    return np.abs(-world.currents[:, None] - world.forces).argmin(1)


def episodes(kind, rng, count, steps, context, skilled=1.0, slips=0.0, share=0.0, again=False):
    """(Batch, words to recall (N,L), the world) of scripted episodes, a share `skilled` of them
    without a mistake where asked. The answers are the asked actions. Words to recall: at a `share`
    of the places of the context that show no mark, that of the newest fact, or of any shown by
    then: what was shown at the end of a block must draw attention at once. again: see World."""
    world, actions = kind(rng, count, steps, again), asked_actions(kind)
    skill = np.where(rng.random(count) < skilled, 1.0, 0.5)
    tokens, vectors, asked, told = scripted(world, rng, skill, slips)
    answer, words = np.zeros_like(tokens), np.full((count, steps), -1)
    answer[:, 1:] = 1 + asked
    for row in range(count):
        shows = vectors[row, :context, 1:1 + W].any(1)
        for at in np.flatnonzero(~shows & (rng.random(context) < share)):
            said = told[row, :at + 1]
            said = said[said >= 0]
            if len(said):
                fact = said[-1] if rng.random() < 0.25 else rng.choice(said)
                words[row, at] = actions[world.word[row, fact]]
    batch = Batch(torch.from_numpy(tokens), torch.from_numpy(answer), context, [kind.name] * count,
                  torch.from_numpy(vectors))
    return batch, torch.from_numpy(words), world


def earned(world, policy):
    """Rewards of a policy, policy() -> actions (N,), summed, (N,)."""
    return sum(world.act(policy()) for _ in range(world.steps))


# --- Roll-outs -----------------------------------------------------------------------------------

@torch.no_grad()
def roll_out(gpt, world, delay, manage=None, renumber=True):
    """Act in a world by a GPT, whose cache is managed while it acts. Returns the actions (N,L), the
    rewards summed (N,), and the share of the steps that is in the cache at the end (N,)."""
    count, questions = world.passed.shape
    cache, begun, actions = gpt.new_cache(count, renumber), None, []
    to_come, action = np.full(count, float(questions)), np.full(count, world.actions)
    for _ in range(world.steps):
        seen = np.concatenate([action[:, None], world.look(to_come)], axis=1, dtype=np.float32)
        token = torch.from_numpy(seen)[:, None].to(gpt.tok_embeddings.weight.device)  # (N,1,1+V)
        hidden, begun = read(gpt, token, cache, delay, manage, begun)
        logits = gpt.output(hidden[:, -1])[:, :world.actions]
        action = logits.argmax(-1).cpu().numpy()
        to_come -= world.act(action)
        actions.append(action)
    return np.stack(actions, 1), world.passed.sum(1).astype(float), kept(cache)
