# SPDX-License-Identifier: Apache-2.0
"""Sampler ``outlier``: the ratios of one process on all batches, whatever the stage; probing moves and keeps nothing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import (
    LAYERS,
    RELEASED,
    VOCAB,
    batch,
    ds_config,
    engine_of,
    grass_block,
    loss_of,
    snapshot,
    tiny_llama,
    train,
)
from helpers.observed import difference
from helpers.tiered import tiered
from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.core.agreement import RankDivergenceError
from grass_ds.validation import check_model
from grass_ds.zero.outliers import linear_modules, outlier_ratio

dist = pytest.mark.dist
PROBE, PERIOD, THRESHOLD = 3, 2, 5.0


def block(**settings: Any) -> dict[str, Any]:
    ours = {"sampler": "outlier", "probe_steps": PROBE, "sample_period": PERIOD, "outlier_threshold": THRESHOLD}
    return grass_block(**{**ours, **settings})


def config_of(stage: int, **settings: Any) -> dict[str, Any]:
    """In ZeRO-3 weights are released between steps, or none had to be gathered."""
    return ds_config(stage=stage, grass=block(), zero_optimization=RELEASED if stage == 3 else {}, **settings)


# ---- the formula ----------------------------------------------------------------------------------------------------


def check_outlier_mean(mask: np.ndarray, threshold: float) -> float:
    """OWL's function of this name (luuyin/OWL, lib/prune_all.py), in numpy."""
    max_shred = mask.mean() * threshold
    count = (mask > max_shred).sum()
    return float(count) / mask.size * 100


def bounds(matrices: list[tuple[np.ndarray, np.ndarray]], threshold: float) -> tuple[float, float]:
    """D_l of weights [out, in] and squared norms [in], float64, as far as float32 can tell a number from the bound."""
    metrics = np.concatenate([(np.abs(w) * np.sqrt(s.reshape(1, -1))).ravel() for w, s in matrices])
    return check_outlier_mean(metrics, threshold * (1 + 1e-5)), check_outlier_mean(metrics, threshold * (1 - 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.5, 2.0, 5.0])
def test_the_ratio_is_that_of_owl_over_all_matrices_of_the_layer(dtype: torch.dtype, threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for out, features in ((7, 5), (3, 40), (64, 11)):
        weight = (out * torch.randn(out, features, generator=generator)).to(dtype)
        matrices.append((weight, torch.rand(features, generator=generator) ** 8))
    low, high = bounds([(w.double().numpy(), s.double().numpy()) for w, s in matrices], threshold)
    ratio = outlier_ratio(matrices, threshold)
    assert low <= ratio <= high
    assert 0 < high < 100
    apart = [outlier_ratio([matrix], threshold) for matrix in matrices]
    assert all(abs(ratio - each) > 0.1 for each in apart)  # one mean for all matrices, not one for each


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_not_finite_give_nan(broken: float) -> None:
    weight, squares = torch.ones(2, 3), torch.ones(3)
    weight[0, 0] = broken
    assert math.isnan(outlier_ratio([(weight, squares)], 1.0))
    assert math.isnan(outlier_ratio([(torch.ones(2, 3), torch.full((3,), broken))], 1.0))


# ---- which modules --------------------------------------------------------------------------------------------------


def tiny_gpt2() -> nn.Module:
    """Its linear modules are transformers' Conv1D, whose weight is [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def test_linear_modules_of_llama_and_gpt2() -> None:
    names = [f"model.layers.{layer}" for layer in range(LAYERS)]
    found = linear_modules(tiny_llama(), names)
    assert [len(modules) for modules in found] == [7] * LAYERS  # q, k, v, o, gate, up, down
    assert all(name.startswith(f"{layer}.") for layer, modules in zip(names, found, strict=True) for name in modules)
    found = linear_modules(tiny_gpt2(), ["transformer.h.0"])
    assert [*found[0]] == [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


class Experts(nn.Module):
    """Fused, as in transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 64))
        self.router = nn.Linear(32, 4)


def refusal(model: nn.Module, **settings: Any) -> str:
    with pytest.raises(GrassConfigError) as caught:
        check_model(model, GrassConfig(**block(**settings)))
    return str(caught.value)


def test_a_layer_whose_weights_are_mostly_elsewhere_is_refused_by_name() -> None:
    model = tiny_llama()
    model.model.layers[2].mlp = Experts()
    for layer in (0, 1, 3):
        assert linear_modules(model, [f"model.layers.{layer}"])
    message = refusal(model)
    assert "in model.layers.2 they hold" in message and '"sampler": "uniform"' in message
    check_model(model, GrassConfig(**block(num_active_layers=LAYERS)))  # all layers train: nothing is measured
    check_model(model, GrassConfig(**block(sampler="static")))


