# SPDX-License-Identifier: Apache-2.0
"""The sampler of docs/sampling.md, "A sampler of your own", as the page has it: found, drawn, resumed, refused."""

import io
import json
import math
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.markdown import code_blocks

from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.sampling import registry
from grass_ds.sampling.controller import Controller
from grass_ds.sampling.samplers import Sampler, SamplingSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sampling.md").read_text()
(CODE,), (BLOCK,), (PROJECT,) = (code_blocks(PAGE, language) for language in ("python", "json", "toml"))
PATH = json.loads("{" + BLOCK + "}")["grass"]["sampler"]
LAYERS = 6


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code of the page where the config of the page looks for it."""
    package, name, _ = PATH.split(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for imported in (package, f"{package}.{name}"):
        sys.modules.pop(imported, None)


def config(**changed: Any) -> GrassConfig:
    return GrassConfig(**{"sampler": PATH, "num_active_layers": 2, "sample_period": 1, **changed})


def controller(layers: int = LAYERS, **changed: Any) -> Controller:
    return Controller(layers, **config(**changed).controller_arguments())


def steps(of: Controller, count: int) -> list[tuple[int, ...]]:
    """The layers of so many steps. The set that is announced must be the one that follows."""
    trained = []
    for _ in range(count):
        trained.append(of.active_layers)
        announced = of.upcoming()
        of.end_step(None)
        assert of.active_layers == announced
    return trained


def test_the_page_names_it_by_path_and_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    block = parse_grass_block(json.loads("{" + BLOCK + "}"))
    assert block is not None and block.sampler_args == {"strength": 0.5}
    found = registry.find_sampler(PATH)
    assert issubclass(found, Sampler) and (found.__module__, found.__name__) == tuple(PATH.rsplit(".", 1))
    ((name, value),) = tomllib.loads(PROJECT)["project"]["entry-points"][registry.GROUP].items()
    points = EntryPoints([EntryPoint(name, value, registry.GROUP)])
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    assert registry.find_sampler(name) is found


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_its_probabilities_follow_its_draws(strength: float) -> None:
    mine, times = controller(sampler_args={"strength": strength}), [0] * LAYERS
    for _ in range(20):
        for layer in mine.active_layers:
            times[layer] += 1
        weights = [math.exp(-strength * n) for n in times]
        assert mine.probabilities == pytest.approx([weight / sum(weights) for weight in weights])
        steps(mine, 1)
    assert sum(mine.visits) == 2 * 20


def test_it_draws_by_these_probabilities() -> None:
    """The layer just drawn has a third of the weight of each of the three others: it comes again once in ten draws."""
    runs = 2000
    arguments = config(num_active_layers=1, sampler_args={"strength": math.log(3)}).controller_arguments()
    balanced = registry.find_sampler(PATH)
    made = [balanced(4, SamplingSettings(**{**arguments, "seed": seed})) for seed in range(runs)]
    again = sum(one.draw(None) == one.draw(None) for one in made)
    assert again / runs == pytest.approx(0.1, abs=0.027)  # four standard deviations


def test_a_large_strength_takes_turns() -> None:
    mine = controller(sampler_args={"strength": 100.0})
    trained = steps(mine, 3 * LAYERS // 2)
    assert mine.visits == (3,) * LAYERS
    assert len(set(trained[:3])) == 3  # a cycle has every layer once


def test_its_state_resumes_to_the_same_draws() -> None:
    first, file = controller(seed=1), io.BytesIO()
    steps(first, 7)
    torch.save(first.state_dict(), file)
    file.seek(0)
    later = steps(first, 20)
    resumed = controller(seed=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert steps(resumed, 20) == later
    assert resumed.fingerprint() == first.fingerprint()
    assert steps(controller(seed=2), 20) != later


def test_a_wrong_argument_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sampler_args: my_package\S+ has no argument strenght; it has strength"):
        controller(sampler_args={"strenght": 1})
