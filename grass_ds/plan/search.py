# SPDX-License-Identifier: Apache-2.0
"""What fits: the plan of a request, and the largest number of active layers and micro-batch that fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from grass_ds.plan.model_shape import ModelShape, read_config
from grass_ds.plan.predict import LORA_BUCKET, Speeds, predict
from grass_ds.plan.prediction import Prediction
from grass_ds.plan.request import Request
from grass_ds.plan.run_shape import run_shape
from grass_ds.precision import DTYPES

MOST_ROWS = 4096


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that ``fits``, 0 if none does; what fits, fits with less, too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_gamma(model: ModelShape, request: Request) -> int:
    """The most layers that can train at a time within the request's memory; 0 if not even one can."""
    return largest(lambda gamma: Plan(model, replace(request, gamma=gamma)).fits, len(model.layers.blocks))


def largest_micro_batch(model: ModelShape, request: Request) -> int:
    """The most rows per device within the request's memory; 0 if not even one fits."""
    return largest(lambda rows: Plan(model, replace(request, micro_batch=rows)).fits, MOST_ROWS)


@dataclass(frozen=True)
class Plan:
    """A request with what the planner chose: a pure function of both fields."""

    model: ModelShape
    request: Request

    @cached_property
    def _chosen(self) -> tuple[int, str, Prediction]:
        """Stage, place of the state, prediction: the first that fits, or else that lacks the least."""
        asked = self.request
        stages = (2, 3) if asked.ranks > 1 else (2,)
        devices = ("cpu", "nvme") if asked.nvme_bytes is not None else ("cpu",)
        if asked.method == "lora":
            devices = ("none",)
        found = []
        for stage in stages if asked.stage is None else (asked.stage,):
            for device in devices if asked.offload == "auto" else (asked.offload,):
                config = ds_settings(asked, stage, device)
                run = run_shape(config, asked.ranks, asked.sequence, asked.checkpointing, asked.lora_rank)
                found.append((stage, device, predict(self.model, run)))
                if not shortfalls(asked, found[-1][2]):
                    return found[-1]
        return min(found, key=lambda choice: (len(shortfalls(asked, choice[2])), choice[2].total))

    @property
    def stage(self) -> int:
        return self._chosen[0]

    @property
    def device(self) -> str:
        return self._chosen[1]

    @property
    def prediction(self) -> Prediction:
        return self._chosen[2]

    @property
    def shortfalls(self) -> list[str]:
        return shortfalls(self.request, self.prediction)

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def needs(self) -> dict[str, Any]:
        """What the machine must have, in bytes: of a device (reserve included), host memory and disk of all ranks."""
        asked, found = self.request, self.prediction
        return {
            "ranks": asked.ranks,
            "device_bytes": found.total + asked.reserve,
            "host_bytes": asked.ranks * found.host,
            "disk_bytes": asked.ranks * found.disk,
            "nvme_path": asked.nvme_path,
        }

    @property
    def seconds(self) -> dict[str, float]:
        asked = self.request
        speeds = Speeds(asked.link, asked.interconnect, asked.device_tflops)
        return speeds.seconds(self.prediction, offloaded=self.device != "none")

    @property
    def config(self) -> dict[str, Any]:
        """A DeepSpeed config that trains as planned."""
        return ds_settings(self.request, self.stage, self.device)


def shortfalls(request: Request, found: Prediction) -> list[str]:
    """What does not fit, in words."""
    lacking = []
    for name, needed, given in (
        ("device memory", found.total + request.reserve, request.device_bytes),
        ("host memory", request.ranks * found.host, request.host_bytes),
        ("disk", request.ranks * found.disk, request.nvme_bytes),
    ):
        if given is not None and needed > given:
            lacking.append(f"{name}: {needed / 1e9:.1f} GB of {given / 1e9:.1f} GB")
    return lacking


def plan(request: Request) -> Plan:
    """The plan of a request. Raises ValueError: the model cannot be read or planned."""
    return Plan(ModelShape(read_config(request.model), DTYPES[request.dtype], request.attention), request)


def ds_settings(request: Request, stage: int, device: str) -> dict[str, Any]:
    """The DeepSpeed config of a request, for this stage and this place of optimizer state."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": request.micro_batch,
        "gradient_accumulation_steps": request.accumulation,
        "gradient_clipping": 1.0,
        **({} if request.dtype == "fp32" else {request.dtype: {"enabled": True}}),
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
    }
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if request.method == "lora":
        zero["reduce_bucket_size"] = LORA_BUCKET
        return config
    offload = {"device": device, "state_format": request.state_format}
    if device == "nvme":
        offload["nvme_path"] = request.nvme_path
    block: dict[str, Any] = {"sampler": {"lisa": "uniform"}.get(request.method, request.method)}
    if request.method != "full":
        block["num_active_layers"] = request.gamma
    if request.expansion:
        block["expansion"] = request.expansion
    if request.method == "lisa":
        block["always_active"] = ["embed", "norm", "head"]
    config["grass"] = {**block, "offload": offload}
    return config
