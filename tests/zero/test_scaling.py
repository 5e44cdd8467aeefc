# SPDX-License-Identifier: Apache-2.0
"""Traffic as ranks grow in number: one formula, held to every collective of whole steps at 1, 2, 4 and 8 ranks.

Collectives are counted where torch dispatches them, so whatever else would cross ranks (an object gathered in Python,
a barrier) is seen too. In the formula the number of ranks changes padding alone; one rank sends no weights.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.models import VOCAB, ds_config, engine_of, grass_block, tiny_llama, train
from helpers.ranks import RankPool
from helpers.small import ALIGNMENT, HIDDEN, LAYER, WORLD, part
from helpers.tiered import tiered
from helpers.traffic import Collectives
from helpers.zero3 import BARE

Call = tuple[str, int]  # operator, bytes of its largest tensor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "communication.md"
BF16 = 2
FINGERPRINT = 2 * 6 * 8  # bytes: six int64 and their negatives
GAMMA, PROBE_STEPS, SAMPLE_PERIOD, REFRESH_PERIOD = 2, 2, 2, 3
DRAWS = (1, 3)  # steps that end with a draw: the last of probing, and the second of training
REFRESHES = 4  # the step that ends with a refresh of the scores: the third of training


# ---- the formula ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """Elements of an untied Llama's parameters; those of a block in the order in which forward meets them."""

    embed: int
    block: tuple[int, ...]
    norm: int
    layers: int

    @property
    def numel(self) -> int:
        return 2 * self.embed + self.norm + self.layers * sum(self.block)


def tiny(layers: int) -> Llama:
    """The model that is run here."""
    return Llama(VOCAB * HIDDEN, (HIDDEN, *LAYER[:4], HIDDEN, *LAYER[4:7]), HIDDEN, layers)


LLAMA_2_7B = Llama(32000 * 4096, (4096, *[4096 * 4096] * 4, 4096, *[4096 * 11008] * 3), 4096, 32)


@dataclass(frozen=True)
class Traffic:
    """What every rank sends, in this order, with one param group and the final norm always active.

    Attributes:
        gas: micro-steps of a step.
        fallible: states rest in files, so the step of every rank may fail alone.
    """

    model: Llama
    stage: int
    world: int
    gas: int = 1
    fallible: bool = False

    def forward(self, floor: int, age: int) -> list[Call]:
        """ZeRO-3 alone: weights, module by module, after ``age`` forwards with ``floor`` as the lowest active layer.

        DeepSpeed compares across ranks in which order modules and parameters are used: once that nothing was recorded
        yet, then what the first forward and backward recorded, then never again.
        """
        m = self.model
        calls = self._compared(*((0,), self._recorded(floor))[age]) if self.stage == 3 and age < 2 else []
        return calls + self._gathered([m.embed, *m.block * m.layers, m.norm, m.embed])

    def backward(self, active: Sequence[int]) -> list[Call]:
        """One reduce-scatter per active unit; in ZeRO-3 amid the gathers of all modules that backward runs through."""
        m = self.model
        calls = [*self._gathered([m.embed, m.norm]), self._of_unit("reduce_scatter_base", [m.norm])]
        for layer in reversed(range(min(active), m.layers)):
            calls += self._gathered(m.block[::-1])
            calls += [self._of_unit("reduce_scatter_base", m.block)] if layer in active else []
        return calls

    def step(self, active: Sequence[int], trains: bool, draws: bool) -> list[Call]:
        """Squared norms (of the sum of micro-steps, and of each) and counts; in ZeRO-1 and 2 the new weights."""
        units = [(self.model.norm,)] + [self.model.block] * len(active)
        calls = [("allreduce", 4 * (3 * len(units) + 2))]
        calls += [("allreduce", 8)] if trains and self.fallible else []
        if trains and self.stage < 3 and self.world > 1:
            calls += [self._of_unit("allgather_base", unit) for unit in units]
        return calls + ([("allreduce", FINGERPRINT)] if draws else [])

    def whole_step(self, active: Sequence[int], trains: bool, draws: bool, age: int) -> list[Call]:
        """All micro-steps of a step, the first of them ``age`` forwards after the lowest active layer has changed."""
        calls = []
        for micro in range(self.gas):
            calls += self.forward(min(active), age + micro) + self.backward(active)
        return calls + self.step(active, trains, draws)

    def _of_unit(self, operator: str, sizes: Sequence[int]) -> Call:
        owned = sum(part(size, self.world) for size in sizes) if self.stage == 3 else part(sum(sizes), self.world)
        return operator, BF16 * self.world * ALIGNMENT * part(owned, ALIGNMENT)

    def _gathered(self, sizes: Sequence[int]) -> list[Call]:
        if self.stage < 3 or self.world == 1:
            return []
        return [("allgather_base", BF16 * self.world * part(size, self.world)) for size in sizes]

    def _recorded(self, floor: int) -> tuple[int, int, int]:
        """Modules and parameters in the order of forward and backward; and the last use of each parameter."""
        blocks = 2 * self.model.layers - floor
        # outside the blocks, backward does not come to the embedding and the rotary one
        modules, params = 13 * blocks + 6 + 4, len(self.model.block) * blocks + 3 + 2
        return modules, params, params

    @staticmethod
    def _compared(*lengths: int) -> list[Call]:
        """Lists of int64, each after its length."""
        return [call for length in lengths for call in (("broadcast", 8), ("broadcast", 8 * length))]


# ---- steps as they are ----------------------------------------------------------------------------------------------

