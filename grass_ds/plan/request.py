# SPDX-License-Identifier: Apache-2.0
"""What the user asks to plan: the arguments of ``python -m grass_ds plan``. It imports nothing heavy."""

import argparse
from dataclasses import dataclass, fields
from typing import Any

from grass_ds.core.sizes import parse_bytes

METHODS = ("grass", "lisa", "full", "lora")
FORMATS = ("fp32", "exact", "bf16", "8bit")
DEVICES = ("auto", "none", "cpu", "nvme")
DTYPES = ("bf16", "fp16", "fp32")
ATTENTIONS = ("sdpa", "eager")


def parse_size(argument: str, text: str) -> int:
    """Bytes of ``24GB``. Raises ValueError that names the argument."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{argument} {text}: {error}") from None


def parse_gpus(text: str) -> tuple[int, int]:
    """Number of devices and bytes of each, of ``2x24GB`` or ``24GB``."""
    count, _, size = text.rpartition("x")
    if count and not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"--gpus {text}: expected a number above 0 and a size, as in 2x24GB")
    return int(count or 1), parse_size("--gpus", size)


@dataclass(frozen=True)
class Request:
    """A run to plan. None and "auto": the planner chooses.

    Attributes:
        model: folder, config.json, shape that ships, or name of the hub.
        ranks, device_bytes: devices, and bytes of each; all on one machine.
        reserve: bytes of a device that are left to its driver, to communication and to fragmentation.
        host_bytes, nvme_bytes: of the machine; None: unknown, or no disk.
        micro_batch, sequence: rows of a rank and tokens per row; ``accumulation``: micro-batches per step.
        link, interconnect: GB/s between host and device, and between devices; ``device_tflops``: of the device.

    Raises:
        ValueError: a value out of its range; it names the argument.
    """

    model: str
    ranks: int
    device_bytes: int
    host_bytes: int | None = None
    nvme_bytes: int | None = None
    nvme_path: str = "$SLURM_TMPDIR"
    stage: int | None = None
    method: str = "grass"
    gamma: int = 8  # that of the key; its module needs torch, without which the doctor reports, too
    expansion: float = 0.0
    offload: str = "auto"
    state_format: str = "fp32"
    dtype: str = "bf16"
    attention: str = "sdpa"
    sequence: int = 1024
    micro_batch: int = 4
    accumulation: int = 1
    checkpointing: bool = False
    lora_rank: int = 16
    reserve: int = 10**9
    link: float = 25.0
    interconnect: float = 25.0
    device_tflops: float = 100.0

    def __post_init__(self) -> None:
        for name in ("ranks", "gamma", "sequence", "micro_batch", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.expansion <= 1:
            raise ValueError(f"--expansion {self.expansion}: must be a number from 0 to 1")
        if self.expansion and self.method in ("full", "lora"):
            raise ValueError(f"--expansion {self.expansion} with --method {self.method}: no layer is inactive there")
        for name in ("link", "interconnect", "device_tflops"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} {getattr(self, name)}: must be a finite number above 0")
        choices = {
            "method": METHODS,
            "offload": DEVICES,
            "state_format": FORMATS,
            "dtype": DTYPES,
            "attention": ATTENTIONS,
        }
        for name, allowed in {**choices, "stage": (None, 1, 2, 3)}.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join("auto" if each is None else str(each) for each in allowed)
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {shown}")
        if self.device_bytes <= self.reserve:
            raise ValueError(
                f"--gpus: {self.device_bytes / 1e9:.1f} GB per device is not more than --reserve "
                f"{self.reserve / 1e9:.1f} GB, which is left to driver and communication"
            )
        if self.offload == "nvme" and self.nvme_bytes is None:
            raise ValueError("--offload nvme needs the size of the disk: --nvme 1TB")
        if self.method == "lora" and self.offload not in ("auto", "none"):
            raise ValueError(f"--offload {self.offload} with --method lora: its optimizer state stays on the device")


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments of a :class:`Request`. Ranges are checked by it."""
    default = {field.name: field.default for field in fields(Request)}
    add = parser.add_argument
    add("--model", metavar="MODEL", required=required, help="a folder, a config.json, a shape that ships, a hub name")
    add("--gpus", metavar="2x24GB", required=required, help="devices of the machine, and memory of each")
    add("--host", metavar="64GB", help="host memory of the machine")
    add("--nvme", metavar="1TB", help="free space on a local disk for optimizer state")
    add("--stage", default="auto", help="of ZeRO: 1, 2, 3 or auto (default: 2, or 3 where only that fits)")
    add("--method", default="grass", help=f"one of {', '.join(METHODS)}")
    add("--gamma", type=int, default=default["gamma"], help=f"num_active_layers (default {default['gamma']})")
    add(
        "--expansion", type=float, default=default["expansion"], help="sign steps of inactive layers (default 0: none)"
    )
    add("--offload", default="auto", help="where optimizer state is kept: cpu, nvme, none or auto")
    add("--state_format", default="fp32", help=f"one of {', '.join(FORMATS)}")
    add("--dtype", default="bf16", help="of the weights: bf16, fp16 or fp32")
    add("--attention", default="sdpa", help="sdpa, a fused kernel (default; as flash_attention_2), or eager")
    add("--sequence", type=int, default=default["sequence"], help="tokens per row (default 1024)")
    add("--micro_batch", type=int, default=default["micro_batch"], help="rows per device (default 4)")
    add("--accumulation", type=int, default=1, help="micro-batches per step (default 1)")
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--lora_rank", type=int, default=default["lora_rank"], help="with --method lora (default 16)")
    add("--reserve", metavar="1GB", default="1GB", help="device memory that is left free (default 1GB)")
    add("--link", type=float, default=default["link"], metavar="GB/s", help="between host and device (default 25)")
    add("--interconnect", type=float, default=25.0, metavar="GB/s", help="between devices (default 25)")
    add(
        "--device_tflops",
        type=float,
        default=100.0,
        metavar="X",
        help="arithmetic that a device reaches (default 100)",
    )


def request_of(options: argparse.Namespace, nvme_path: str | None = None) -> Request:
    """Of parsed arguments. Raises ValueError that names the argument, its range and the remedy."""
    if options.model is None or options.gpus is None:
        raise ValueError("a plan needs --model and --gpus, as in --model llama-2-7b --gpus 2x24GB")
    if options.stage not in ("auto", "1", "2", "3"):
        raise ValueError(f"--stage {options.stage}: must be one of auto, 1, 2, 3")
    ranks, device_bytes = parse_gpus(options.gpus)
    own: dict[str, Any] = {
        "ranks": ranks,
        "device_bytes": device_bytes,
        "host_bytes": None if options.host is None else parse_size("--host", options.host),
        "nvme_bytes": None if options.nvme is None else parse_size("--nvme", options.nvme),
        "stage": None if options.stage == "auto" else int(options.stage),
        "reserve": parse_size("--reserve", options.reserve),
    }
    if nvme_path is not None:
        own["nvme_path"] = nvme_path
    given = {field.name for field in fields(Request)} - own.keys() - {"nvme_path"}
    return Request(**own, **{name: getattr(options, name) for name in given})
