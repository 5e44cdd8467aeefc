# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: how the config and the model of each differ from stock full fine-tuning."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.case import Case
from benchmarks.offload.suite import OFFLOADS
from grass_ds.config import GrassConfig

EVERYTHING = ["embed", "norm", "head"]
# DeepSpeed's config of a precision. fp16 has a dynamic loss scale, which skips steps whose gradients overflow.
PRECISION: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0}},
    "fp32": {},
}
LAYERS = 2  # at a time, where a case names no number


@dataclass(frozen=True)
class Method:
    """What distinguishes a method from stock full fine-tuning.

    Attributes:
        description: what the key in tables stands for.
        grass: its "grass" block; None for methods that are not ours.
        zero: added to ``zero_optimization``.
        lora_rank: of PEFT LoRA on all linear layers, alpha twice that; None: the model itself trains.
        frozen: parameters with this in their name do not train.
        sign_sgd: the optimizer is :class:`benchmarks.baselines.SignSGD` instead of AdamW.
        toggles: LISA as public callbacks do it, see :class:`benchmarks.baselines.LayerToggle`.
        package: that the method comes in; it need not be installed.
    """

    description: str
    grass: dict[str, Any] | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    frozen: str | None = None
    sign_sgd: bool = False
    toggles: bool = False
    package: str | None = None


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning (stock DeepSpeed)"),
    "full-offload": Method(
        "full fine-tuning, optimizer state on the CPU (stock DeepSpeed)",
        zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}},
    ),
    "lora-16": Method("LoRA r=16, all linear layers (PEFT)", lora_rank=16),
    "lora": Method("LoRA r=128, all linear layers (PEFT)", lora_rank=128),
    "lora-fa": Method("LoRA-FA r=128, all linear layers (PEFT): A frozen", lora_rank=128, frozen="lora_A"),
    "lisa-toggle": Method(
        "LISA by toggling `requires_grad` (public callbacks), 2 layers + everything else", toggles=True
    ),
    "badam-package": Method("BAdam (its own package), 1 layer", package="badam"),
    "grass": Method("grass, 2 layers + final norm", {"sampler": "grass"}),
    "grass-sharp": Method(
        "grass at temperature 0.25, 2 layers + final norm", {"sampler": "grass", "temperature": 0.25}
    ),
    "grass-embed": Method(
        "grass, 2 layers + final norm + head + embeddings", {"sampler": "grass", "always_active": EVERYTHING}
    ),
    "static": Method("static (first scores kept), 2 layers + final norm", {"sampler": "static"}),
    "outlier": Method("outlier (OWS's draw), 2 layers + final norm", {"sampler": "outlier"}),
    "uniform": Method("uniform (LISA's draw), 2 layers + final norm", {"sampler": "uniform"}),
    "lisa": Method(
        "LISA (ours), 2 layers + final norm + head + embeddings", {"sampler": "uniform", "always_active": EVERYTHING}
    ),
    "stratified": Method(
        "uniform, a layer of each of as many parts of the depth + final norm",
        {"sampler": "uniform", "stratified": True},
    ),
    "grass-stratified": Method(
        "grass, a layer of each of as many parts of the depth + final norm", {"sampler": "grass", "stratified": True}
    ),
    "window": Method("2 neighbours + final norm", {"sampler": "benchmarks.levers.draws.WindowSampler"}),
    "weighted": Method(
        "2 layers with given chances + final norm", {"sampler": "benchmarks.levers.draws.WeightedSampler"}
    ),
    "cyclic": Method("cyclic (BAdam's order), 2 layers + final norm", {"sampler": "cyclic"}),
    "module": Method(
        "module (MISA's draw), matrices of as many weights as 8 of 30 layers + final norm",
        {"sampler": "module", "module_budget": 8 / 30},
    ),
    "ist": Method("IST on LoRA r=128, adapters of 8 layers (PEFT)", {"sampler": "ist"}, lora_rank=128),
    "sign-sgd": Method("sign-SGD without state on layers + final norm", {"sampler": "uniform"}, sign_sgd=True),
    "full-sampler": Method(
        "our wrapper doing all that stock does (sampler `full`)", {"sampler": "full", "offload": {"device": "none"}}
    ),
}


def grass_block(case: Case) -> dict[str, Any] | None:
    """The "grass" block of the case; None for methods that are not ours."""
    block = METHODS[case.method].grass
    if block is None:
        return None
    block = {"num_active_layers": LAYERS, **block, "seed": case.seed, **case.grass}
    if case.offload is not None:
        path = {"nvme_path": case.disk} if OFFLOADS[case.offload]["device"] == "nvme" else {}
        block["offload"] = {**OFFLOADS[case.offload], **path, **block.get("offload", {})}
    return block


def grass_config(case: Case) -> GrassConfig | None:
    """The same with defaults filled in."""
    block = grass_block(case)
    return None if block is None else GrassConfig(**block)


def ds_config(case: Case, bucket: int = 5_000_000, total_steps: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config: torch's fused AdamW, clip 1.0, 5 warm-up steps.

    Args:
        bucket: elements of DeepSpeed's communication buffers; about one layer, as the default of 5e8 would dominate
            the memory of a small model.
        total_steps: the learning rate falls to zero by then, see ``Case.schedule``; None: it stays.
    """
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    adam = {"lr": case.lr, "weight_decay": 0.0, "torch_adam": True, "fused": True}
    warmup = {"warmup_max_lr": case.lr, "warmup_num_steps": 5, "warmup_type": "linear"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        **PRECISION[case.dtype],
        "zero_optimization": {"stage": case.stage, **buckets, **METHODS[case.method].zero},
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warmup},
        "steps_per_print": 10**9,
    }
    if total_steps is not None and case.schedule == "linear":
        config["scheduler"] = {"type": "WarmupDecayLR", "params": {**warmup, "total_num_steps": total_steps}}
    elif total_steps is not None:
        params = {"total_num_steps": total_steps, "warmup_num_steps": max(2, total_steps // 20), "cos_min_ratio": 0.0}
        config["scheduler"] = {"type": "WarmupCosineLR", "params": {**params, "warmup_type": "linear"}}
    if case.async_save:
        config["checkpoint"] = {"async": True}
    if (block := grass_block(case)) is not None:
        config["grass"] = block
    return config


def prepare_model(method: str, model: nn.Module) -> nn.Module:
    """The model as the method trains it: with PEFT's adapters, and with what the method freezes frozen."""
    rank, frozen = METHODS[method].lora_rank, METHODS[method].frozen
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    if frozen is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    return model
