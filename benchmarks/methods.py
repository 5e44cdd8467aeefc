# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: what each is called, and how its config and its model differ from stock full fine-tuning."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import nn

EVERYTHING = ["embed", "norm", "head"]
# What DeepSpeed is told of a precision. fp16 has a dynamic loss scale: steps whose gradients overflow are skipped, most of them first ones.
PRECISION: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0}},
    "fp32": {},
}


@dataclass(frozen=True)
class Method:
    """What tells a method from stock full fine-tuning.

    Attributes:
        label: what tables call it.
        grass: its "grass" block; None for methods that are not ours.
        zero: added to ``zero_optimization``.
        lora_rank: of PEFT LoRA on all linear layers, alpha twice that; None: the model is trained itself.
        frozen: parameters with this in their name do not train.
        toggles: LISA as public callbacks do it, see :func:`benchmarks.peers.toggle_layers`.
        package: that the method comes in and that need not be installed.
        note: what a reader has to know of it beside its numbers; no full stop.
    """

    label: str
    grass: dict[str, Any] | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    frozen: str | None = None
    toggles: bool = False
    package: str | None = None
    note: str = ""

    @property
    def bare_label(self) -> str:
        """For suites whose settings are not the default ones."""
        return self.label.removesuffix(" (default)")


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning (stock DeepSpeed)"),
    "full-offload": Method(
        "full fine-tuning, optimizer state on the CPU (stock DeepSpeed)",
        zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}},
        note="steps by torch's fused AdamW, as all methods do, not by DeepSpeed's CPU Adam",
    ),
    "lora-16": Method("LoRA r=16, all linear layers (PEFT)", lora_rank=16),
    "lora": Method("LoRA r=128, all linear layers (PEFT)", lora_rank=128),
    "lora-fa": Method(
        "LoRA-FA r=128, all linear layers (PEFT): A frozen",
        lora_rank=128,
        frozen="lora_A",
        note=(
            "B trained by AdamW: PEFT's own LoRA-FA optimizer cannot work on ZeRO's flat shards. It pairs A with B by the names of "
            "its parameters; ZeRO leaves it one flat shard under the name of the embeddings, which it steps by plain AdamW, without the "
            "projection and without a word"
        ),
    ),
    "lisa-toggle": Method(
        "LISA by toggling `requires_grad` (public callbacks), 2 layers + everything else",
        toggles=True,
        note="does not freeze: ZeRO takes a missing gradient for zero, and Adam's momentum moves the layer on",
    ),
    "badam-package": Method("BAdam (its own package), 1 layer", package="badam"),
    "grass": Method("**grass**, 2 layers + final norm (default)", {"sampler": "grass"}),
    "grass-sharp": Method(
        "grass at temperature 0.25, 2 layers + final norm", {"sampler": "grass", "temperature": 0.25}
    ),
    "grass-head": Method(
        "grass, 2 layers + final norm + head", {"sampler": "grass", "always_active": ["norm", "head"]}
    ),
    "grass-embed": Method(
        "grass, 2 layers + final norm + head + embeddings", {"sampler": "grass", "always_active": EVERYTHING}
    ),
    "static": Method("static (first scores kept), 2 layers + final norm", {"sampler": "static"}),
    "uniform": Method("uniform (LISA's draw), 2 layers + final norm", {"sampler": "uniform"}),
    "lisa": Method(
        "LISA (ours), 2 layers + final norm + head + embeddings", {"sampler": "uniform", "always_active": EVERYTHING}
    ),
    "cyclic": Method("cyclic (BAdam's order), 2 layers + final norm", {"sampler": "cyclic"}),
    "badam": Method(
        "cyclic in BAdam's way (ours), 1 layer + final norm",
        {"sampler": "cyclic", "num_active_layers": 1, "state_on_switch": "reset"},
    ),
    "full-sampler": Method(
        "our wrapper doing all that stock does (sampler `full`)", {"sampler": "full", "offload": {"device": "none"}}
    ),
}
# Methods that were tried and are not measured: why. No full stop either.
NOT_RUN = {
    "zenflow": (
        "DeepSpeed 0.19.8's ZenFlow spoils the model before the first step: on ZeRO-2 `initialize` writes every matrix into its flat "
        "buffer transposed and reads it back as if it were not. Its default `update_interval: auto` then divides the loss by 0: nan from "
        "the second step on. On ZeRO-3 it wants CUDA"
    ),
}
# Methods of packages that need not be installed.
PACKAGES = {name: method.package for name, method in METHODS.items() if method.package is not None}


def missing_package(method: str) -> str | None:
    """The package that the method is, if it is not installed."""
    package = PACKAGES.get(method)
    return package if package is not None and find_spec(package) is None else None


def ds_config(
    method: str,
    *,
    dtype: str,
    stage: int,
    micro_batch: int,
    accumulation: int,
    lr: float,
    grass: dict[str, Any],
    bucket: int = 5_000_000,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """``dtype``, torch's fused AdamW, clip 1.0, linear warm-up over 5 steps; ``grass`` overrides the method's block.

    Args:
        bucket: elements of DeepSpeed's communication buffers; about one layer, as its default of 5e8 would dominate the memory of
            a small model.
        total_steps: the learning rate falls linearly to zero until then; None: it stays.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        **PRECISION[dtype],
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
    config["zero_optimization"] |= METHODS[method].zero
    block = METHODS[method].grass
    if block is not None:
        config["grass"] = {**block, **grass}
    return config


def prepare_model(method: str, model: nn.Module) -> nn.Module:
    """The model as the method trains it: in PEFT LoRA, with what the method freezes frozen."""
    rank, frozen = METHODS[method].lora_rank, METHODS[method].frozen
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    if frozen is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    return model
