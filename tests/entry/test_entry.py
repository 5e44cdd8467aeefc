# SPDX-License-Identifier: Apache-2.0
"""The ways in: grass_ds.initialize and grass_ds.enable, and that neither leaves anything behind."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from helpers.models import batch, ds_config, grass_block, tiny_llama, train
from helpers.tiered import tiered
from torch import nn

import grass_ds
from grass_ds import entry
from grass_ds.cluster import placement
from grass_ds.config import GrassConfig
from grass_ds.sampling.layers import ModelLayers

STOCK_INITIALIZE, STOCK_ENGINE = deepspeed.initialize, deepspeed.DeepSpeedEngine


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    assert (deepspeed.initialize, deepspeed.DeepSpeedEngine) == (STOCK_INITIALIZE, STOCK_ENGINE)
    yield
    deepspeed.initialize, deepspeed.DeepSpeedEngine = STOCK_INITIALIZE, STOCK_ENGINE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Engine class and block of each call of a stand-in for deepspeed.initialize, which fails for ``model=None``."""
    found: list[Any] = []

    def initialize(args: Any = None, model: Any = None, config: Any = None, **_: Any) -> tuple[Any, Any, Any, Any]:
        built = deepspeed.DeepSpeedEngine
        found.append((built.func, built.keywords["grass_config"]) if isinstance(built, partial) else built)
        if model is None:
            raise RuntimeError("no model")
        return "engine", "optimizer", "dataloader", "scheduler"

    monkeypatch.setattr(entry, "_STOCK_INITIALIZE", initialize)
    monkeypatch.setattr(placement, "_exported", [])
    with mock.patch.dict(os.environ):  # the placement is exported to it
        yield found


WITHOUT = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
WITH_BLOCK = {**WITHOUT, "grass": {}}


# ---- enable ---------------------------------------------------------------------------------------------------------


def test_enable_holds_until_its_block_is_left() -> None:
    with grass_ds.enable():
        enabled = deepspeed.initialize
        with grass_ds.enable():
            assert deepspeed.initialize is enabled is not STOCK_INITIALIZE
        assert deepspeed.initialize is enabled
    assert deepspeed.initialize is STOCK_INITIALIZE
    with pytest.raises(KeyError), grass_ds.enable():
        raise KeyError
    assert deepspeed.initialize is STOCK_INITIALIZE


def test_enable_without_a_block_lasts() -> None:
    grass_ds.enable()
    once = deepspeed.initialize
    with grass_ds.enable():
        pass
    grass_ds.enable()
    assert deepspeed.initialize is once is not STOCK_INITIALIZE


def test_enabled_initialize_honours_the_block_and_only_it(calls: list[Any]) -> None:
    with grass_ds.enable():
        deepspeed.initialize(model=tiny_llama(), config=dict(WITH_BLOCK))
        deepspeed.initialize(model=nn.Linear(1, 1), config=dict(WITHOUT))
        deepspeed.initialize(model=nn.Linear(1, 1), config={**WITHOUT, "grass": {"enabled": False}})
    assert calls == [(grass_ds.GrassEngine, GrassConfig()), STOCK_ENGINE, STOCK_ENGINE]


# ---- initialize -----------------------------------------------------------------------------------------------------


def test_initialize_returns_the_four_and_binds_the_engine_class_for_its_length(calls: list[Any]) -> None:
    found = grass_ds.initialize(model=tiny_llama(), config=dict(WITH_BLOCK))
    assert found == ("engine", "optimizer", "dataloader", "scheduler")
    with grass_ds.enable():
        assert grass_ds.initialize(model=tiny_llama(), config=dict(WITH_BLOCK)) == found
    with pytest.raises(RuntimeError, match="no model"):
        grass_ds.initialize(model=None, config=dict(WITH_BLOCK))
    grass_ds.initialize(model=nn.Linear(1, 1), config=dict(WITHOUT))
    assert calls == [(grass_ds.GrassEngine, GrassConfig())] * 3 + [(grass_ds.GrassEngine, None)]
    assert deepspeed.DeepSpeedEngine is STOCK_ENGINE


def test_an_unknown_argument_is_refused_like_deepspeeds() -> None:
    with pytest.raises(TypeError, match="modle"):
        grass_ds.initialize(modle=None)


# ---- real engines ---------------------------------------------------------------------------------------------------


