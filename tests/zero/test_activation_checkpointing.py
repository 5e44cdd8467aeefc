# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: every active layer trains as without it, and backward goes no deeper than it must.

Matrix products are counted where torch dispatches them. A Llama block has seven linear layers; attention itself is no
``mm``.
"""

from functools import partial, wraps
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, backward, cyclic, ds_config, engine_of, loss_of, snapshot, tiny_llama, train
from helpers.observed import difference, logged
from helpers.tiered import tiered
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grass_ds.zero.activation_checkpointing import fit_input_gradients, inputs_require_gradients, is_reentrant

dist = pytest.mark.dist

LINEAR = 7  # q, k, v, o, gate, up, down
MODES = {"none": None, "reentrant": True, "non-reentrant": False}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def checkpointed(mode: str) -> nn.Module:
    """A Llama as transformers 5 sets it up, with a hook on the embeddings; transformers 4 leaves that to the user."""
    model = tiny_llama()
    model.train()
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": MODES[mode]})
        if not inputs_require_gradients(model):
            model.enable_input_require_grads()
        assert inputs_require_gradients(model)
    return model


# ---- same training --------------------------------------------------------------------------------------------------


def train_through_all_layers(config: dict[str, Any], mode: str) -> dict[str, Any]:
    """Visit every layer; weights after each step, and the gradients of the first."""
    from deepspeed.utils import safe_get_full_grad

    model, weights = checkpointed(mode), {}
    with engine_of(config, model) as engine:
        backward(engine, 0)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        engine.step()
        train(engine, LAYERS - 1, start=1, after_step=lambda step: weights.update({step: snapshot(model)}))
        assert engine.grass.visits == (1,) * LAYERS
    start = dict(tiny_llama().named_parameters())
    moved = {name for name, weight in weights[LAYERS - 1].items() if not torch.equal(weight, start[name])}
    return {"weights": weights, "gradients": gradients, "moved": moved}


@dist
@pytest.mark.parametrize(
    ("stage", "order", "always"),
    tiered(
        [
            (2, "descending", ["norm"]),
            (1, "ascending", ["norm"]),
            (2, "ascending", []),
            (2, "descending", ["embed", "norm"]),
        ],
        (1, "ascending", ["norm"]),
        (2, "descending", ["embed", "norm"]),
    ),
)
def test_trains_every_layer_as_without_checkpointing(
    two_ranks: Any, stage: int, order: str, always: list[str]
) -> None:
    config = ds_config(stage=stage, grass={**cyclic(always_active=always), "cyclic_order": order})
    plain = two_ranks.run(train_through_all_layers, config=config, mode="none")
    expected = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    blocks = {name for name in plain[0]["weights"][1] if "layers" in name}
    assert plain[0]["moved"] == blocks | {expected[kind] for kind in always}
    for mode in ("reentrant", "non-reentrant"):
        ours = two_ranks.run(train_through_all_layers, config=config, mode=mode)
        assert difference(plain, ours) is None, mode


# ---- how deep backward goes -----------------------------------------------------------------------------------------


def count_products(config: dict[str, Any], mode: str) -> list[int]:
    """Matrix products of backward when layer 0, 1, ... is active."""
    model, counts = checkpointed(mode), []
    with engine_of(config, model) as engine:
        for layer in range(LAYERS):
            assert engine.grass.active_layers == (layer,)
            loss = loss_of(engine, layer)
            with Products() as products:
                engine.backward(loss)
            counts.append(products.count)
            engine.step()
    return counts


def backward_products(layer: int) -> int:
    """One per linear layer from the head down to the active layer, and one per weight of that layer."""
    return 1 + (LAYERS - layer) * LINEAR + LINEAR


def products(pool: Any, mode: str, always: list[str]) -> list[int]:
    counts = pool.run(count_products, config=ds_config(grass=cyclic(always_active=always)), mode=mode)
    assert all(count == counts[0] for count in counts)
    return counts[0]


@dist
def test_backward_stops_at_the_lowest_active_layer(two_ranks: Any) -> None:
    assert products(two_ranks, "none", ["norm"]) == [backward_products(layer) for layer in range(LAYERS)]


@dist
def test_non_reentrant_checkpointing_recomputes_nothing_below_the_lowest_active_layer(two_ranks: Any) -> None:
    counts = products(two_ranks, "non-reentrant", ["norm"])
    for layer, count in enumerate(counts):
        recomputed = count - backward_products(layer)
        # every block from the top down to the active one, less the last product of each, whose result nobody needs
        assert (LAYERS - layer) * (LINEAR - 1) <= recomputed <= (LAYERS - layer) * LINEAR
    reentrant = products(two_ranks, "reentrant", ["norm"])
    full = 1 + 2 * LAYERS * LINEAR + LINEAR  # recompute all, pass on through all, one layer's weights
    assert reentrant == [full] * LAYERS  # whichever layer is active
    assert counts[-1] < 0.4 * full


@dist
def test_active_embeddings_make_backward_go_all_the_way(two_ranks: Any) -> None:
    full = 1 + LAYERS * LINEAR + LINEAR
    assert products(two_ranks, "none", ["norm", "embed"]) == [full] * LAYERS


# ---- reentrant or not ------------------------------------------------------------------------------------------------


def wrapped(function: Any) -> Any:
    """As LLaMA-Factory 0.9.5 does it: the input of a layer that trains requires a gradient, others are called plainly."""

    @wraps(function, assigned=("__doc__",))
    def custom(layer: Any, *args: Any, **kwargs: Any) -> Any:
        module = layer.func.__self__ if isinstance(layer, partial) else layer.__self__
        if not any(param.requires_grad for param in module.parameters()):
            return layer(*args, **kwargs)
        args[0].requires_grad_(True)
        return function(layer, *args, **kwargs)

    return custom


def overridden(function: Any, use_reentrant: bool) -> Any:
    """As ms-swift 4.6 replaces torch's function."""

    @wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, "use_reentrant": use_reentrant})

    return replaced


