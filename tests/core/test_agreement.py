# SPDX-License-Identifier: Apache-2.0
"""Ranks that would decide differently stop, all of them, at the start or at the next draw, before anything is switched."""

import math
from typing import Any

import pytest
import torch
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from torch import nn

from grass_ds.core.agreement import RankDivergenceError, check_ranks_agree, digest

HANG = 60.0  # seconds


def rank() -> int:
    return torch.distributed.get_rank()


# ---- the check itself -----------------------------------------------------------------------------------------------------


def test_digest_tells_values_apart_and_fits_the_comparison() -> None:
    values = [(), (1,), ("1",), (1, 2), (2, 1), ((1, 2),), (0.1,), (math.nextafter(0.1, 1.0),), ({"a": None},)]
    numbers = [digest(*value) for value in values]
    assert len(set(numbers)) == len(values)
    assert all(0 <= number < 2**62 for number in numbers)
    assert numbers == [digest(*value) for value in values]


def compare(values: list[list[int]]) -> str | None:
    try:
        check_ranks_agree(values[rank()], "the test", group=None, device="cpu")
    except RankDivergenceError as error:
        return str(error)
    return None


@pytest.mark.dist
def test_equal_values_agree_at_both_ends_of_the_range(two_ranks: Any) -> None:
    for values in ([0], [2**62 - 1], [0, 2**62 - 1, 5]):
        assert two_ranks.run(compare, values=[values, values], timeout=HANG) == [None, None]


@pytest.mark.dist
@pytest.mark.parametrize(("first", "second"), [([0], [1]), ([5, 2**62 - 1], [5, 2**62 - 2]), ([1, 2], [2, 1])])
def test_a_difference_on_one_rank_raises_on_every_rank(two_ranks: Any, first: list[int], second: list[int]) -> None:
    for values in ([first, second], [second, first]):
        messages = two_ranks.run(compare, values=values, timeout=HANG)
        for number, message in enumerate(messages):
            assert message is not None
            assert f"rank {number}" in message
            assert "the test" in message
            assert str(values[number]) in message


@pytest.mark.dist
def test_one_rank_agrees_with_itself(one_rank: Any) -> None:
    assert one_rank.run(compare, values=[[7]], timeout=HANG) == [None]


# ---- at the start ---------------------------------------------------------------------------------------------------------


def refused_at_start(config: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> str:
    with pytest.raises(RankDivergenceError) as caught, engine_of(config, model, **arguments):
        pass
    return str(caught.value)


def start_with_other_block(key: str, value: Any) -> str:
    block = grass_block(**({key: value} if rank() == 1 else {}))
    return refused_at_start(ds_config(grass=block))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("key", "value"), [("seed", 8), ("sample_period", 4), ("temperature", 0.6), ("always_active", [])]
)
def test_another_grass_block_on_one_rank_stops_all_ranks_at_the_start(two_ranks: Any, key: str, value: Any) -> None:
    for message in two_ranks.run(start_with_other_block, key=key, value=value, timeout=HANG):
        assert '"grass" block' in message


def start_with_other_groups(how: str) -> str:
    """One param group on rank 0; on rank 1 two of them, or one in another order, or one parameter frozen."""
    model = tiny_llama()
    parameters = list(model.parameters())
    if rank() == 1 and how == "order":
        parameters.reverse()
    if rank() == 1 and how == "frozen":
        model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    cut = 5 if rank() == 1 and how == "groups" else 0
    groups = [{"params": parameters[cut:]}] + ([{"params": parameters[:cut]}] if cut else [])
    return refused_at_start(ds_config(grass=grass_block()), model, model_parameters=groups)


def start_with_other_shapes() -> str:
    """As many elements, in two matrices of other shape, so that only the comparison of the layout can tell."""
    model = tiny_llama()
    if rank() == 1:
        mlp = model.model.layers[1].mlp
        mlp.gate_proj, mlp.down_proj = mlp.down_proj, mlp.gate_proj
    return refused_at_start(ds_config(grass=grass_block()), model)


@pytest.mark.dist
@pytest.mark.parametrize("how", ["groups", "order", "frozen", "shapes"])
def test_another_model_or_other_param_groups_on_one_rank_stop_all_ranks_at_the_start(two_ranks: Any, how: str) -> None:
    arguments = {} if how == "shapes" else {"how": how}
    function = start_with_other_shapes if how == "shapes" else start_with_other_groups
    for message in two_ranks.run(function, timeout=HANG, **arguments):
        assert "the layers and param groups" in message


# ---- while training -------------------------------------------------------------------------------------------------------


def nudge(controller: Any, what: str) -> None:
    """Change what a decision is made of, as little as possible."""
    importance = controller._importance
    if what == "scores":
        importance.scores = (math.nextafter(importance.scores[0], 1.0), *importance.scores[1:])
    elif what == "measurements":
        importance._sums[1] += 1e-6  # the last bit would be lost in the sum with the next measurement
    elif what == "generator":
        torch.rand((), generator=controller._sampler._generator)
    elif what == "queue":
        controller._sampler._queue.reverse()
    else:
        raise KeyError(what)


def diverge(config: dict[str, Any], what: str, after: int, steps: int) -> dict[str, Any]:
    """Nudge rank 1 after some steps; train until the draw that is ``steps`` steps away, which must raise."""
    from deepspeed.utils import safe_get_full_fp32_param

    model = tiny_llama()
    with engine_of(config, model) as engine:
        train(engine, after)
        if rank() == 1:
            nudge(engine.optimizer.controller, what)
        train(engine, steps - 1, start=after)
        trainable = [p.requires_grad for p in model.parameters()]
        with pytest.raises(RankDivergenceError) as caught:
            train(engine, 1, start=after + steps - 1)
        assert [p.requires_grad for p in model.parameters()] == trainable
        weights = snapshot(model)
        for param in model.parameters():  # the shards of all ranks still make up the weights: collectives are in step
            assert torch.equal(safe_get_full_fp32_param(param), param.detach())
    return {"message": str(caught.value), "weights": weights}


# sampler -> what is nudged, after how many steps, draw after how many more. Probing takes 2 steps, a draw 3, a refresh 6.
DIVERGED = {
    "grass-scores": ("grass", "scores", 3, 2),
    "grass-pending-measurements": ("grass", "measurements", 4, 1),
    "grass-generator": ("grass", "generator", 2, 3),
    "grass-first-draw": ("grass", "measurements", 1, 1),
    "static-scores": ("static", "scores", 3, 2),
    "uniform-generator": ("uniform", "generator", 4, 2),
    "cyclic-queue": ("cyclic", "queue", 1, 2),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", DIVERGED)
def test_a_rank_that_diverges_while_training_stops_all_ranks_at_the_next_draw(two_ranks: Any, case: str) -> None:
    sampler, what, after, steps = DIVERGED[case]
    config = ds_config(grass=grass_block(sampler=sampler))
    first, second = two_ranks.run(diverge, config=config, what=what, after=after, steps=steps, timeout=HANG)
    for number, result in enumerate((first, second)):
        assert "the layers to train next" in result["message"]
        assert "no layer was switched" in result["message"]
        assert f"rank {number}" in result["message"]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