def kinds(config: dict[str, Any], how: str, break_it: bool = False) -> dict[str, Any]:
    """Build an engine in one of three ways, train it, and look at what it is and at what is left in the module.

    Counted is how many blocks are parsed and how many layers are discovered on the way, wherever in the library.
    """
    early = deepspeed.initialize
    model, spies = tiny_llama(), {}
    arguments = {"model": model, "config": config, "model_parameters": list(model.parameters())}
    if break_it:
        arguments["optimizer"] = "not an optimizer"
    with ExitStack() as patches:
        for cls in (GrassConfig, ModelLayers):
            spy = mock.patch.object(cls, "__init__", autospec=True, side_effect=cls.__init__)
            spies[cls.__name__] = patches.enter_context(spy)
        check = mock.patch.object(entry, "check_ds_config", wraps=entry.check_ds_config)
        spies["check_ds_config"] = patches.enter_context(check)
        if how != "initialize":
            patches.enter_context(grass_ds.enable())
        initialize = {"initialize": grass_ds.initialize, "enable": deepspeed.initialize, "early import": early}[how]
        try:
            engine, optimizer, loader, _ = initialize(**arguments)
        except Exception as error:
            return {"error": str(error), "restored": deepspeed.DeepSpeedEngine is STOCK_ENGINE}
    grass = getattr(engine, "grass", None)
    try:
        return {
            "losses": train(engine, 3),
            "kind": type(engine).__name__,
            "wrapper": type(optimizer).__name__,
            "is a DeepSpeedEngine": isinstance(engine, deepspeed.DeepSpeedEngine),
            "grass": grass is not None and grass.config == GrassConfig(**config["grass"]),
            "tuple": optimizer is engine.optimizer and loader is None,
            "restored": deepspeed.DeepSpeedEngine is STOCK_ENGINE and deepspeed.initialize is STOCK_INITIALIZE,
            "counts": {name: spy.call_count for name, spy in spies.items()},
        }
    finally:
        engine.destroy()


@pytest.mark.dist
@pytest.mark.parametrize(("how", "stage"), [("initialize", 2), ("enable", 3)])
def test_an_engine_with_a_block(two_ranks: Any, how: str, stage: int) -> None:
    """The block is parsed and the layers are discovered once."""
    for found in two_ranks.run(kinds, config=ds_config(stage=stage, grass=grass_block()), how=how):
        assert found["kind"] == "GrassEngine"
        assert found["wrapper"] == ("GrassZero12Optimizer" if stage == 2 else "GrassZero3Optimizer")
        assert found["is a DeepSpeedEngine"] and found["grass"] and found["tuple"] and found["restored"]
        assert found["counts"] == {"GrassConfig": 1, "ModelLayers": 1, "check_ds_config": 1}


@pytest.mark.dist
def test_an_engine_without_a_block_is_stock(two_ranks: Any) -> None:
    """As is the one of a function imported before `enable`, which ignores the block, as the docs warn."""
    stock = two_ranks.run(kinds, config=ds_config(grass=grass_block()), how="early import")
    assert {found["kind"] for found in stock} == {"DeepSpeedEngine"}
    disabled = ds_config(grass={"enabled": False})
    runs = [(ds_config(), "initialize"), (disabled, "initialize"), (ds_config(), "enable"), (disabled, "enable")]
    for ranks in (stock, *(two_ranks.run(kinds, config=config, how=how) for config, how in runs)):
        for found, reference in zip(ranks, stock, strict=True):
            assert found["wrapper"] == "DeepSpeedZeroOptimizer"
            assert found["is a DeepSpeedEngine"] and found["restored"] and not found["grass"]
            assert found["losses"] == reference["losses"]


@pytest.mark.dist
@pytest.mark.parametrize("how", ["initialize", "enable"])
def test_an_engine_that_cannot_be_built_leaves_nothing_bound(two_ranks: Any, how: str) -> None:
    for found in two_ranks.run(kinds, config=ds_config(grass=grass_block()), how=how, break_it=True):
        assert found["error"] and found["restored"]


def evaluated(config: dict[str, Any], how: str) -> dict[str, Any]:
    """The loss of an engine without an optimizer, as front-ends build one for a reference model or an evaluation."""
    with grass_ds.enable() if how == "enable" else nullcontext():
        engine, *_ = (deepspeed if how == "enable" else grass_ds).initialize(model=tiny_llama(), config=config)
    engine.eval()
    with torch.no_grad():
        ids = batch(0, 0, engine.global_rank)
        loss = engine(input_ids=ids, labels=ids).loss.item()
    wrapper = type(engine.optimizer).__name__
    engine.destroy()
    return {"loss": loss, "wrapper": wrapper, "grass": getattr(engine, "grass", None)}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "how"), tiered([(0, "enable"), (3, "enable"), (3, "initialize")], (0, "enable"), (3, "enable"))
)
def test_an_engine_without_an_optimizer_is_stock(two_ranks: Any, stage: int, how: str) -> None:
    """For a reference model TRL copies the training config without its optimizer, with stage 0 instead of 1 or 2."""
    config = ds_config(stage=stage)
    del config["optimizer"]
    with_block = two_ranks.run(evaluated, config={**config, "grass": grass_block()}, how=how)
    assert with_block == two_ranks.run(evaluated, config=config, how=how)
    assert [found["grass"] for found in with_block] == [None, None]
