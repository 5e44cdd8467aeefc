# SPDX-License-Identifier: Apache-2.0
"""Runs killed at random moments, started again, and compared with one that was left alone."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from helpers.crash import WORLD, Hung, Life, Run
from helpers.ranks import FORKED

GRACE = 0.3  # seconds, at most, from the death of one rank until a launcher kills the others
MOST_WRONG = 3  # more of it teaches nothing
# What a kill follows and whom it hits, in this order and with this frequency.
MOMENTS = ("saving",) * 5 + ("step",) * 3 + ("loading",) * 2
VICTIMS = ([0], [1], [0, 1], [1, 0])


class Blow(NamedTuple):
    """A kill to come: after which word, and of whom."""

    moment: str
    victims: list[int]


def plan(kills: int, seed: int) -> list[Blow]:
    """So many blows in random order. All moments and all victims come before any comes again."""
    draws = random.Random(seed)

    def deal(cards: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from draws.sample(cards, len(cards))

    pairs = zip(deal(MOMENTS), deal(VICTIMS), strict=False)
    return [Blow(moment, victims) for moment, victims in itertools.islice(pairs, kills)]


@dataclass
class Death:
    """One kill.

    Attributes:
        moment: the word that it followed.
        victims: ranks, in the order in which they were hit. What is left of the others dies a moment later.
        saving: the step whose ``save_checkpoint`` a victim was in, None if in none.
        underway: what this life was saving is in the folder, unfinished.
        resumed: the step that the next life began with.
    """

    moment: str
    victims: list[int]
    saving: int | None = None
    underway: bool = False
    resumed: int | None = None


@dataclass
class Campaign:
    """What came of the kills of a run.

    Attributes:
        deaths: those after which a later life has been judged.
        wrong: what was not as in the run that was left alone, and after which death.
        finished: how often the run came to its end.
        seconds: that all of it took.
    """

    deaths: list[Death] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    finished: int = 0
    seconds: float = 0.0


class _Killer:
    """Draws moments of death: a random time after a word, within the time that the announced work was seen to take."""

    def __init__(self, blows: list[Blow], seed: int):
        self.left = list(blows)
        self.draws = random.Random(seed)
        self._spans = {what: [0.02] for what in MOMENTS}

    def learn(self, life: Life) -> None:
        """How long it takes until the next word; for a save in the background, until the next save."""
        for words in life.said:
            for index, word in enumerate(words):
                until_save = word.what == "saving" and life.run.background
                later = (other for other in words[index + 1 :] if other.what == "saving" or not until_save)
                if word.what in self._spans and (other := next(later, None)) is not None:
                    self._spans[word.what].append(other.time - word.time)

    def strike(self, life: Life) -> Death | None:
        """Let it live until its moment has come, then kill it; None if it ended before, and the blow is still to come."""
        what, victims = self.left[0]
        left = {"loading": 1, "saving": self.draws.choice([1, 1, 2]), "step": self.draws.randint(1, 5)}[what]
        witness = self.draws.randrange(WORLD)
        for rank, word in life.words():
            left -= rank == witness and word.what == what
            if left == 0:
                share = self.draws.uniform(0.0, 1.1) ** self.draws.choice([1, 2])  # most goes to disk early in a span
                delay = share * statistics.median(self._spans[what])
                time.sleep(max(0.0, word.time + delay - time.monotonic()))
                break
        if set(victims) - set(life.alive):
            return None
        del self.left[0]
        life.kill(victims)
        if len(victims) < WORLD:
            time.sleep(self.draws.uniform(0.0, GRACE))
        life.bury()
        last = [life.said[rank][-1] for rank in victims if life.said[rank]]
        saving = next((word.step for word in last if word.what == "saving"), None)
        began = any(word.what == "saving" for words in life.said for word in words)
        underway = began and any(name.startswith(".saving.") for name in life.run.litter())
        return Death(what, victims, saving, underway)


class _Chain:
    """Lives that follow each other in one folder, until the run is at its end or something is wrong."""

    def __init__(self, run: Run, reference: Life, report: Campaign):
        self.run, self._report = run, report
        self._right = [{(word.what, word.step): word.value for word in words} for words in reference.said]
        self._safe = 0  # the step that must not be lost any more
        self._unjudged: list[Death] = []
        self._lives = 0

    def live(self, killer: _Killer | None) -> bool:
        """One life, to its end without a killer; whether another one has to follow."""
        assert self.run.folder is not None
        self._lives += 1
        published = self.run.published()
        life = Life(self.run, self.run.folder.with_name(f"{self.run.folder.name}.life{self._lives}"))
        death, wrong = None, []
        try:
            death = killer.strike(life) if killer is not None else None
            if death is None:
                life.run_out()
        except Hung:
            wrong = [f"hung after {[words[-1:] for words in life.said]}"]
        finally:
            life.bury()
        wrong += self._faults(life, published) + ([] if death is not None else self._faults_of_end(life))
        self._report_life(wrong, life, published)
        if death is not None:
            self._unjudged.append(death)
            assert killer is not None
            killer.learn(life)
        return death is not None and not wrong

    def _faults(self, life: Life, published: int) -> list[str]:
        """Where a life is not what it would be, had nobody been killed before."""
        found = [f"latest names step {published}, but {self._safe} had been saved"] if published < self._safe else []
        for rank, words in enumerate(life.said):
            if (begun := life.begun(rank)) not in (None, published):
                found.append(f"rank {rank} resumed at step {begun}, but {published} was published")
            strange = [
                w for w in words if w.what in ("state", "step") and w.value != self._right[rank][w.what, w.step]
            ]
            if strange:
                found.append(f"rank {rank} is another at {strange[0].what} {strange[0].step}, resumed at {begun}")
        return found

    def _faults_of_end(self, life: Life) -> list[str]:
        """What is wrong with a life that nobody ended."""
        found = life.failures
        found += [f"rank {rank} did not begin" for rank in range(WORLD) if life.begun(rank) is None]
        return found + ([f"left behind {litter}"] if (litter := self.run.litter()) else [])

    def _report_life(self, wrong: list[str], life: Life, published: int) -> None:
        self._report.wrong += [f"life {self._lives} after {self._unjudged[-1:]}: {text}" for text in wrong]
        if life.begun(0) is not None or wrong:
            for death in self._unjudged:
                death.resumed = published
            self._report.deaths += self._unjudged
            self._unjudged = []
        for words in life.said:
            saved = [word.step for word in words if word.what == "saved"]
            # What is saved in the background is there when the next one could begin.
            self._safe = max([self._safe, *(saved[:-1] if self.run.background else saved)])


def _campaign(run: Run, blows: list[Blow], seed: int) -> Campaign:
    import helpers.preloaded  # noqa: F401  # ranks are forked from here

    assert run.folder is not None
    began, report, killer = time.monotonic(), Campaign(), _Killer(blows, seed)
    run.folder.mkdir()
    alone = Life(replace(run, folder=None), run.folder / "alone")
    alone.run_out()
    alone.bury()
    assert not alone.failures, alone.failures
    while killer.left and len(report.wrong) < MOST_WRONG:
        chain = _Chain(replace(run, folder=run.folder / f"chain{report.finished}"), alone, report)
        while chain.live(killer if killer.left else None):
            pass
        report.finished += 1
    report.seconds = time.monotonic() - began
    return report


@contextmanager
def nursery() -> Iterator[Callable[[Run, list[Blow], int], Campaign]]:
    """``campaign(run, blows, seed)``: kill ``run`` by each of them; each time it ends, it begins in a new folder."""
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        yield lambda run, blows, seed: pool.submit(_campaign, run, blows, seed).result()
