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

from helpers.crash import WORLD, Attempt, Hung, Run
from helpers.ranks import FORKED

GRACE = 0.3  # seconds, at most, from the end of one rank until a launcher kills the others
MOST_WRONG = 3  # more of it teaches nothing
# What a kill follows and whom it hits, in this order and with this frequency.
MOMENTS = ("saving",) * 5 + ("step",) * 3 + ("loading",) * 2
VICTIMS = ([0], [1], [0, 1], [1, 0])


class Kill(NamedTuple):
    """A kill to come: after which event, and of whom."""

    moment: str
    victims: list[int]


def plan(kills: int, seed: int) -> list[Kill]:
    """So many kills in random order. All moments and all victims come before any comes again."""
    draws = random.Random(seed)

    def deal(cards: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from draws.sample(cards, len(cards))

    pairs = zip(deal(MOMENTS), deal(VICTIMS), strict=False)
    return [Kill(moment, victims) for moment, victims in itertools.islice(pairs, kills)]


@dataclass
class KillResult:
    """One kill.

    Attributes:
        moment: the event that it followed.
        victims: ranks, in the order in which they were hit. What is left of the others ends a moment later.
        saving: the step whose ``save_checkpoint`` a victim was in, None if in none.
        unfinished: what this attempt was saving is in the folder, unfinished.
        resumed: the step that the next attempt began with.
    """

    moment: str
    victims: list[int]
    saving: int | None = None
    unfinished: bool = False
    resumed: int | None = None


@dataclass
class Campaign:
    """The results of the kills of a run.

    Attributes:
        results: those after which a later attempt has been judged.
        wrong: what was not as in the run that was left alone, and after which kill.
        finished: how often the run came to its end.
        seconds: duration.
    """

    results: list[KillResult] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    finished: int = 0
    seconds: float = 0.0


class _Killer:
    """Draws moments of a kill: a random time after an event, within the time that the announced work was seen to take."""

    def __init__(self, kills: list[Kill], seed: int):
        self.left = list(kills)
        self.draws = random.Random(seed)
        self._spans = {what: [0.02] for what in MOMENTS}

    def learn(self, attempt: Attempt) -> None:
        """How long it takes until the next event; for a save in the background, until the next save."""
        for events in attempt.seen:
            for index, event in enumerate(events):
                until_save = event.what == "saving" and attempt.run.background
                later = (other for other in events[index + 1 :] if other.what == "saving" or not until_save)
                if event.what in self._spans and (other := next(later, None)) is not None:
                    self._spans[event.what].append(other.time - event.time)

    def kill(self, attempt: Attempt) -> KillResult | None:
        """Let it live until its moment has come, then kill it; None if it ended before, and the kill is still to come."""
        what, victims = self.left[0]
        left = {"loading": 1, "saving": self.draws.choice([1, 1, 2]), "step": self.draws.randint(1, 5)}[what]
        witness = self.draws.randrange(WORLD)
        for rank, event in attempt.events():
            left -= rank == witness and event.what == what
            if left == 0:
                share = self.draws.uniform(0.0, 1.1) ** self.draws.choice([1, 2])  # most goes to disk early in a span
                delay = share * statistics.median(self._spans[what])
                time.sleep(max(0.0, event.time + delay - time.monotonic()))
                break
        if set(victims) - set(attempt.alive):
            return None
        del self.left[0]
        attempt.kill(victims)
        if len(victims) < WORLD:
            time.sleep(self.draws.uniform(0.0, GRACE))
        attempt.stop()
        last = [attempt.seen[rank][-1] for rank in victims if attempt.seen[rank]]
        saving = next((event.step for event in last if event.what == "saving"), None)
        began = any(event.what == "saving" for events in attempt.seen for event in events)
        unfinished = began and any(name.startswith(".saving.") for name in attempt.run.leftovers())
        return KillResult(what, victims, saving, unfinished)


class _Job:
    """Attempts that follow each other in one folder, until the run is at its end or something is wrong."""

    def __init__(self, run: Run, reference: Attempt, report: Campaign):
        self.run, self._report = run, report
        self._right = [{(event.what, event.step): event.value for event in events} for events in reference.seen]
        self._safe = 0  # the step that must not be lost any more
        self._unjudged: list[KillResult] = []
        self._attempts = 0

    def attempt(self, killer: _Killer | None) -> bool:
        """One attempt, to its end without a killer; whether another one has to follow."""
        assert self.run.folder is not None
        self._attempts += 1
        published = self.run.published()
        attempt = Attempt(self.run, self.run.folder.with_name(f"{self.run.folder.name}.attempt{self._attempts}"))
        result, wrong = None, []
        try:
            result = killer.kill(attempt) if killer is not None else None
            if result is None:
                attempt.wait()
        except Hung:
            wrong = [f"hung after {[events[-1:] for events in attempt.seen]}"]
        finally:
            attempt.stop()
        wrong += self._faults(attempt, published) + ([] if result is not None else self._faults_of_end(attempt))
        self._report_attempt(wrong, attempt, published)
        if result is not None:
            self._unjudged.append(result)
            assert killer is not None
            killer.learn(attempt)
        return result is not None and not wrong

    def _faults(self, attempt: Attempt, published: int) -> list[str]:
        """Where an attempt is not what it would be, had nobody been killed before."""
        found = [f"latest names step {published}, but {self._safe} had been saved"] if published < self._safe else []
        for rank, events in enumerate(attempt.seen):
            if (resumed_at := attempt.resumed_at(rank)) not in (None, published):
                found.append(f"rank {rank} resumed at step {resumed_at}, but {published} was published")
            strange = [
                w for w in events if w.what in ("state", "step") and w.value != self._right[rank][w.what, w.step]
            ]
            if strange:
                found.append(f"rank {rank} is another at {strange[0].what} {strange[0].step}, resumed at {resumed_at}")
        return found

    def _faults_of_end(self, attempt: Attempt) -> list[str]:
        """What is wrong with an attempt that nobody ended."""
        found = attempt.failures
        found += [f"rank {rank} did not begin" for rank in range(WORLD) if attempt.resumed_at(rank) is None]
        return found + ([f"left behind {leftovers}"] if (leftovers := self.run.leftovers()) else [])

    def _report_attempt(self, wrong: list[str], attempt: Attempt, published: int) -> None:
        self._report.wrong += [f"attempt {self._attempts} after {self._unjudged[-1:]}: {text}" for text in wrong]
        if attempt.resumed_at(0) is not None or wrong:
            for result in self._unjudged:
                result.resumed = published
            self._report.results += self._unjudged
            self._unjudged = []
        for events in attempt.seen:
            saved = [event.step for event in events if event.what == "saved"]
            # What is saved in the background is there when the next one could begin.
            self._safe = max([self._safe, *(saved[:-1] if self.run.background else saved)])


def _campaign(run: Run, kills: list[Kill], seed: int) -> Campaign:
    import helpers.preloaded  # noqa: F401  # ranks are forked from here

    assert run.folder is not None
    began, report, killer = time.monotonic(), Campaign(), _Killer(kills, seed)
    run.folder.mkdir()
    alone = Attempt(replace(run, folder=None), run.folder / "alone")
    alone.wait()
    alone.stop()
    assert not alone.failures, alone.failures
    while killer.left and len(report.wrong) < MOST_WRONG:
        job = _Job(replace(run, folder=run.folder / f"job{report.finished}"), alone, report)
        while job.attempt(killer if killer.left else None):
            pass
        report.finished += 1
    report.seconds = time.monotonic() - began
    return report


@contextmanager
def campaigns() -> Iterator[Callable[[Run, list[Kill], int], Campaign]]:
    """``campaign(run, kills, seed)``: kill ``run`` by each of them; each time it ends, it begins in a new folder."""
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        yield lambda run, kills, seed: pool.submit(_campaign, run, kills, seed).result()
