# SPDX-License-Identifier: Apache-2.0
"""Sampler ``ist``: the adapters of the drawn layers move and nothing else does; importance is learned by the formula."""

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import batch, ds_config, engine_of, grass_block, layer_of, snapshot, tiny_llama, train
from helpers.observed import logged
from helpers.reference import Reference
from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.sampling.ist_sampler import IstSampler
from grass_ds.validation import check_ds_config, check_model

dist = pytest.mark.dist
LAYERS, REFRESH, LR = 4, 3, 1e-2
BLOCK = grass_block(sampler="ist", num_active_layers=2, sample_period=1, refresh_period=REFRESH)


def adapted(seed: int = 0, **targets: Any) -> nn.Module:
    """A small Llama with LoRA adapters, whose B are not zero: suppression would change nothing before."""
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(layers=LAYERS, seed=seed)
    targets = {"target_modules": "all-linear", **targets}
    config = LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.05)
    return model


def config_of(stage: int = 2, **settings: Any) -> dict[str, Any]:
    return ds_config(stage=stage, lr=LR, grass=BLOCK, **settings)


def engine_for(config: dict[str, Any], model: nn.Module) -> Any:
    return engine_of(config, model, model_parameters=[param for param in model.parameters() if param.requires_grad])


# ---- who moves ------------------------------------------------------------------------------------------------------


def follow(config: dict[str, Any]) -> dict[str, Any]:
    """Per step: whose parameters moved; adapters of active layers must have the bits of torch's AdamW."""
    from deepspeed.utils import safe_get_full_grad

    model, moved = adapted(), []
    with engine_for(config, model) as engine:
        named = {name: param for name, param in model.named_parameters() if "lora_" in name}
        reference = Reference(model, lambda name: {"lr": LR, "weight_decay": 0.1})
        for step in range(2 * REFRESH + 2):
            before, active = snapshot(model), engine.grass.active_layers
            for micro in range(engine.gradient_accumulation_steps()):
                if micro:
                    engine.step()
                ids = batch(step, micro, engine.global_rank)
                engine.backward(engine(input_ids=ids, labels=ids).loss)
            names = [name for name in named if layer_of(name) in active]
            gradients = {name: safe_get_full_grad(named[name]).clone() for name in names}
            engine.step()
            after = snapshot(model)
            assert {name for name in after if not torch.equal(after[name], before[name])} == set(names)
            reference.step(gradients)
            for name in names:
                master = reference.masters[name].detach()
                assert torch.equal(after[name], master.to(after[name].dtype)), f"{name}, step {step}"
            assert all(param.grad is None for param in model.parameters())
            moved.append((active, engine.grass.scores))
        assert engine.grass.visits == tuple(sum(layer in active for active, _ in moved) for layer in range(LAYERS))
        assert all(module.training for module in model.modules())
        assert {m.scaling["default"] for m in model.modules() if hasattr(m, "scale_layer")} == {2.0}
    return {"moved": moved}


@dist
@pytest.mark.parametrize(
    ("stage", "settings"),
    [(2, {"dtype": "bf16"}), (1, {"gas": 2}), pytest.param(2, {"gas": 2}, marks=pytest.mark.all)],
)
def test_exactly_the_adapters_of_the_drawn_layers_move(two_ranks: Any, stage: int, settings: dict[str, Any]) -> None:
    ranks = two_ranks.run(follow, config=config_of(stage, **settings))
    assert ranks[0] == ranks[1]
    active = [layers for layers, _ in ranks[0]["moved"]]
    assert all(len(layers) == 2 for layers in active) and len(set(active)) > 2
    scores = [scores for _, scores in ranks[0]["moved"]]
    assert scores[: REFRESH - 1] == [(0.0,) * LAYERS] * (REFRESH - 1)
    assert scores[REFRESH - 1] != scores[REFRESH - 2] and len(set(scores)) == 3  # two updates


# ---- what it learns -------------------------------------------------------------------------------------------------


def learn_beside(config: dict[str, Any]) -> list[tuple[list[Any], list[float], list[float]]]:
    """Per update: the sets, the losses that the engine measured, and those of a plain copy of the model."""
    model, updates = adapted(), []
    learn = IstSampler.learn

    def beside(sampler: IstSampler, trials: Any, losses: Any) -> None:
        plain, expected = adapted(), []
        plain.load_state_dict(model.state_dict())
        plain.eval()
        for layers in trials:
            for name, module in plain.named_modules():
                if hasattr(module, "scale_layer"):
                    module.scaling["default"] = 0.5 if layer_of(name) in layers else 2.0
            with torch.no_grad():
                both = [batch(engine.global_steps - 1, 1, rank) for rank in range(2)]
                expected.append(sum(float(plain(input_ids=ids, labels=ids).loss) for ids in both) / 2)
        updates.append((trials, list(losses), expected))
        learn(sampler, trials, losses)

    with engine_for(config, model) as engine, mock.patch.object(IstSampler, "learn", beside):
        train(engine, 2 * REFRESH)
    return updates


