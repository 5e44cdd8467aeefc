# SPDX-License-Identifier: Apache-2.0
"""What only an accelerator with its own memory and streams shows. Written without one at hand: not run yet."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train

from grass_ds.offload.state_format import choose_format

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


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("expansion", [0.0, 0.1])
def test_side_stream_changes_no_bit(one_gpu: Any, stage: int, expansion: float) -> None:
    """A missing wait between the compute stream and those of the reductions and of ZeRO-3's gathers would show in the weights."""
    results = []
    for overlap in (False, True):
        zero = {"overlap_comm": overlap, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        block = grass_block(expansion=expansion)
        config = ds_config(stage=stage, dtype="bf16", clip=1.0, grass=block, zero_optimization=zero)
        results.append(one_gpu.run(weights_after, config=config)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("pin", "expansion"), [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_weights_in_host_memory_change_no_bit(one_gpu: Any, pin: bool, expansion: float) -> None:
    """ZeRO-3 with ``offload_param``: the step writes to host memory what the next forward gathers from there."""
    results = []
    for place in ({}, {"offload_param": {"device": "cpu", "pin_memory": pin}}):
        zero = {"overlap_comm": True, **place}
        config = ds_config(stage=3, dtype="bf16", grass=grass_block(expansion=expansion), zero_optimization=zero)
        results.append(one_gpu.run(weights_after, config=config)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


OFFLOADS: dict[str, dict[str, Any]] = {
    "cpu-stream": {"device": "cpu", "chunk_numel": 20_000},
    "cpu-stream-one-buffer": {"device": "cpu", "chunk_numel": 20_000, "device_buffers": 1, "prefetch": "step"},
    "cpu-stream-pageable": {"device": "cpu", "chunk_numel": 20_000, "pin_memory": False},
    "cpu-period": {"device": "cpu", "chunk_numel": 20_000, "residency": "period"},
    "nvme-stream": {"device": "nvme", "chunk_numel": 20_000, "host_buffers": 4},
    "nvme-period": {"device": "nvme", "chunk_numel": 20_000, "residency": "period"},
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", OFFLOADS)
def test_offloaded_states_change_no_bit(one_gpu: Any, case: str, stage: int, tmp_path: Path) -> None:
    """Copies on streams of their own, several chunks a layer, a switch every third step: a missing wait would show."""
    results = []
    for offload in ({"device": "none"}, OFFLOADS[case]):
        path = {"nvme_path": str(tmp_path)} if offload["device"] == "nvme" else {}
        config = ds_config(stage=stage, dtype="bf16", grass=grass_block(offload={**offload, **path}))
        results.append(one_gpu.run(weights_after, config=config)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def straight_and_resumed(config: dict[str, Any], folder: str) -> list[dict[str, torch.Tensor]]:
    """Weights at the end of a run that saves on the way, and of one that goes on from there."""
    ends = []
    with engine_of(config, tiny_llama(hidden=256)) as engine:
        train(engine, 7)
        engine.save_checkpoint(folder)
        train(engine, STEPS - 7, start=7)
        engine.wait_for_checkpoint()
        ends.append({name: weight.cpu() for name, weight in snapshot(engine.module).items()})
    with engine_of(config, tiny_llama(hidden=256, seed=9)) as engine:
        engine.load_checkpoint(folder)
        train(engine, STEPS - 7, start=7)
        ends.append({name: weight.cpu() for name, weight in snapshot(engine.module).items()})
    return ends


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_checkpoint_saved_in_the_background_is_that_of_its_step(
    one_gpu: Any, device: str, stage: int, tmp_path: Path
) -> None:
    """What is copied from the device must be complete before training goes on."""
    block = grass_block(offload={"device": device})
    config = ds_config(stage=stage, dtype="bf16", grass=block, checkpoint={"async": True})
    straight, resumed = one_gpu.run(straight_and_resumed, config=config, folder=str(tmp_path))[0]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


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
            "chunk_numel": store.chunk_numel,
        }


def test_the_device_holds_the_window_and_no_more(one_gpu: Any) -> None:
    """With host offload weights and two chunks stay between steps; without, the states of all layers ever stepped do."""
    slack = 4 << 20
    offloaded = one_gpu.run(resident_bytes, offload="cpu")[0]
    assert offloaded["pinned"]
    assert offloaded["state"] <= 2 * 12 * offloaded["chunk_numel"]
    assert offloaded["between_steps"] <= offloaded["weights"] + offloaded["state"] + slack
    kept = one_gpu.run(resident_bytes, offload="none")[0]
    assert abs(kept["between_steps"] - kept["weights"] - kept["state"]) <= slack


def trace_run(path: str) -> None:
    offload = {"device": "cpu", "chunk_numel": 200_000, "trace": path}
    with engine_of(ds_config(dtype="bf16", grass=grass_block(offload=offload)), tiny_llama(hidden=512)) as engine:
        train(engine, STEPS)


def test_loads_begin_before_the_step(one_gpu: Any, tmp_path: Path) -> None:
    """By device time: in every step after the first round, the first load starts while backward is still being issued."""
    one_gpu.run(trace_run, path=str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.rank0.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    times: dict[str, list[float]] = {name: [] for name in lanes.values()}
    for event in events:
        if event["ph"] == "X":
            times[lanes[event["tid"]]].append(event["ts"])
    assert times["load"] and times["store"]
    first = min(times["load"])
    for step in (start for start in times["step"] if start > first):
        before = [start for start in times["step"] if start < step]
        assert any(load < step and load > max(before, default=0.0) for load in times["load"])


@pytest.mark.parametrize(
    ("name", "dtype"), [("exact", torch.bfloat16), ("bf16", torch.float16), ("8bit", torch.bfloat16)]
)
def test_state_formats_give_the_bits_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """A state of many magnitudes down to below the smallest normal number, in a chunk behind 2^31 elements."""
    numel, generator = 2**20 + 1000, torch.Generator().manual_seed(0)
    noise = torch.randn(3, numel, generator=generator) * torch.exp(15 * torch.randn(3, numel, generator=generator))
    state = [noise[0].clamp(-6e4, 6e4), noise[1], noise[2].square()]
    form, stored, decoded = choose_format(name, ("exp_avg", "exp_avg_sq"), dtype), {}, {}
    for device in ("cpu", get_accelerator().current_device_name()):
        there = [tensor.to(device) for tensor in state]
        stored[device] = [torch.zeros(p.numel(numel), dtype=p.dtype, device=device) for p in form.planes]
        form.encode(there, stored[device], dtype, seed=0xFEDCBA9876543210, start=2**31 - 2**19)
        decoded[device] = [torch.empty_like(tensor) for tensor in there]
        form.decode(stored[device], there[0].to(dtype), False, decoded[device])
    for results in (stored, decoded):
        for here, there in zip(*results.values(), strict=True):
            assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
