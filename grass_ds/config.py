# SPDX-License-Identifier: Apache-2.0
"""Schema of the top-level ``"grass"`` block of a DeepSpeed JSON, and its one parser.

Defaults marked [ours] are the project's choice, not taken from the paper: the paper's values could not be read. What changing them
does on the project's own tasks is measured in ``benchmarks/``.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from grass_ds.core.deepspeed_compat import DeepSpeedConfigModel
from grass_ds.sampling.samplers import SAMPLERS

BLOCK = "grass"
# Remedies that a range does not tell.
_REMEDIES = {
    "probe_steps": 'to train without probing use "sampler": "uniform"',
    "ema_alpha": 'to keep the probed scores use "sampler": "static"',
}


class GrassConfigError(ValueError):
    """A mistake in the ``"grass"`` block, or a DeepSpeed setting that cannot work beside it."""


class _Block(DeepSpeedConfigModel):
    """What JSON brings along: null stands for the default, and ``true`` is not the number 1."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("Input should be a valid " + ("integer" if annotation is int else "number"))
        return value


class OffloadConfig(_Block):
    """Where optimizer state (fp32 master weights and moments of a layer) lives while its layer is not being stepped."""

    device: Literal["none", "cpu", "nvme"] = "cpu"
    """``cpu`` (the paper's way): in host memory. ``nvme``: in files on a local disk. ``none``: the state of every layer that was
    ever active stays on the device (LISA's way)."""

    residency: Literal["stream", "period"] = "stream"
    """``stream`` (the paper's way): the device holds ``device_buffers`` chunks, whatever is stepped. ``period``: the state of the
    active layers stays on the device from one draw to the next; more device memory, no transfers in between."""

    nvme_path: str | None = None
    """Folder on a local disk, for ``nvme``. It must exist, so that a disk that is not mounted is noticed. ``$VARIABLES`` are
    replaced. Files are removed at the end of the run."""

    pin_memory: bool = True
    """Page-lock the host copies: faster transfers that overlap. No effect on the CPU accelerator."""

    chunk_numel: int = Field(4 * 1024 * 1024, ge=1)
    """Elements of a layer's shard that are moved and stepped at a time; rounded up to a multiple of 1024, and lowered to the largest
    shard. A device buffer takes 12 bytes per element: with the defaults two of them hold 100 MB."""

    host_buffers: int | None = Field(None, ge=1)
    """Host buffers of one chunk each that ``nvme`` moves data through; at least ``device_buffers`` + 2. Null: with ``stream`` as many as
    the active layers need, up to 4 GiB, so that files are only touched when layers are drawn; with ``period`` 4 or
    ``device_buffers`` + 2."""

    device_buffers: int = Field(2, ge=1)
    """Chunks on the device at a time with ``stream``. 1: no overlap of transfers with the step."""

    prefetch: Literal["backward", "step"] = "backward"
    """``backward``: a layer's state comes in as soon as its gradient has been reduced. ``step``: only when it is stepped."""

    checksum: bool = False
    """Verify a CRC-32 of everything read from ``nvme``."""

    io: Literal["auto", "aio", "posix"] = "auto"
    """``aio``: DeepSpeed's asynchronous I/O, which needs libaio and a compiler, with the settings of the top-level ``aio`` block.
    ``posix``: direct reads and writes by threads. ``auto``: ``aio`` where it works."""

    trace: str | None = None
    """Write a Chrome trace of all transfers to this file, one per rank."""

    @model_validator(mode="after")
    def _consistent(self) -> "OffloadConfig":
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError('device "nvme" needs nvme_path: name an existing folder on a local disk')
        least = self.device_buffers + 2
        if self.host_buffers is not None and self.host_buffers < least:
            raise ValueError(
                f"host_buffers = {self.host_buffers} is too few for device_buffers = {self.device_buffers}: at least {least} are "
                "needed, or null for the default"
            )
        return self


