# SPDX-License-Identifier: Apache-2.0
"""The prediction for a run: its parts put together, its traffic and its arithmetic, and how long these take."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from grass_ds.core.units import Unit
from grass_ds.plan.gathering import gathers_per_step, persistent_numel
from grass_ds.plan.model_shape import ModelShape
from grass_ds.plan.prediction import FP32, Moment, Prediction, SampledRun
from grass_ds.plan.run_shape import RunShape

LORA_STATE = 12
"""Bytes of fp32 master weights and AdamW's moments per adapter element."""
LORA_BUCKET = 5_000_000
"""Elements of DeepSpeed's ``reduce_bucket_size`` that a plan for adapters sets."""


@dataclass(frozen=True)
class Speeds:
    """Of the machine: between host and device and between devices (GB/s), and the device's arithmetic (TFLOP/s)."""

    link: float = 25.0
    interconnect: float = 25.0
    device_tflops: float = 100.0

    def seconds(self, found: Prediction, offloaded: bool) -> dict[str, float]:
        """Least seconds of the parts of a step, as if nothing overlapped. A ring sends an all-reduce twice."""
        wire = sum(nbytes * (2 if name == "all_reduce" else 1) for name, nbytes in found.traffic.items())
        return {
            "compute": found.flops / (1e12 * self.device_tflops),
            "state over the link": offloaded * 2 * found.stepped / (1e9 * self.link),
            "between ranks": wire / (1e9 * self.interconnect),
        }


def predict(model: ModelShape, run: RunShape, active: Collection[int] | None = None) -> Prediction:
    """What the largest rank holds and moves.

    Args:
        active: the blocks that train; None: those that need most, see [Note: Moments] of ``prediction.py``.

    Raises:
        ValueError: the sampler does not go with the model, or draws single matrices.
    """
    if run.grass is None:
        return _with_adapters(model, run)
    parts = SampledRun(model, run, active)
    state, window = parts.state_and_window()
    host, disk = parts.host_and_disk()
    units, lowest = parts.units_of(parts.trained), parts.lowest(parts.trained)
    return Prediction(
        parts.weights(),
        state,
        window,
        tuple(parts.moments()),
        parts.saved(),
        parts.gradients(),
        host,
        disk,
        parts.state_bytes(parts.units_of(parts.active)),
        _traffic(parts, units, lowest),
        _flops(model, run, parts.trained, lowest, [unit for unit in units if unit.layer is None]),
    )


def _traffic(parts: SampledRun, units: Sequence[Unit], lowest: int) -> dict[str, int]:
    run = parts.run
    if run.ranks == 1:
        return {}
    trained = run.width * sum(unit.padded_numel for unit in units)
    gathered = trained
    if run.stage == 3:
        gathered = run.width * run.accumulation * gathers_per_step(parts.units, run, parts.blocks, lowest, parts.whole)
        gathered += run.width * persistent_numel(units, run.gather)  # again after the step
    return {
        "reduce_scatter": trained * (run.accumulation if parts.reduces_always else 1),
        "all_gather": gathered,
        "all_reduce": FP32 * (3 * len(units) + 2) + (8 if parts.grass.offload.device == "nvme" else 0),
    }


def _flops(model: ModelShape, run: RunShape, trained: Collection[int], lowest: int, outside: Sequence[Unit]) -> int:
    """Of matrix products and attention in one step; a multiply-add counts twice, causal masks save nothing."""
    config, blocks = model.config, len(model.layers.blocks)
    product = 2 * run.tokens * max(model.layers.sizes)
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    attention = 2 * run.tokens * run.sequence * width
    head = 2 * run.tokens * getattr(config, "vocab_size", 0) * config.hidden_size
    forward = blocks * (product + 2 * attention) + head
    passed = blocks - lowest
    backward = head + passed * (product + 5 * attention) + len(trained) * product
    backward += head * any(unit.kind == ("embed" if model.layers.tied else "head") for unit in outside)
    if run.checkpointing:
        backward += passed * (product + 2 * attention)
    return run.accumulation * (forward + backward)


def _with_adapters(model: ModelShape, run: RunShape) -> Prediction:
    """Adapters of all matrices in the blocks, trained by stock DeepSpeed with its state on the device."""
    blocks, width, ranks = len(model.layers.blocks), run.width, run.ranks
    shapes = [
        p.shape for name in model.layers.blocks for p in model.model.get_submodule(name).parameters() if p.dim() > 1
    ]
    numel = run.lora_rank * sum(sum(shape) for shape in shapes)
    # An adapter saves its input, as a matrix that trains, and what is between its two factors.
    between = width * run.tokens * run.lora_rank * len(shapes)
    measured = model.activations((), run.micro_batch, run.sequence, run.checkpointing, True)
    saved = sum(block.saved for block in measured.frozen) + measured.outside
    saved += 0 if run.checkpointing else between
    gradients = width * (numel // ranks if run.stage > 1 else numel)
    buckets = 2 * width * max(LORA_BUCKET, numel // blocks)
    weights, gathered = width * (model.numel + numel), 0
    if run.stage == 3:
        gathered = width * min(model.numel, run.gather.reuse_distance // 2 + max(model.layers.sizes))
        weights //= ranks
    below = [sum(block.saved for block in measured.frozen[:index]) for index in range(blocks + 1)]
    extra = 0 if run.checkpointing else between
    moments = [Moment("loss", below[-1] + extra + measured.loss, buckets, gathered)]
    for index, block in enumerate(measured.frozen):
        # The factors' products are as large as the block's own outputs, one at a time.
        own = block.backward + between // blocks + extra * index // blocks
        moments.append(Moment(f"backward of layer {index}", below[index] + own, gradients + buckets, gathered))
    traffic = {"reduce_scatter": width * numel, "all_gather": width * numel} if ranks > 1 else {}
    if run.stage == 3 and ranks > 1:
        traffic["all_gather"] = 2 * width * run.accumulation * model.numel
    return Prediction(
        weights,
        LORA_STATE * -(-numel // ranks),
        0,
        tuple(moments),
        saved,
        gradients,
        0,
        0,
        LORA_STATE * -(-numel // ranks),
        traffic,
        _flops(model, run, (), 0, ()),
    )