def test_reentrant_is_what_gives_a_layer_no_gradient() -> None:
    reentrant, other = (partial(checkpoint, use_reentrant=mode) for mode in (True, False))
    state = torch.get_rng_state()
    assert is_reentrant(reentrant) and not is_reentrant(other)
    assert not is_reentrant(wrapped(reentrant)) and not is_reentrant(wrapped(other))
    assert is_reentrant(partial(overridden(checkpoint, True), use_reentrant=False))
    assert not is_reentrant(partial(overridden(checkpoint, False), use_reentrant=True))
    assert is_reentrant(None)
    with torch.no_grad():
        assert is_reentrant(reentrant) and not is_reentrant(other)
    assert torch.equal(torch.get_rng_state(), state)


def said(mode: str, always: list[str]) -> list[str]:
    with logged("activation checkpointing is reentrant") as messages:
        with engine_of(ds_config(grass=cyclic(always_active=always)), checkpointed(mode)) as engine:
            train(engine, 2)
        return messages


@dist
def test_reentrant_checkpointing_is_said_once_with_its_remedy(two_ranks: Any) -> None:
    """Unless the embeddings train, below which nothing can be saved. What it says is measured above."""
    first, second = two_ranks.run(said, mode="reentrant", always=["norm"])
    assert second == [] and len(first) == 1
    assert "gradient_checkpointing_kwargs={'use_reentrant': False}" in first[0]
    for mode, always in (("non-reentrant", ["norm"]), ("none", ["norm"]), ("reentrant", ["norm", "embed"])):
        assert two_ranks.run(said, mode=mode, always=always) == [[], []]


# ---- the hook on the embeddings -------------------------------------------------------------------------------------


def is_hooked(model: nn.Module) -> bool:
    output = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))
    return output.requires_grad


@pytest.mark.parametrize(
    ("mode", "embeddings_train", "hooked"),
    [
        ("reentrant", False, True),
        ("non-reentrant", False, False),
        ("non-reentrant", True, True),
        ("reentrant", True, True),
    ],
)
def test_hook_that_huggingface_installed(mode: str, embeddings_train: bool, hooked: bool) -> None:
    model = checkpointed(mode)
    model.requires_grad_(False)
    fit_input_gradients(model, embeddings_train)
    assert is_hooked(model) == hooked


def test_reentrant_checkpointing_without_the_hook_gets_it() -> None:
    model = checkpointed("reentrant")
    model.requires_grad_(False)
    model.disable_input_require_grads()
    assert not is_hooked(model)
    fit_input_gradients(model, embeddings_train=False)
    assert is_hooked(model)


def test_a_hook_without_checkpointing_is_the_users_own() -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    fit_input_gradients(model, embeddings_train=False)
    assert is_hooked(model)


def test_models_without_the_convention_are_left_alone() -> None:
    fit_input_gradients(nn.Sequential(nn.Linear(2, 2)), embeddings_train=False)


def test_a_wrapper_that_needs_no_hook_gets_none() -> None:
    model = tiny_llama()
    model.train()
    model._set_gradient_checkpointing(True, wrapped(partial(checkpoint, use_reentrant=True)))
    model.enable_input_require_grads()
    model.requires_grad_(False)
    fit_input_gradients(model, embeddings_train=False)
    assert not is_hooked(model)
