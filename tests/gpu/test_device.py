# SPDX-License-Identifier: Apache-2.0
"""What only an accelerator with its own memory and streams shows. Written without one at hand: not run yet."""

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 14


def weights_after(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    with engine_of(config, tiny_llama(hidden=256)) as engine:
        train(engine, STEPS)
        get_accelerator().synchronize()
        return {name: weight.cpu() for name, weight in snapshot(engine.module).items()}


def test_side_stream_changes_no_bit(one_gpu: Any) -> None:
    """A missing wait between the compute and the reduction stream would show in the weights."""
    results = []
    for overlap in (False, True):
        config = ds_config(dtype="bf16", clip=1.0, grass=grass_block(), zero_optimization={"overlap_comm": overlap})
        results.append(one_gpu.run(weights_after, config=config)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_host_states_change_no_bit(one_gpu: Any) -> None:
    """Pinned copies to and from the host, against states that stay on the device."""
    results = []
    for device in ("none", "cpu"):
        config = ds_config(dtype="bf16", grass=grass_block(offload={"device": device}))
        results.append(one_gpu.run(weights_after, config=config)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def resident_bytes(offload: str) -> dict[str, int]:
    accelerator = get_accelerator()
    accelerator.empty_cache()
    start = accelerator.memory_allocated()
    config = ds_config(dtype="bf16", grass=grass_block(offload={"device": offload}))
    with engine_of(config, tiny_llama(hidden=512)) as engine:
        train(engine, STEPS)
        accelerator.synchronize()
        store = engine.optimizer.store
        pinned = all(store[unit].master.is_pinned() for unit in engine.optimizer.units if unit in store)
        return {
            "between_steps": accelerator.memory_allocated() - start,
            "weights": engine.grass.memory()["weights"]["device"],
            "state": engine.grass.memory()["optimizer_state"]["device"],
            "pinned": pinned,
        }


def test_device_holds_no_state_between_steps(one_gpu: Any) -> None:
    """With host offload nothing but weights stays; without, the states of all layers ever stepped do."""
    slack = 4 << 20
    offloaded = one_gpu.run(resident_bytes, offload="cpu")[0]
    assert offloaded["pinned"]
    assert offloaded["state"] == 0
    assert offloaded["between_steps"] <= offloaded["weights"] + slack
    kept = one_gpu.run(resident_bytes, offload="none")[0]
    assert abs(kept["between_steps"] - kept["weights"] - kept["state"]) <= slack
