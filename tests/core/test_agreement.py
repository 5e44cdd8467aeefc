# SPDX-License-Identifier: Apache-2.0
"""Ranks fail together: when one of them fails, and when they would decide differently, before anything is switched."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.traffic import Collectives
from torch import nn

from grass_ds.core.agreement import (
    RankDivergenceError,
    RankFailedError,
    check_ranks_agree,
    digest,
    gather_from_ranks,
    raise_on_all_ranks,
)

HANG = 60.0  # seconds


def rank() -> int:
    return torch.distributed.get_rank()


# ---- the check itself -----------------------------------------------------------------------------------------------


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


# ---- failing together -----------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Something that moves state in threads."""

    fallible: bool = True
    error: BaseException | None = None


def outcome(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or the type and message of what it raises; and the number of collectives."""
    with Collectives() as sent:
        try:
            result = action()
        except Exception as error:
            result = (type(error), str(error))
    return result, len(sent.calls)


def fail_inside(failing: dict[int, Exception], source: Source | None) -> Any:
    def action() -> str:
        with raise_on_all_ranks(None, "cpu", source):
            if rank() in failing:
                raise failing[rank()]
        return "done"

    return outcome(action)


def fail_in_thread(failing: int) -> Any:
    source = Source(error=OSError("disk") if rank() == failing else None)
    return fail_inside({}, source)


def gather(failing: dict[int, Exception]) -> Any:
    def task() -> dict[str, Any]:
        if rank() in failing:
            raise failing[rank()]
        return {"rank": rank(), "tensor": torch.full((rank(),), 1.0)}

    return outcome(lambda: gather_from_ranks(task))


FAIL = {"block": fail_inside, "gather": gather}


@pytest.mark.dist
@pytest.mark.parametrize("way", FAIL)
@pytest.mark.parametrize(
    ("error", "elsewhere"), [(OSError("disk"), RankFailedError), (ValueError("a mistake"), ValueError)]
)
def test_an_error_of_one_rank_is_raised_on_all(two_ranks: Any, way: str, error: Exception, elsewhere: type) -> None:
    more = {"source": None} if way == "block" else {}
    for failing in (0, 1):
        results = two_ranks.run(FAIL[way], failing={failing: error}, timeout=HANG, **more)
        assert results[failing][0] == (type(error), str(error))
        assert results[1 - failing][0] == (elsewhere, f"rank {failing} failed: {error}")


@pytest.mark.dist
def test_of_several_errors_each_rank_raises_its_own_and_others_the_lowest_ranks(four_ranks: Any) -> None:
    failing = {1: OSError("one"), 3: ValueError("three")}
    own = {number: (type(error), str(error)) for number, error in failing.items()}
    expected = [own.get(number, (RankFailedError, "rank 1 failed: one")) for number in range(4)]
    for way, more in (("block", {"source": None}), ("gather", {})):
        results = four_ranks.run(FAIL[way], failing=failing, timeout=HANG, **more)
        assert [result for result, _ in results] == expected


@pytest.mark.dist
def test_an_error_in_a_thread_counts(two_ranks: Any) -> None:
    first, second = two_ranks.run(fail_in_thread, failing=1, timeout=HANG)
    assert (first[0], second[0]) == ((RankFailedError, "rank 1 failed: disk"), (OSError, "disk"))


@pytest.mark.dist
@pytest.mark.parametrize(("source", "collectives"), [(None, 1), (Source(), 1), (Source(fallible=False), 0)])
def test_success_costs_one_all_reduce_where_a_rank_can_fail_alone(
    two_ranks: Any, source: Source | None, collectives: int
) -> None:
    assert two_ranks.run(fail_inside, failing={}, source=source, timeout=HANG) == [("done", collectives)] * 2


@pytest.mark.dist
def test_results_are_gathered_in_rank_order(four_ranks: Any) -> None:
    for result, _ in four_ranks.run(gather, failing={}, timeout=HANG):
        assert [each["rank"] for each in result] == [0, 1, 2, 3]
        assert [each["tensor"].tolist() for each in result] == [[1.0] * number for number in range(4)]


# ---- at the start ---------------------------------------------------------------------------------------------------


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


def start_with_other_model(how: str) -> str:
    """On rank 1 the parameters are in two groups or in another order, one is frozen, or two matrices swap their
    shapes.

    The shapes have as many elements, so that only the comparison of the layout can tell.
    """
    model, split = tiny_llama(), 0
    if rank() == 1 and how == "shapes":
        mlp = model.model.layers[1].mlp
        mlp.gate_proj, mlp.down_proj = mlp.down_proj, mlp.gate_proj
    parameters = list(model.parameters())
    if rank() == 1 and how == "order":
        parameters.reverse()
    if rank() == 1 and how == "frozen":
        model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    if rank() == 1 and how == "groups":
        split = 5
    groups = [{"params": parameters[split:]}] + ([{"params": parameters[:split]}] if split else [])
    return refused_at_start(ds_config(grass=grass_block()), model, model_parameters=groups)


@pytest.mark.dist
@pytest.mark.parametrize("how", ["groups", "order", "frozen", "shapes"])
def test_another_model_or_other_param_groups_on_one_rank_stop_all_ranks_at_the_start(two_ranks: Any, how: str) -> None:
    for message in two_ranks.run(start_with_other_model, how=how, timeout=HANG):
        assert "the layers and param groups" in message


# ---- while training -------------------------------------------------------------------------------------------------


def nudge(controller: Any, what: str) -> None:
    """Change the input of a decision, as little as possible."""
    state = controller.state_dict()
    importance, sampler = state["importance"], state["sampler_state"]
    if what == "scores":
        first, *others = importance["scores"]
        importance["scores"] = (math.nextafter(first, 1.0), *others)
    elif what == "measurements":
        importance["sums"][1] += 1e-6  # the last bit would be lost in the sum with the next measurement
    elif what == "generator":
        generator = torch.Generator().set_state(sampler["generator"])
        torch.rand((), generator=generator)
        sampler["generator"] = generator.get_state()
    elif what == "queue":
        sampler["queue"].reverse()
    controller.load_state_dict(state)


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