def test_a_compiled_model_is_refused() -> None:
    whole, part = tiny_llama(), tiny_llama()
    whole.compile(backend="eager")
    part.model.layers[1].compile(backend="eager")
    wrapped = torch.compile(tiny_llama(), backend="eager")
    for model in (whole, part, wrapped):
        assert "without torch.compile" in refusal(model)


# ---- what is measured -----------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
FINAL_NORM = ("model.norm.", "transformer.ln_f.")


def with_outliers(name: str) -> nn.Module:
    """Some input features of each layer have large weights, of every further layer more."""
    model = MODELS[name]()
    blocks = model.model.layers if name == "llama" else model.transformer.h
    for number, layer in enumerate(blocks):
        linear = layer.mlp.up_proj if name == "llama" else layer.mlp.c_fc
        weight = linear.weight.data if name == "llama" else linear.weight.data.t()
        weight[:, : 2 * (number + 1)] *= 15
    return model


def expected_ratios(name: str, gas: int, world: int) -> list[tuple[float, float]]:
    """Bounds of D_l of one process that reads all ranks' batches of the probing steps, squares in float64."""
    model = with_outliers(name)
    blocks = model.model.layers if name == "llama" else model.transformer.h
    kinds = (nn.Linear,) if name == "llama" else (type(blocks[0].mlp.c_fc),)
    linear = [[m for m in layer.modules() if isinstance(m, kinds)] for layer in blocks]
    squares: dict[nn.Module, np.ndarray] = {}

    def add(module: nn.Module, inputs: Any, _: Any) -> None:
        x = inputs[0].detach().double().numpy()
        squares[module] = squares.get(module, 0.0) + np.square(x.reshape(-1, x.shape[-1])).sum(axis=0)

    for layer in linear:
        for module in layer:
            module.register_forward_hook(add)
    for step in range(PROBE):
        for micro in range(gas):
            for rank in range(world):
                model(input_ids=batch(step, micro, rank))
    matrices = [[(m.weight.detach().double().numpy(), squares[m]) for m in layer] for layer in linear]
    if name == "gpt2":
        matrices = [[(weight.T, norms) for weight, norms in layer] for layer in matrices]
    return [bounds(layer, THRESHOLD) for layer in matrices]


def evaluate(engine: Any) -> None:
    """By the engine, and past it."""
    with torch.no_grad():
        loss_of(engine, 501)
        engine.module(input_ids=batch(502, 0, engine.global_rank))


def discard(engine: Any) -> None:
    """A step without gradients, and the first micro-batch of the coming step."""
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(loss_of(engine, 503, micro))
        if engine.is_gradient_accumulation_boundary():
            engine.zero_grad()
        engine.step()
    engine.backward(loss_of(engine, 504))
    engine.zero_grad()


def overflow(engine: Any) -> None:
    """A step whose gradients are not finite on one rank."""
    broken = engine.global_rank == engine.dp_world_size - 1
    trained = [p for p in engine.module.parameters() if p.requires_grad and broken]
    hooks = [p.register_hook(lambda gradient: torch.full_like(gradient, math.inf)) for p in trained]
    train(engine, 1, start=505)
    for hook in hooks:
        hook.remove()


DISTURBANCES = (evaluate, discard, overflow)  # one before each probing step; none may count


def probe(config: dict[str, Any], name: str, checkpointing: bool | None, disturbed: bool) -> dict[str, Any]:
    """Probe, then train over two draws; what must hold is asserted here. The ratios and the input norms."""
    model = with_outliers(name).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with engine_of(config, model) as engine:
        gas, squares = engine.gradient_accumulation_steps(), None
        weights = snapshot(model)
        top = {n for n, _ in model.named_parameters() if f".{LAYERS - 1}." in n or n.startswith(FINAL_NORM)}
        for step in range(PROBE):
            assert (engine.grass.phase, engine.grass.active_layers) == ("probe", tuple(range(LAYERS)))
            assert {n for n, p in model.named_parameters() if p.requires_grad} == top
            if disturbed:
                DISTURBANCES[step](engine)
            squares = engine.grass.state_dict()["input_squares"]
            assert (squares.count_nonzero() == 0) == (step == 0)
            train(engine, 1, start=step)
            assert difference(weights, snapshot(model)) is None
            assert engine.grass.memory()["gradients"] == {"device": 0, "host": 0}
            assert engine.grass.memory()["optimizer_state"] == {"device": 0, "host": 0}
            assert (engine.grass.phase == "probe") == (engine.grass.scores is None) == (step < PROBE - 1)
        scores = engine.grass.scores
        assert engine.grass.state_dict()["input_squares"] is None
        assert sum(engine.grass.probabilities) == pytest.approx(1)
        for step in range(2 * PERIOD):
            before, active = snapshot(model), set(engine.grass.active_layers)
            train(engine, 1, start=PROBE + step)
            moved = {n for n, weight in snapshot(model).items() if not torch.equal(weight, before[n])}
            layers = {int(n.split(".")[2]) for n in moved if ".h." in n or ".layers." in n}
            assert layers == active and len(active) == 1
            assert engine.grass.scores == scores  # fixed for the whole run
        assert engine.grass.probabilities == pytest.approx([each / sum(scores) for each in scores], rel=1e-12)
        world = engine.dp_world_size
    return {"scores": scores, "squares": squares, "bounds": expected_ratios(name, gas, world)}


