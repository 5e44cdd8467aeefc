# SPDX-License-Identifier: Apache-2.0
"""``engine.compile()``: the same arithmetic, and no compilation at a draw once every kind of block has been seen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import RELEASED, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference
from helpers.ranks import RankPool
from helpers.tiered import tiered

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def compiling_ranks() -> Iterator[RankPool]:
    """Ranks of their own: torch's compiler leaves hooks in a process, which other tests would find."""
    pool = RankPool(2)
    yield pool
    pool.close()


STEPS = 10
# A block is active or not, and its input requires a gradient or not.
KINDS_OF_BLOCK = 4


def compiled(config: dict[str, Any], how: str) -> dict[str, Any]:
    """Train with a compiler that only counts graphs; ``how``: ``no``, ``engine`` or ``whole`` (the whole model)."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(sets))
        return graph.forward

    torch._dynamo.reset()
    sets: set[tuple[int, ...]] = set()
    model = tiny_llama()
    model.config.use_cache = False  # or a graph would hold the layer's index in the cache of keys and values
    with engine_of(config, model=model) as engine:
        if how == "engine":
            engine.compile(backend=count)
            engine.compile(backend=count)  # nothing more
        elif how == "whole":
            engine.module.compile(backend=count)
        said = engine.is_compiled
        sets.add(engine.grass.active_layers)
        train(engine, STEPS, after_step=lambda _: sets.add(engine.grass.active_layers))
        weights = snapshot(engine.module)
    torch._dynamo.reset()
    return {"weights": weights, "graphs": graphs, "sets": len(sets), "compiled": said}


@pytest.mark.parametrize("stage", tiered([1, 2, 3], 2))
def test_blocks_share_their_graphs_whatever_is_drawn(compiling_ranks: RankPool, stage: int) -> None:
    block = grass_block(sampler="cyclic", sample_period=1)
    config = ds_config(stage=stage, grass=block, zero_optimization=RELEASED if stage == 3 else {})
    plain = compiling_ranks.run(compiled, config=config, how="no")
    for found, expected in zip(compiling_ranks.run(compiled, config=config, how="engine"), plain, strict=True):
        assert found["compiled"] and not expected["compiled"]
        assert found["sets"] == 4
        # In ZeRO-3 the hooks that gather weights break the graphs.
        assert len(found["graphs"]) > 1 and (stage == 3 or len(found["graphs"]) <= KINDS_OF_BLOCK)
        assert difference(found["weights"], expected["weights"]) is None


@pytest.mark.all
def test_a_model_in_one_piece_is_compiled_anew_for_every_set(compiling_ranks: RankPool) -> None:
    """Why the engine does otherwise."""
    config = ds_config(grass=grass_block(sampler="cyclic", sample_period=1))
    for found in compiling_ranks.run(compiled, config=config, how="whole"):
        assert len(found["graphs"]) >= found["sets"] == 4


def refused() -> str:
    with engine_of(ds_config(grass=grass_block(sampler="uniform"))) as engine:
        try:
            engine.compile(compiled_autograd_enabled=True)
        except ValueError as error:
            return str(error)
        return ""


def test_compiled_autograd_is_refused(compiling_ranks: RankPool) -> None:
    for message in compiling_ranks.run(refused):
        assert "compiled_autograd_enabled" in message