# name -> (ZeRO stage, layers, further config)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero1-nvme": (1, 4, {}),
    "zero2-six-layers-gas2": (2, 6, {"gas": 2, "clip": 0.1}),
    "zero3-three-layers": (3, 3, {"zero_optimization": BARE}),
}
POOLS = {**WORLD, "eight_ranks": 8}


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[RankPool]:
    pool = RankPool(8)
    yield pool
    pool.close()


def watch_steps(config: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """Steps up to the refresh: what they were to do, what crossed ranks, and the scores after each."""
    steps = []
    with engine_of(config, tiny_llama(hidden=HIDDEN, layers=layers).bfloat16()) as engine:
        for step in range(REFRESHES + 1):
            record = {"active": engine.grass.active_layers, "trains": engine.grass.phase == "train"}
            with Collectives() as sent:
                train(engine, 1, start=step)
            steps.append({**record, "calls": sent.calls, "scores": engine.grass.scores})
    return steps


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "pool"),
    tiered(
        itertools.product(CASES, POOLS),
        ("zero1-nvme", "two_ranks"),
        ("zero2-six-layers-gas2", "four_ranks"),
        ("zero3-three-layers", "one_rank"),
        ("zero3-three-layers", "two_ranks"),
    ),
)
def test_what_crosses_ranks_is_the_formula(
    request: pytest.FixtureRequest, tmp_path: Path, case: str, pool: str
) -> None:
    stage, layers, settings = CASES[case]
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "io": "posix"} if "nvme" in case else {}
    periods = {"probe_steps": PROBE_STEPS, "sample_period": SAMPLE_PERIOD, "refresh_period": REFRESH_PERIOD}
    config = ds_config(
        stage=stage, dtype="bf16", grass=grass_block(num_active_layers=GAMMA, offload=offload, **periods), **settings
    )
    traffic = Traffic(tiny(layers), stage, POOLS[pool], config["gradient_accumulation_steps"], bool(offload))
    for steps in request.getfixturevalue(pool).run(watch_steps, config=config, layers=layers):
        floor, age = 0, 0
        for number, step in enumerate(steps):
            assert len(step["active"]) == (GAMMA if step["trains"] else layers)
            floor, age = min(step["active"]), age if min(step["active"]) == floor else 0
            assert step["calls"] == traffic.whole_step(step["active"], step["trains"], number in DRAWS, age)
            age += traffic.gas
        assert [step["trains"] for step in steps] == [False] * PROBE_STEPS + [True] * (REFRESHES + 1 - PROBE_STEPS)
        scores = [step["scores"] for step in steps]
        assert scores[0] is None
        assert scores[1] == scores[2] == scores[3] != scores[REFRESHES]


# ---- stock DeepSpeed, and the README --------------------------------------------------------------------------------


def stock_step(model: Llama, stage: int) -> list[Call]:
    """What full fine-tuning sends of gradients and weights; padding, norms and flags left out."""
    whole = BF16 * model.numel
    if stage == 3:
        return [("allgather_base", 2 * whole), ("reduce_scatter_base", whole)]
    return [("allreduce", whole), ("allgather_base", whole)]


def watch_stock(config: dict[str, Any]) -> dict[str, int]:
    """Operator -> bytes of a step of stock DeepSpeed with its traces made; norms and flags left out."""
    with engine_of(config, tiny_llama(hidden=HIDDEN).bfloat16()) as engine:
        train(engine, 2)
        with Collectives() as sent:
            train(engine, 1, start=2)
    sent.calls = [(operator, nbytes) for operator, nbytes in sent.calls if nbytes > 8]
    return {operator: sent.bytes_of(operator) for operator, _ in sent.calls}


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "zero"), [(2, {}), (3, BARE)])
def test_full_fine_tuning_sends_all_weights_three_times(two_ranks: RankPool, stage: int, zero: dict[str, Any]) -> None:
    config = ds_config(stage=stage, dtype="bf16", zero_optimization=zero)
    assert two_ranks.run(watch_stock, config=config) == [dict(stock_step(tiny(4), stage))] * 2


def ring(calls: Sequence[Call], world: int) -> str:
    """GB that each rank sends around a ring: an all-reduce is a reduce-scatter and an all-gather."""
    whole = sum(nbytes * (2 if operator == "allreduce" else 1) for operator, nbytes in calls)
    return f"{whole * (world - 1) / world / 1e9:.2f}"


def table_rows() -> list[str]:
    """What a step sends, as in the table of docs/communication.md."""
    layers, worlds = tuple(range(LLAMA_2_7B.layers)), (64, 1024)
    steps = [
        (2, "ZeRO-1 and 2, training", layers[:GAMMA], True),
        (2, "ZeRO-1 and 2, probing", layers, False),
        (3, "ZeRO-3, training, topmost layers active", layers[-GAMMA:], True),
        (3, "ZeRO-3, training, lowest layer active", layers[:GAMMA], True),
        (3, "ZeRO-3, probing", layers, False),
    ]
    rows = []
    for stage, step, active, trains in steps:
        calls = [Traffic(LLAMA_2_7B, stage, world).whole_step(active, trains, draws=False, age=2) for world in worlds]
        rows.append((step, *map(ring, calls, worlds)))
    for stage, step in ((2, "ZeRO-1 and 2, stock full fine-tuning"), (3, "ZeRO-3, stock full fine-tuning")):
        rows.append((step, *(ring(stock_step(LLAMA_2_7B, stage), world) for world in worlds)))
    return [f"| {' | '.join(row)} |" for row in rows]


def test_the_page_says_what_the_formula_gives() -> None:
    lines = PAGE.read_text().splitlines()
    assert [row for row in table_rows() if row not in lines] == []