@dist
@pytest.mark.parametrize(
    ("stage", "gas", "dtype", "name"),
    tiered(
        [(2, 2, "fp32", "llama"), (3, 1, "fp32", "llama"), (1, 2, "fp32", "llama"), (3, 1, "fp32", "gpt2")],
        (2, 2, "fp32", "llama"),
        (3, 1, "fp32", "gpt2"),
    ),
)
def test_ratios_are_those_of_one_process_and_probing_moves_nothing(
    two_ranks: Any, stage: int, gas: int, dtype: str, name: str
) -> None:
    config = config_of(stage, gas=gas, dtype=dtype)
    for result in two_ranks.run(probe, config=config, name=name, checkpointing=None, disturbed=True):
        for score, (low, high) in zip(result["scores"], result["bounds"], strict=True):
            assert low <= score <= high
            assert high - low < 0.05  # or nothing would be compared
        assert min(result["scores"]) > 0 and len(set(result["scores"])) == LAYERS


@dist
@pytest.mark.parametrize(
    ("stage", "checkpointing"), tiered([(2, True), (2, False), (3, True), (3, False)], (2, True), (3, False))
)
def test_neither_recomputation_nor_passes_that_do_not_count_change_a_bit(
    two_ranks: Any, stage: int, checkpointing: bool
) -> None:
    config = config_of(stage)
    plain = two_ranks.run(probe, config=config, name="llama", checkpointing=None, disturbed=False)
    other = two_ranks.run(probe, config=config, name="llama", checkpointing=checkpointing, disturbed=True)
    assert difference(plain, other) is None
    assert difference(plain[0], plain[1]) is None  # equal on all ranks
    assert plain[0]["squares"].count_nonzero() == plain[0]["squares"].numel()


def never_above(config: dict[str, Any]) -> str:
    with engine_of(config) as engine, pytest.raises(ValueError, match="no layer has an outlier") as caught:
        train(engine, PROBE)
    return str(caught.value)


@dist
def test_a_threshold_that_nothing_reaches_ends_the_probing_on_all_ranks(two_ranks: Any) -> None:
    for message in two_ranks.run(never_above, config=ds_config(grass=block(outlier_threshold=1e4))):
        assert "grass.outlier_threshold = 10000 times" in message


def diverge(config: dict[str, Any]) -> str:
    """Other input norms on one rank."""
    with engine_of(config, with_outliers("llama")) as engine:
        train(engine, PROBE - 1)
        if engine.global_rank == 1:
            engine.optimizer.outliers._total[::3] *= 100
        with pytest.raises(RankDivergenceError) as caught:
            train(engine, 1, start=PROBE - 1)
    return str(caught.value)


@dist
def test_ranks_that_measure_other_ratios_stop(two_ranks: Any) -> None:
    for message in two_ranks.run(diverge, config=config_of(2)):
        assert "the layers to train next" in message and "scores" in message


def compile_early(config: dict[str, Any]) -> str:
    """Refused while probing. The hooks are gone after it, and when the engine is destroyed in the middle of it."""
    for steps in (PROBE, 1):
        model = with_outliers("llama")
        hooked = [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]  # all but the head
        with engine_of(config, model) as engine:
            with pytest.raises(ValueError, match="while outliers are measured") as caught:
                engine.compile(backend="eager")
            assert all(module._forward_pre_hooks for module in hooked)
            train(engine, steps)
            assert all(bool(m._forward_pre_hooks) == (steps < PROBE) for m in hooked)
        assert not any(module._forward_pre_hooks for module in hooked)
    return str(caught.value)


@dist
def test_compilation_waits_for_the_end_of_probing(two_ranks: Any) -> None:
    for message in two_ranks.run(compile_early, config=ds_config(grass=block())):
        assert 'engine.grass.phase is "train"' in message