class GrassConfig(_Block):
    """The ``"grass"`` block. Every field may be left out or null: the default then applies."""

    enabled: bool = True
    """False: the engine is stock DeepSpeed."""

    sampler: Literal["grass", "static", "uniform", "cyclic", "full"] = "grass"
    """How layers are chosen. ``grass``: by measured gradient norm, re-measured while training. ``static``: by gradient norm,
    measured once (the paper's ablation GRASS*). ``uniform``: at random (LISA). ``cyclic``: in turn (BAdam). ``full``: every
    layer, embeddings and head, always: plain fine-tuning."""

    num_active_layers: int = Field(2, ge=1)
    """Layers trained at a time (paper: gamma). At least the number of layers: all of them train, nothing is sampled."""

    probe_steps: int = Field(20, ge=1)
    """Steps of a probing: before training starts, and every ``reprobe_period`` (paper: T_p): forward and backward through all layers, no update. Only the
    samplers that use gradient norms (grass, static) probe. [ours]"""

    sample_period: int = Field(25, ge=1)
    """Optimizer steps between two draws (paper: T_s; 25 to 50 were best there). [ours]"""

    refresh_period: int = Field(50, ge=1)
    """Optimizer steps between two updates of the scores (paper: T_u). Only ``grass``. [ours]"""

    reprobe_period: int = Field(0, ge=0)
    """Optimizer steps between two probings, each of ``probe_steps`` steps that train nothing: what is measured replaces the scores of
    all layers, and a new set is drawn. For runs in which the scores of layers that do not train go stale. Best a multiple of
    ``sample_period``, whose count goes on: the set drawn otherwise trains for the rest of a period only. 0: probe once, before training
    (the paper). Only ``grass``. [ours]"""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Softmax temperature of the draw (paper: tau). Low: the layers with the largest gradients nearly always; high: nearly
    uniform. Without a unit when ``score_normalization`` is ``mean``. [ours]"""

    ema_alpha: float = Field(0.5, gt=0, le=1)
    """Weight of the new measurement when scores are refreshed (paper: alpha). [ours]"""

    score_normalization: Literal["mean", "none"] = "mean"
    """``mean`` [ours]: scores are divided by their mean before the softmax, so that ``temperature`` has no unit. ``none``: raw
    gradient RMS (the paper's formula; values far below 1, so the temperature must be of their size)."""

    always_active: tuple[Literal["embed", "norm", "head", "other"], ...] | None = None
    """Modules outside the decoder blocks that train all the time. ``norm``: the final norm. ``head``: the output layers, which are
    the projection to the vocabulary or, in a model without one, everything above the blocks (a classifier, a reward model's
    score). ``other``: the rest (a value head, a projector), and model parts with blocks of their own (an encoder, a vision
    tower). Null [ours]: all but the embeddings, the projection to the vocabulary and such model parts; in a language model that
    is the final norm. With ``embed`` the backward pass can never stop early, and embeddings plus head are most of what would
    train (70 % at 8B). Tied embeddings: ``embed`` and ``head`` are the same. A kind that the model lacks is an error."""

    layers_path: str | None = None
    """Dotted path of the decoder's ``ModuleList`` (``"model.layers"``). Null: found by inspection."""

    cyclic_order: Literal["random", "ascending", "descending"] = "random"
    """Order of the ``cyclic`` sampler; ``random``: a new permutation every cycle."""

    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the sampler's own generator; global generators are neither read nor moved."""

    missing_gradients: Literal["error", "zero"] = "error"
    """A module that is to train and receives no gradient on any rank in a whole accumulation window. ``error``: training stops, since
    the usual cause is a model that trains nothing; of modules that train by default, without being named in ``always_active``, one
    warning. ``zero``: its gradient counts as zeros, as in DeepSpeed; for data of which some rows do not use the module (text rows
    beside a vision tower), and for blocks that are dropped at random (LayerDrop)."""

    state_on_switch: Literal["keep", "reset"] = "keep"
    """What becomes of a layer's optimizer state when it leaves the active set. ``keep`` (paper): moments, step count and master
    weights wait for its return. ``reset`` (BAdam): dropped, and rebuilt from the weights."""

    offload: OffloadConfig = Field(default_factory=OffloadConfig)
    """See :class:`OffloadConfig`."""

    @model_validator(mode="after")
    def _no_duplicates(self) -> "GrassConfig":
        if self.always_active is not None and len(set(self.always_active)) != len(self.always_active):
            raise ValueError(f"always_active names a module twice: {self.always_active}; name each once")
        return self

    @property
    def probes(self) -> bool:
        """Whether training starts with a probing phase."""
        return SAMPLERS[self.sampler].needs_scores

    def controller_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :class:`grass_ds.sampling.controller.Controller` (all but the number of layers)."""
        schedule = {"probe_steps", "sample_period", "refresh_period", "reprobe_period"}
        draw = {"sampler", "num_active_layers", "temperature", "score_normalization", "cyclic_order", "seed"}
        return self.model_dump(include=schedule | draw | {"ema_alpha"})


def parse_grass_block(ds_config: Mapping[str, Any]) -> GrassConfig | None:
    """Return the validated ``"grass"`` block of a DeepSpeed config, or None when there is none or it is disabled.

    Raises:
        GrassConfigError: naming every bad key with its value, what is allowed and what to do.
    """
    for parent, section in ds_config.items():
        if parent != BLOCK and isinstance(section, Mapping) and BLOCK in section:
            raise GrassConfigError(
                f'"{parent}.{BLOCK}" is not read by anything: move the "{BLOCK}" block to the top level'
            )
    block = ds_config.get(BLOCK)
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise GrassConfigError(f'"{BLOCK}" must be an object {{...}}, got {block!r}')
    _refuse_auto(block)
    try:
        config = GrassConfig(**block)
    except ValidationError as error:
        raise GrassConfigError(_explain(error)) from None
    return config if config.enabled else None


def _refuse_auto(block: Mapping[str, Any], path: str = BLOCK) -> None:
    """``"auto"`` means "filled in from TrainingArguments" elsewhere; nothing can fill these keys in. One key has it as a choice."""
    for key, value in block.items():
        if value == "auto" and f"{path}.{key}" != f"{BLOCK}.offload.io":
            raise GrassConfigError(
                f'{path}.{key}: "auto" is not possible here; leave the key out or write null for its default'
            )
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{path}.{key}")


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        path = ".".join((BLOCK, *map(str, detail["loc"])))
        if detail["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key. {_nearest(detail['loc'])}")
        else:
            message = detail["msg"].replace("valid tuple", "valid list")
            remedy = _REMEDIES.get(str(detail["loc"][0])) if detail["loc"] else None
            lines.append(f"{path}: got {detail['input']!r}; {message}" + (f"; {remedy}" if remedy else ""))
    return f'the "{BLOCK}" block of the DeepSpeed config is wrong:\n  - ' + "\n  - ".join(lines)


def _nearest(loc: Sequence[int | str]) -> str:
    model = OffloadConfig if len(loc) > 1 else GrassConfig
    close = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(model.model_fields)}"