@dist
def test_a_trial_weakens_the_adapters_of_its_layers_on_the_last_micro_batch_of_every_rank(two_ranks: Any) -> None:
    """Against a plain model whose scaling is set by hand: a quarter of alpha / r = 2 in the layers of the set."""
    one, other = two_ranks.run(learn_beside, config=config_of(gas=2))
    assert one == other and len(one) == 2
    for trials, losses, expected in one:
        assert [len(layers) for layers in trials] == [LAYERS // 2] * 3
        assert losses == pytest.approx(expected, rel=1e-6)  # float32 losses, in another order of additions at most
        assert len(set(losses)) == len(set(trials))


# ---- resume ---------------------------------------------------------------------------------------------------------


def resume(config: dict[str, Any], folder: Path, saved: int, steps: int) -> Any:
    model = adapted()
    with engine_for(config, model) as engine:
        train(engine, saved)
        engine.save_checkpoint(str(folder))
        train(engine, steps, start=saved)
        whole = snapshot(model), engine.grass.scores, engine.grass.active_layers
    model = adapted(seed=1)
    model.load_state_dict(adapted().state_dict())
    with engine_for({**config, "grass": {**config["grass"], "seed": 8}}, model) as engine:
        engine.load_checkpoint(str(folder))
        train(engine, steps, start=saved)
        assert (engine.grass.scores, engine.grass.active_layers) == whole[1:]
        after = snapshot(model)
    return [name for name in after if not torch.equal(after[name], whole[0][name])], whole[1]


@dist
@pytest.mark.parametrize("saved", [REFRESH - 1, REFRESH])
def test_a_resumed_run_goes_on_by_the_bit(two_ranks: Any, tmp_path: Path, saved: int) -> None:
    run = partial(two_ranks.run, resume, config=config_of(dtype="bf16"), folder=tmp_path, saved=saved)
    for differing, scores in run(steps=REFRESH + 1):
        assert differing == [] and any(scores)


def frozen_adapters() -> nn.Module:
    return adapted().requires_grad_(False)


def thawed() -> nn.Module:
    """A weight of the model trains beside the adapters."""
    model = adapted()
    model.get_submodule("base_model.model.model.layers.2.mlp.up_proj.base_layer").requires_grad_(True)
    return model


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "block", "message"),
    [
        (
            tiny_llama,
            BLOCK,
            r'grass.sampler = "ist" weakens LoRA adapters, and model.layers.0 has none: wrap the model',
        ),
        (
            partial(adapted, target_modules=["q_proj"], layers_to_transform=[1, 2]),
            BLOCK,
            r"and base_model.model.model.layers.0 has none: wrap the model",
        ),
        (frozen_adapters, BLOCK, r"the adapters of base_model.model.model.layers.0 are frozen; load them by"),
        (
            thawed,
            BLOCK,
            r"trains adapters alone, but base_model.model.model.layers.2.*base_layer.weight requires a gradient",
        ),
        (
            partial(adapted, modules_to_save=["lm_head"]),
            BLOCK,
            r"lm_head.modules_to_save.default.weight requires a gradient, but .* add 'head' to grass.always_active",
        ),
        (
            adapted,
            grass_block(sampler="uniform"),
            r'grass.sampler = \'uniform\' trains full weights.*"sampler": "ist"',
        ),
    ],
)
def test_a_model_that_does_not_go_with_the_sampler_is_refused(model: Any, block: Any, message: str) -> None:
    with pytest.raises(GrassConfigError, match=message):
        check_model(model(), GrassConfig(**block))


def test_zero3_is_refused() -> None:
    with pytest.raises(GrassConfigError, match=r"stage = 3: grass.sampler = 'ist' trains adapters.*stages 1 and 2"):
        check_ds_config(config_of(3), GrassConfig(**BLOCK))


def without_labels(config: dict[str, Any]) -> str:
    model = adapted()
    with engine_for(config, model) as engine:
        with pytest.raises(ValueError, match="pass the labels to the model") as raised:
            engine(input_ids=batch(0, 0, 0))
        with torch.no_grad():
            engine(input_ids=batch(0, 0, 0))  # an evaluation may do without
        return str(raised.value)


def broken_loss(config: dict[str, Any]) -> tuple[str, bool]:
    model = adapted()
    with engine_for(config, model) as engine:
        train(engine, REFRESH - 1)
        before = engine.grass.scores
        broken = mock.patch.object(type(engine._suppression), "_loss", return_value=math.inf)
        with broken, pytest.raises(ValueError, match="not all are finite") as raised:
            train(engine, 1, start=REFRESH)
        return str(raised.value), engine.grass.scores == before


def without_tokens(config: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The scores if the last micro-batch has no token to learn on rank 0, and if on no rank; and what is logged."""
    seen = []
    for alone in (True, False):
        model = adapted()
        with (
            engine_for(config, model) as engine,
            logged("of every rank's last micro-batch is not a number") as messages,
        ):
            train(engine, REFRESH - 1)
            for micro in range(2):
                ids = batch(REFRESH, micro, engine.global_rank)
                empty = micro == 1 and (engine.global_rank == 0 or not alone)
                labels = torch.full_like(ids, -100) if empty else ids
                # A mean over no token is not a number, and its gradient neither: a Trainer divides a sum instead.
                loss = engine(input_ids=ids, labels=labels, num_items_in_batch=ids.numel()).loss
                engine.backward(loss)
                engine.step()
            seen.append((engine.grass.scores, len(messages)))
    return seen


@dist
def test_a_model_that_computes_no_loss_and_a_broken_loss_are_errors(one_rank: Any) -> None:
    assert "engine(input_ids=ids, labels=labels)" in one_rank.run(without_labels, config=config_of())[0]
    message, kept = one_rank.run(broken_loss, config=config_of())[0]
    assert "losses [inf, inf, inf]" in message and kept


@dist
def test_a_micro_batch_without_a_token_to_learn_does_not_count(two_ranks: Any) -> None:
    ranks = two_ranks.run(without_tokens, config=config_of(gas=2))
    for (one, quiet), (none, _) in ranks:
        assert one == ranks[0][0][0] and any(one) and all(map(math.isfinite, one))
        assert quiet == 0 and none == (0.0,) * LAYERS
    assert [warned for _, (_, warned) in ranks] == [1, 0]
