# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: each is a DeepSpeed config, and for LoRA a wrapped model."""

from importlib.util import find_spec
from typing import Any

from torch import nn

EVERYTHING = ["embed", "norm", "head"]

# method -> its "grass" block, None for those without. The rest of the config is the same for all.
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": None,
    "grass": {"sampler": "grass"},
    "static": {"sampler": "static"},
    "uniform": {"sampler": "uniform"},
    "cyclic": {"sampler": "cyclic"},
    "badam": {"sampler": "cyclic", "num_active_layers": 1, "state_on_switch": "reset"},
    "lisa": {"sampler": "uniform", "always_active": EVERYTHING},
    "grass-embed": {"sampler": "grass", "always_active": EVERYTHING},
    "full-sampler": {"sampler": "full", "offload": {"device": "none"}},
    "grass-device": {"sampler": "grass", "offload": {"device": "none"}},
    "badam-package": None,
}
# Methods of packages that need not be installed.
PACKAGES = {"badam-package": "badam"}


def missing_package(method: str) -> str | None:
    """The package that the method is, if it is not installed."""
    package = PACKAGES.get(method)
    return package if package is not None and find_spec(package) is None else None


def ds_config(
    method: str,
    *,
    stage: int,
    micro_batch: int,
    accumulation: int,
    lr: float,
    grass: dict[str, Any],
    bucket: int = 5_000_000,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """bf16, torch's fused AdamW, clip 1.0, linear warm-up over 5 steps; ``grass`` overrides the method's block.

    Args:
        bucket: elements of DeepSpeed's communication buffers; about one layer, as its default of 5e8 would dominate the memory of
            a small model.
        total_steps: the learning rate falls linearly to zero until then; None: it stays.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0, "torch_adam": True, "fused": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": lr, "warmup_num_steps": 5, "warmup_type": "linear"},
        },
        "steps_per_print": 10**9,
    }
    if total_steps is not None:
        config["scheduler"]["type"] = "WarmupDecayLR"
        config["scheduler"]["params"]["total_num_steps"] = total_steps
    block = METHODS[method]
    if block is not None:
        config["grass"] = {**block, **grass}
    return config


def prepare_model(method: str, model: nn.Module, rank: int = 128) -> nn.Module:
    """The model as the method trains it: for ``lora``, PEFT LoRA on all linear layers."""
    if method != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)
