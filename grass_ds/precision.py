# SPDX-License-Identifier: Apache-2.0
"""The dtypes that this device computes, found by timing matrix products.

Flags do not show it: libraries accept bf16 on every CPU and GPU and emulate it where the hardware lacks it, up to 40
times slower than fp32. A product in each dtype takes a fraction of a second and sees what training will see.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch.utils.benchmark import Timer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A dtype is emulated where its products run below this share of the fastest rate. It separates what was measured with
# torch 2.13: CPUs with bf16 instructions reach 0.54 of their fp32 rate or more; with AVX-512 but without them 0.2,
# with AVX2 0.03 to 0.15.
EMULATED_BELOW = 1 / 3
# (rows, inputs, outputs) of the product: a small layer for the CPU, enough work to fill a GPU.
_CPU_SHAPE, _DEVICE_SHAPE = (64, 512, 512), (2048, 2048, 2048)
_SECONDS = 0.1  # a dtype is timed at least so long; the best block counts


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of matrix products on one device (one core of a CPU), by dtype name; 0 for a dtype that fails."""

    gflops: Mapping[str, float]

    @property
    def fastest(self) -> float:
        return max(self.gflops.values())

    def emulated(self, name: str) -> bool:
        """Whether the device lacks the dtype; never of fp32, which is slower than 16 bits on a GPU by design."""
        rate = self.gflops[name]
        return name != "fp32" and (not rate or rate < EMULATED_BELOW * self.fastest)

    def recommended(self, among: Collection[str] = tuple(DTYPES)) -> str:
        """bf16 where the device computes it, else fp16 where it does, else fp32; ``among`` always allows fp32.

        bf16 comes first although a CPU may compute fp32 faster: it halves the memory of weights and gradients.
        """
        allowed = (name for name in ("bf16", "fp16") if name in among and name in self.gflops)
        return next((name for name in allowed if not self.emulated(name)), "fp32")

    def text(self) -> str:
        """The figures in words: ``bf16 matrix products at 73.4 GFLOP/s, fp32 at 98.4``."""
        figures = ", ".join(f"{name} at {rate:.3g} GFLOP/s" for name, rate in self.gflops.items())
        return figures.replace(" at ", " matrix products at ", 1)

    def warning(self, name: str, among: Collection[str] = tuple(DTYPES)) -> str | None:
        """A warning with a better dtype of ``among`` if the device emulates ``name``, else None."""
        if not self.emulated(name):
            return None
        better = self.recommended(among)
        if not self.gflops[name]:
            return f"{name} does not work on this device: use {better}"
        times = self.gflops[better] / self.gflops[name]
        return (
            f"{name} is emulated on this device: matrix products take {times:.0f} times as long as in {better} "
            f"({self.text()}), and steps accordingly; use {better}"
        )


def candidates() -> tuple[str, ...]:
    """The dtypes that training may choose on this device: fp16 needs a GPU."""
    return ("bf16", "fp32") if get_accelerator().device_name() == "cpu" else ("bf16", "fp16", "fp32")


def measure(names: Collection[str] = ()) -> Rates:
    """The rates of :func:`candidates` and of ``names`` on the current device, each measured once per process."""
    wanted = {*candidates(), *names}
    return Rates({name: _gflops(name) for name in DTYPES if name in wanted})


def enabled(config: Mapping[str, Any], name: str) -> Any:
    """What a DeepSpeed config says of the dtype ``name``: True, False, "auto", or None without its block."""
    block = config.get(name, config.get("bfloat16") if name == "bf16" else None)  # DeepSpeed reads both names
    return block.get("enabled") if isinstance(block, Mapping) else None


_WARNED: set[str] = set()


def warn_if_emulated(name: str, rates: Rates | None = None) -> None:
    """Log one warning per process if the dtype ``name`` is emulated; without ``rates`` the device is measured."""
    if name != "fp32" and name not in _WARNED:
        _WARNED.add(name)
        if text := (rates or measure([name])).warning(name, candidates()):
            logger.warning(text)


@cache
def _gflops(name: str) -> float:
    """GFLOP/s of products as in ``nn.Linear``, on the CPU of one core; 0 if the dtype fails."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    rows, inputs, outputs = _CPU_SHAPE if on_cpu else _DEVICE_SHAPE

    def clock() -> float:
        accelerator.synchronize()
        # Other processes on the same cores must not look like emulation: a thread's own time does not run while it
        # waits for a core.
        return time.thread_time() if on_cpu else time.perf_counter()

    kind: dict[str, Any] = {"dtype": DTYPES[name], "device": accelerator.current_device_name()}
    try:
        operands = {"left": torch.ones(rows, inputs, **kind), "weight": torch.ones(outputs, inputs, **kind)}
        timer = Timer("torch.nn.functional.linear(left, weight)", globals=operands, timer=clock)
        seconds = min(timer.blocked_autorange(min_run_time=_SECONDS).times)  # with one thread
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return 0.0
    return 2e-9 * rows * inputs * outputs / seconds
