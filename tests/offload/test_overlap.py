# SPDX-License-Identifier: Apache-2.0
"""Transfers hide behind backward.

Latency and backward are both made of sleep here, and the fastest of several steps counts, so that a busy machine does
not decide: all that it can do is to lengthen a step.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train

pytestmark = pytest.mark.dist

LAYERS, CHUNKS = 4, 4
BACKWARD, LATENCY = 0.6, 0.06  # seconds: of a backward pass, and of moving one chunk from or to the disk
MEASURED = 3


def slowly(open_io: Callable[..., Any]) -> Callable[..., Any]:
    """``open_io`` whose objects take ``LATENCY`` longer."""

    class Slow:
        def __init__(self, io: Any):
            self._io = io

        def read(self, file: Any, pieces: Sequence[Any]) -> None:
            time.sleep(LATENCY)
            self._io.read(file, pieces)

        def write(self, file: Any, pieces: Sequence[Any]) -> None:
            time.sleep(LATENCY)
            self._io.write(file, pieces)

        def close(self) -> None:
            self._io.close()

    return lambda *args, **kwargs: lambda: Slow(open_io(*args, **kwargs)())


def slow_backward(module: Any) -> None:
    """Backward rests above the blocks: the final norm has its gradient by then, the layers do not."""

    def rest(*_: Any) -> None:
        time.sleep(BACKWARD)

    module.model.layers[-1].register_forward_hook(lambda _, __, out: out.register_hook(rest) and None)


def seconds_per_step(offload: dict[str, Any]) -> list[float]:
    """Of steps that all switch layers, when every layer has been trained before."""
    from grass_ds.offload import build

    model = tiny_llama(layers=LAYERS)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    if offload["device"] != "none":
        offload = {"chunk_numel": layer // CHUNKS, **offload}
    block = grass_block(sampler="cyclic", cyclic_order="ascending", sample_period=1, offload=offload)
    with (
        mock.patch.object(build, "open_io", slowly(build.open_io)),
        engine_of(ds_config(grass=block), model) as engine,
    ):
        train(engine, LAYERS)
        slow_backward(model)
        train(engine, 1, start=LAYERS)
        times = []
        for step in range(MEASURED):
            begin = time.perf_counter()
            train(engine, 1, start=LAYERS + 1 + step)
            times.append(time.perf_counter() - begin)
    return times


@pytest.mark.slow
def test_a_slow_disk_hides_behind_backward(one_rank: Any, tmp_path: Path) -> None:
    """Per step a layer of four chunks comes in and one goes out: 0.24 s each way, behind 0.6 s of backward."""
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}

    def fastest(**offload: Any) -> float:
        return min(one_rank.run(seconds_per_step, offload=offload)[0])

    none = fastest(device="none")
    assert none > BACKWARD
    for residency in ("stream", "period"):
        assert fastest(**nvme, residency=residency) <= 1.10 * none, residency
    exposed = CHUNKS * LATENCY  # what the same transfers cost when nothing hides them
    assert fastest(**nvme, prefetch="step", device_buffers=1, host_buffers=3) >= none + 0.8 * exposed


# ---- the trace ------------------------------------------------------------------------------------------------------


def trace_run(offload: dict[str, Any]) -> None:
    from grass_ds.offload import build

    model = tiny_llama(layers=LAYERS)
    block = grass_block(sampler="cyclic", cyclic_order="ascending", sample_period=1, offload=offload)
    with (
        mock.patch.object(build, "open_io", slowly(build.open_io)),
        engine_of(ds_config(grass=block), model) as engine,
    ):
        slow_backward(model)
        train(engine, 2 * LAYERS)


def spans(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Lane -> (begin, end) of its spans in order, microseconds."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes.values()}
    for event in events:
        if event["ph"] == "X":
            found[lanes[event["tid"]]].append((event["ts"], event["ts"] + event["dur"]))
    return {lane: sorted(times) for lane, times in found.items()}


def test_the_trace_shows_prefetch_under_backward(one_rank: Any, tmp_path: Path) -> None:
    """From the second round on every step reads a layer: between two steps, and loaded while backward runs."""
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "trace": str(tmp_path / "out" / "trace.json")}
    one_rank.run(trace_run, offload=offload)
    lanes = spans(tmp_path / "out" / "trace.rank0.json")
    assert {"backward", "step", "read", "write", "load", "store"} <= lanes.keys()
    assert len(lanes["backward"]) == len(lanes["step"]) == 2 * LAYERS
    assert len(lanes["read"]) >= LAYERS
    for begin, end in lanes["read"]:
        assert not any(start < end and begin < stop for start, stop in lanes["step"]), "a read in the step"
    for (begin, end), (step, _) in list(zip(lanes["backward"], lanes["step"], strict=True))[LAYERS:]:
        assert end <= step
        assert any(begin <= start and stop <= end for start, stop in lanes["load"])


def test_without_prefetch_the_trace_shows_transfers_in_the_step(one_rank: Any, tmp_path: Path) -> None:
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "trace": str(tmp_path / "trace.json"), "prefetch": "step"}
    one_rank.run(trace_run, offload=offload)
    lanes = spans(tmp_path / "trace.rank0.json")
    for begin, end in lanes["read"]:
        assert any(start <= begin and end <= stop for start, stop in lanes["step"])
