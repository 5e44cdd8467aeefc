"""The built-in task: two-step arithmetic word problems with worked answers, generated, so no download is needed.

Each problem is a row with `instruction` (the story), `output` (the worked answer, ending in "The answer is X.") and
`answer` (X as text). Train and test tell different stories about the same five kinds of arithmetic: no template occurs
in both, so the test measures more than recall. The same split, size and seed give the same rows on every machine.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import NamedTuple

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Kate Leo Maya Omar".split()  # noqa: SIM905
ITEMS = "apples books cards coins cookies marbles pencils shells stamps stickers".split()  # noqa: SIM905
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Kind(NamedTuple):
    """One kind of arithmetic: `x = a first b`, then `answer = x second c`.

    `a` and `b` are the ranges that these numbers are drawn from; `c` gives the range of the third from the first two.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    c: Callable[[int, int], tuple[int, int]]
    first: str
    second: str


KINDS = {
    "add_subtract": Kind((11, 60), (4, 39), lambda a, b: (3, a + b - 2), "+", "-"),
    "add_add": Kind((11, 60), (4, 39), lambda a, b: (4, 39), "+", "+"),
    "subtract_subtract": Kind((50, 99), (4, 29), lambda a, b: (4, a - b - 2), "-", "-"),
    "multiply_add": Kind((3, 9), (3, 9), lambda a, b: (3, 29), "*", "+"),
    "multiply_subtract": Kind((3, 9), (3, 9), lambda a, b: (2, a * b - 2), "*", "-"),
}

# Every template asks for a single number; {a}, {b}, {c} occur once each and in the order of the calculation.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "add_subtract": (
            (
                "{name} has {a} {item}. A friend gives {name} {b} more, and then {name} loses {c}. "
                "How many {item} does {name} have now?"
            ),
            "A box holds {a} {item}. {name} puts in {b} {item} and takes out {c}. How many {item} are in the box?",
            (
                "{name} collected {a} {item} in the morning and {b} in the afternoon. {name} then gave away {c}. "
                "How many {item} were left?"
            ),
            "There were {a} people on a bus. Then {b} got on and {c} got off. How many people are on the bus?",
        ),
        "add_add": (
            "{name} has {a} {item}, {friend} has {b} and their friend has {c}. How many {item} do they have together?",
            "{name} bought {a} {item} on Monday, {b} on Tuesday and {c} on Friday. How many {item} is that in total?",
            "A shelf has {a} {item} at the top, {b} in the middle and {c} at the bottom. How many {item} is that?",
            "{name} read {a} pages, then {b} pages and then {c} pages. How many pages did {name} read?",
        ),
        "subtract_subtract": (
            "{name} had {a} {item}. {name} sold {b} to a neighbour and {c} to a cousin. How many {item} remain?",
            "A jar had {a} {item}. {name} took {b} and {friend} took {c}. How many {item} are still in the jar?",
            "A rope was {a} metres long. {name} cut off {b} metres and later {c} metres. How many metres are left?",
            "{name} saved {a} dollars, spent {b} on a game and {c} on lunch. How many dollars does {name} have left?",
        ),
        "multiply_add": (
            "{name} has {a} bags with {b} {item} in each, and {c} loose ones. How many {item} does {name} have?",
            "There are {a} rows of {b} chairs in a hall. {name} brings {c} more. How many chairs are there now?",
            "{name} works {a} hours for {b} dollars an hour and gets a tip of {c} dollars. How many dollars is that?",
            "A baker fills {a} trays with {b} rolls each and bakes {c} rolls more. How many rolls did the baker make?",
        ),
        "multiply_subtract": (
            "{name} buys {a} packs of {b} {item} and gives {c} of them to {friend}. How many {item} does {name} keep?",
            "A farmer has {a} crates with {b} pears each. {c} pears are bad. How many pears are good?",
            "{name} plants {a} lines of {b} flowers. Rabbits eat {c} of them. How many flowers are left?",
            "There are {a} tables with {b} plates on each. {name} clears {c} plates. How many plates are still there?",
        ),
    },
    "test": {
        "add_subtract": (
            "A library had {a} books on loan. Visitors borrowed {b} more and returned {c}. How many are on loan now?",
            (
                "{name} scored {a} points in round one and {b} in round two, but a penalty cost {c} points. "
                "What is the final score of {name}?"
            ),
        ),
        "add_add": (
            (
                "On a walk {name} saw {a} birds, {friend} counted {b} others and their guide spotted {c}. "
                "How many birds did the group see?"
            ),
            "A school has {a} pupils in year one, {b} in the second and {c} in the third. How many pupils is that?",
        ),
        "subtract_subtract": (
            (
                "A tank contained {a} litres of water. {b} litres leaked out and {name} used {c} litres. "
                "How many litres does the tank contain now?"
            ),
            "Of {a} tickets, {b} were sold on Friday and {c} on Saturday. How many tickets were not sold?",
        ),
        "multiply_add": (
            "{name} runs {a} laps of {b} minutes each and then stretches for {c} minutes. How many minutes is that?",
            "Each of {a} teams has {b} players, and {c} referees join them. How many people are on the field?",
        ),
        "multiply_subtract": (
            "A shop received {a} cartons with {b} lamps each, of which {c} were broken. How many lamps can it sell?",
            "{name} cut {a} cakes into {b} slices each. The guests ate {c} slices. How many slices remain?",
        ),
    },
}


def _problem(kind: Kind, template: str, rng: random.Random) -> dict[str, str]:
    """One row: a story with its numbers filled in, the two worked steps and the answer."""
    a, b = rng.randint(*kind.a), rng.randint(*kind.b)
    c = rng.randint(*kind.c(a, b))
    name, friend = rng.sample(NAMES, 2)
    between = OPERATORS[kind.first](a, b)
    answer = OPERATORS[kind.second](between, c)
    steps = f"First, {a} {kind.first} {b} = {between}. Then, {between} {kind.second} {c} = {answer}."
    return {
        "instruction": template.format(name=name, friend=friend, item=rng.choice(ITEMS), a=a, b=b, c=c),
        "output": f"{steps} The answer is {answer}.",
        "answer": str(answer),
    }


def generate(split: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """`num_rows` different problems of one split, kinds in equal shares and shuffled.

    Args:
        split: "train" or "test"; they share no template.
        num_rows: at least 1.
        seed: the same seed gives the same rows.

    Raises:
        ValueError: for an unknown split or `num_rows` below 1.
    """
    if split not in TEMPLATES:
        raise ValueError(f"unknown split {split!r} of the built-in arithmetic task: choose one of {sorted(TEMPLATES)}")
    if num_rows < 1:
        raise ValueError(f"the built-in arithmetic task needs at least 1 row per split, got {num_rows}")
    rng = random.Random(f"{split}-{seed}")
    groups = [[(kind, template) for template in templates] for kind, templates in TEMPLATES[split].items()]
    pairs = [pair for one_of_each_kind in zip(*groups, strict=True) for pair in one_of_each_kind]
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num_rows:
        kind, template = pairs[len(rows) % len(pairs)]
        row = _problem(KINDS[kind], template, rng)
        rows.setdefault(row["instruction"], row)
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return ordered
