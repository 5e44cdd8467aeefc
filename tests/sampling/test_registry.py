# SPDX-License-Identifier: Apache-2.0
"""Samplers of others: found by entry point or path, refused with the reason."""

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from grass_ds.config import GrassConfig, GrassConfigError, parse_grass_block
from grass_ds.sampling import registry
from grass_ds.sampling.controller import Controller
from grass_ds.sampling.registry import SAMPLERS
from grass_ds.sampling.samplers import Sampler


class TopFirst(Sampler):
    """Layers near the output are drawn more often."""

    accepts = ("slope",)

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        slope = self.settings.sampler_args.get("slope", 1.0)
        return tuple(slope * layer for layer in range(self.num_layers))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with that sampler, and something else in it."""
    module = ModuleType("others_samplers")
    module.TopFirst, module.number = TopFirst, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def installed(name: str, value: str) -> mock._patch:
    points = EntryPoints([EntryPoint(name, value, registry.GROUP)])
    return mock.patch.object(registry, "entry_points", lambda group: points.select(group=group))


def test_ours_need_nothing() -> None:
    assert {name: registry.find_sampler(name) for name in SAMPLERS} == SAMPLERS


def test_a_sampler_is_found_by_its_path_and_by_its_entry_point(package: str) -> None:
    assert registry.find_sampler(f"{package}.TopFirst") is TopFirst
    with installed("top-first", f"{package}:TopFirst"):
        assert registry.find_sampler("top-first") is TopFirst


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifrom", 'did you mean "uniform"'),
        ("top-frist", 'did you mean "top-first"'),
        ("no_package.Sampler", "ModuleNotFoundError: No module named 'no_package'"),
        ("others_samplers.Missing", "AttributeError"),
        ("others_samplers.number", "3 is no subclass of grass_ds.sampling.samplers.Sampler"),
    ],
)
def test_others_are_refused_with_the_reason(package: str, name: str, message: str) -> None:
    with (
        installed("top-first", f"{package}:TopFirst"),
        pytest.raises(GrassConfigError, match=r"grass\.sampler") as found,
    ):
        parse_grass_block({"grass": {"sampler": name}})
    assert message in str(found.value) and repr(name) in str(found.value)


def controller(package: str, **settings: object) -> Controller:
    config = GrassConfig(sampler=f"{package}.TopFirst", **{"num_active_layers": 2, **settings})
    return Controller(4, **config.controller_arguments())


def test_arguments_reach_the_sampler_and_unknown_ones_are_refused(package: str) -> None:
    low, high = (controller(package, sampler_args={"slope": slope}).probabilities for slope in (0.0, 2.0))
    assert low == (0.25,) * 4
    assert high[3] / high[2] == pytest.approx(2.718281828**2)
    for layers in (2, 4):  # all of them at four, where nothing is drawn
        with pytest.raises(ValueError, match="no argument slop; it has slope"):
            controller(package, sampler_args={"slop": 1}, num_active_layers=layers)
    assert controller(package, sampler_args={"slope": 2.0}, num_active_layers=4).active_layers == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="uniform has no argument slope; it has none"):
        Controller(4, **GrassConfig(sampler="uniform", sampler_args={"slope": 1}).controller_arguments())


class Forgetful(Sampler):
    def state_dict(self) -> dict[str, Any]:
        return {"mine": 1}


def test_a_state_without_that_of_the_base_class_is_refused_at_start() -> None:
    config = GrassConfig(sampler=f"{__name__}.Forgetful")
    with pytest.raises(ValueError, match=r"Forgetful lacks what super\(\)\.state_dict\(\) returns"):
        Controller(4, **config.controller_arguments())
