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


def compare(cases: list[list[list[int]]]) -> list[str]:
    """What the comparison says of every case, a list of values per rank; nothing where they agree."""
    said = []
    for values in cases:
        try:
            check_ranks_agree(values[rank()], "the test", group=None, device="cpu")
            said.append("")
        except RankDivergenceError as error:
            said.append(str(error))
    return said


@pytest.mark.dist
def test_equal_values_agree_at_both_ends_of_the_range(two_ranks: Any, one_rank: Any) -> None:
    equal = [[0], [2**62 - 1], [0, 2**62 - 1, 5]]
    assert two_ranks.run(compare, cases=[[values] * 2 for values in equal], timeout=HANG) == [[""] * 3] * 2
    assert one_rank.run(compare, cases=[[[7]]], timeout=HANG) == [[""]]


@pytest.mark.dist
def test_a_difference_on_one_rank_raises_on_every_rank(two_ranks: Any) -> None:
    pairs = [[[0], [1]], [[5, 2**62 - 1], [5, 2**62 - 2]], [[1, 2], [2, 1]]]
    cases = [*pairs, *(pair[::-1] for pair in pairs)]
    for number, messages in enumerate(two_ranks.run(compare, cases=cases, timeout=HANG)):
        for values, message in zip(cases, messages, strict=True):
            assert f"rank {number}" in message
            assert "the test" in message
            assert str(values[number]) in message


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


def fail_inside(failing: dict[int, Exception], source: Source | None = None) -> Any:
    def action() -> str:
        with raise_on_all_ranks(None, "cpu", source):
            if rank() in failing:
                raise failing[rank()]
        return "done"

    return outcome(action)


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
    for failing in (0, 1):
        results = two_ranks.run(FAIL[way], failing={failing: error}, timeout=HANG)
        assert results[failing][0] == (type(error), str(error))
        assert results[1 - failing][0] == (elsewhere, f"rank {failing} failed: {error}")


@pytest.mark.dist
@pytest.mark.parametrize("way", FAIL)
def test_of_several_errors_each_rank_raises_its_own_and_others_the_lowest_ranks(four_ranks: Any, way: str) -> None:
    failing = {1: OSError("one"), 3: ValueError("three")}
    own = {number: (type(error), str(error)) for number, error in failing.items()}
    expected = [own.get(number, (RankFailedError, "rank 1 failed: one")) for number in range(4)]
    results = four_ranks.run(FAIL[way], failing=failing, timeout=HANG)
    assert [result for result, _ in results] == expected


def fail_in_thread() -> Any:
    return fail_inside({}, Source(error=OSError("disk") if rank() == 1 else None))


@pytest.mark.dist
def test_an_error_in_a_thread_counts(two_ranks: Any) -> None:
    first, second = two_ranks.run(fail_in_thread, timeout=HANG)
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


def start_with_other_blocks(changes: dict[str, Any]) -> list[str]:
    """On rank 1 one key of the block after another has another value."""
    blocks = [grass_block(**({key: value} if rank() == 1 else {})) for key, value in changes.items()]
    return [refused_at_start(ds_config(grass=block)) for block in blocks]


@pytest.mark.dist
def test_another_grass_block_on_one_rank_stops_all_ranks_at_the_start(two_ranks: Any) -> None:
    changes = {"seed": 8, "sample_period": 4, "temperature": 0.6, "always_active": []}
    for messages in two_ranks.run(start_with_other_blocks, changes=changes, timeout=HANG):
        assert all('"grass" block' in message for message in messages)


def start_with_other_models() -> list[str]:
    """On rank 1 the parameters are in two groups or in another order, one is frozen, or two matrices swap their
    shapes, which have as many elements, so that only the comparison of the layout can tell."""
    said = []
    for how in ("groups", "order", "frozen", "shapes"):
        model, how = tiny_llama(), how if rank() == 1 else ""
        mlp = model.model.layers[1].mlp
        if how == "shapes":
            mlp.gate_proj, mlp.down_proj = mlp.down_proj, mlp.gate_proj
        mlp.up_proj.weight.requires_grad_(how != "frozen")
        parameters = list(model.parameters())[:: -1 if how == "order" else 1]
        parts = (parameters[5:], parameters[:5]) if how == "groups" else (parameters,)
        groups = [{"params": members} for members in parts]
        said.append(refused_at_start(ds_config(grass=grass_block()), model, model_parameters=groups))
    return said


@pytest.mark.dist
def test_another_model_or_other_param_groups_on_one_rank_stop_all_ranks_at_the_start(two_ranks: Any) -> None:
    for messages in two_ranks.run(start_with_other_models, timeout=HANG):
        assert all("the layers and param groups" in message for message in messages)


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
