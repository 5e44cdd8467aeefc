# SPDX-License-Identifier: Apache-2.0
"""The ``"grass"`` block of a DeepSpeed JSON: its keys, defaults and ranges, and its only parser.

Defaults marked [ours] are this project's choice: the paper's values could not be read. ``benchmarks/`` measures what
they change.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from grass_ds.core.deepspeed_compat import DeepSpeedConfigModel
from grass_ds.core.sizes import parse_bytes
from grass_ds.sampling.controller import Controller
from grass_ds.sampling.layers import ModelLayers
from grass_ds.sampling.registry import SAMPLERS, find_sampler
from grass_ds.sampling.samplers import SamplingSettings

BLOCK = "grass"
# Remedies beyond a value in the range.
_REMEDIES = {
    "probe_steps": 'to train without probing use "sampler": "uniform"',
    "ema_alpha": 'to keep the probed scores use "sampler": "static"',
}


class GrassConfigError(ValueError):
    """A mistake in the ``"grass"`` block, or a DeepSpeed setting or a model that cannot be used with it."""


class _Block(DeepSpeedConfigModel):
    """An object of the JSON: null means the default, ``true`` is not 1, and "auto" is a choice of ``io`` only."""

    def __init__(self, **data: Any) -> None:
        super().__init__(**{**data, "strict": True})  # otherwise DeepSpeed drops every "auto"

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_auto_and_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "auto" and info.field_name != "io":  # the Trainer replaces it in other blocks, but not in this one
            raise ValueError('"auto" is not possible here; leave the key out or write null for its default')
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("Input should be a valid " + ("integer" if annotation is int else "number"))
        return value


class OffloadConfig(_Block):
    """Where the optimizer state of a layer (fp32 master weights and moments) is kept between its steps."""

    device: Literal["none", "cpu", "nvme"] = "cpu"
    """Where the optimizer state of inactive layers is kept. ``cpu``: host memory (the paper's way). ``nvme``: files on
    a local disk. ``none``: the device; the state of every layer that was ever active stays there (LISA's way)."""

    residency: Literal["stream", "period"] = "stream"
    """What the device holds. ``stream``: ``device_buffers`` chunks at a time, moved in and out at every step (the
    paper's way). ``period``: the whole state of the active layers from one draw to the next, so that transfers happen
    at draws only. No effect with ``none``."""

    state_format: Literal["fp32", "exact", "bf16", "8bit"] = "fp32"
    """In which form the state is kept, moved and saved; a step computes in fp32 all the same. ``fp32``: 12 bytes per
    weight with AdamW. ``exact``: of the master weights only what the bf16 weights do not say, so that nothing is lost:
    10.1 bytes. ``bf16``: also the moments in bf16, rounded stochastically: 6.1 bytes. ``8bit``: the moments in 8 bits
    per element and a scale per 256 elements: 4.2 bytes. fp32 weights are their own master weights in all but ``fp32``;
    with fp16 weights ``exact`` is refused, and the others keep fp32 master weights."""

    nvme_path: str | None = None
    """Folder on a local disk for the state files; ``nvme`` needs it. One job may use it at a time. It must exist, so
    that a disk that is not mounted is an error. ``$VARIABLES`` are expanded. The files are removed at the end of the
    run."""

    pin_memory: bool = True
    """Page-lock host memory. Transfers are then faster and overlap with compute. No effect on the CPU accelerator."""

    chunk_numel: int = Field(4 * 1024 * 1024, ge=1)
    """Elements of a layer's shard that are moved and stepped at a time. The value is rounded up to a multiple of 1024
    and limited to the largest shard. A device buffer takes 12 bytes per element: two buffers of the default size take
    100 MB."""

    host_buffers: int | None = Field(None, ge=1)
    """Host buffers, of one chunk each, between disk and device; ``nvme`` only. At least ``device_buffers`` + 2. Null:
    with ``stream`` as many as the active layers need, up to 4 GiB, so that files are touched at draws only; with
    ``period`` the larger of 4 and ``device_buffers`` + 2."""

    device_buffers: int = Field(2, ge=1)
    """Chunks on the device at a time; ``stream`` only. With 1, transfers do not overlap with the step."""

    prefetch: Literal["backward", "step"] = "backward"
    """When a layer's state is copied to the device. ``backward``: as soon as its gradient is reduced. ``step``: only
    when the optimizer steps."""

    checksum: bool = False
    """Verify a CRC-32 of everything that is read from the state files; ``nvme`` only."""

    io: Literal["auto", "aio", "posix"] = "auto"
    """How state files are read and written; ``nvme`` only. ``aio``: DeepSpeed's asynchronous I/O, configured by the
    top-level ``"aio"`` block; it needs libaio and a compiler. ``posix``: direct reads and writes by threads. ``auto``:
    ``aio`` where it works, else ``posix``."""

    trace: str | None = None
    """Path of a Chrome trace of all transfers, one file per rank. Null: no trace."""

    @model_validator(mode="after")
    def _consistent(self) -> "OffloadConfig":
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError('device "nvme" needs nvme_path: name an existing folder on a local disk')
        least = self.device_buffers + 2
        if self.host_buffers is not None and self.host_buffers < least:
            raise ValueError(
                f"host_buffers = {self.host_buffers} is too few for device_buffers = {self.device_buffers}: "
                f"at least {least} are needed, or null for the default"
            )
        return self


class GrassConfig(_Block):
    """The ``"grass"`` block. A field that is left out or null has its default."""

    enabled: bool = True
    """Whether layers are sampled. ``false``: the engine is stock DeepSpeed."""

    sampler: str = Field("grass", examples=[*SAMPLERS])
    """How active layers are drawn. ``grass``: by gradient norm, which is measured again during training. ``static``:
    by gradient norm, measured once (the paper's ablation GRASS*). ``outlier``: by the share of weights that are
    outliers, measured once (OWS, the sampling of OwLore). ``uniform``: at random (LISA). ``cyclic``: in turn
    (BAdam). ``module``: single weight matrices, by gradient norm and within ``module_budget`` (MISA); norms and biases
    inside the layers do not train then. ``ist``: the LoRA adapters of a PEFT model, by how much the loss depends on
    them (IST); on ZeRO-1 and 2. ``full``: all parameters always train, embeddings and head included (plain
    fine-tuning). Others: an entry point of the group ``grass_ds.samplers``, or the path of a class as in
    ``my_package.my_module.MySampler``."""

    num_active_layers: int = Field(8, ge=1)
    """Layers that train at a time (paper: gamma); more mean less loss, more memory and more time. If it is at least the
    number of layers, all layers train and nothing is sampled. Parameters outside the layers follow ``always_active``
    all the same. Not read by ``module``. [ours]"""

    stratified: bool = False
    """A draw takes one layer from each of ``num_active_layers`` equal parts of the depth, with the sampler's chances
    inside a part. Samplers ``uniform``, ``grass``, ``static``, ``outlier`` and ``ist`` only."""

    memory_budget: str | None = None
    """Device memory that the tensors of a rank may take, as in ``22GB``; leave about 1 GB of the device to its driver
    and to fragmentation. ``num_active_layers`` is then the largest number that fits by the plan
    (``docs/planning.md``); leave it out, or write "auto", which accelerate does not let through. It needs
    ``row_length`` and a Hugging Face model. Samplers of whole layers only."""

    row_length: int | None = Field(None, ge=1)
    """Tokens of the longest row, for ``memory_budget``."""

    module_budget: float = Field(0.03, gt=0, le=1)
    """Largest share of the weights inside the layers that trains at a time (paper of MISA: delta; vectors, which never
    train, not counted). At least that of the largest matrix. Sampler ``module`` only."""

    probe_steps: int = Field(20, ge=1)
    """Steps of one probing phase (paper: T_p). Such a step runs forward and backward through all layers, measures
    their gradients and updates nothing. Probing comes before training and every ``reprobe_period``. With ``outlier``
    these steps are the calibration: backward runs through the topmost layer only. Samplers ``grass``, ``static`` and
    ``outlier`` only. [ours]"""

    sample_period: int = Field(25, ge=1)
    """Optimizer steps between two draws (paper: T_s; 25 to 50 were best there). With ``module`` the first draws, up to
    the last matrix's first, are one step apart. [ours]"""

    refresh_period: int = Field(50, ge=1)
    """Optimizer steps between two updates of the scores (paper: T_u). Samplers ``grass`` and ``ist`` only; ``module``
    updates them before every draw. [ours]"""

    reprobe_period: int = Field(0, ge=0)
    """Optimizer steps between two probing phases; 0: one phase, before training (the paper). A new phase replaces the
    scores of all layers and ends with a draw. It helps where the scores of inactive layers become stale. Use a
    multiple of ``sample_period``: its count continues through probing, so the set drawn otherwise trains for the rest
    of a period only. Sampler ``grass`` only. [ours]"""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Temperature of the softmax over the scores (paper: tau). A low value draws the layers with the largest gradients
    nearly always; a high value draws nearly uniformly. It has no unit if ``score_normalization`` is ``mean``. With
    ``module`` it divides squared gradient norms, which are then cut at 5 (its paper: 1 / eta). [ours]"""

    ema_alpha: float = Field(0.5, gt=0, le=1)
    """Weight of the new measurement in an update of the scores (paper: alpha; of MISA: 1 - beta). [ours]"""

    score_normalization: Literal["mean", "none"] = "mean"
    """Scaling of the scores before the softmax. ``mean``: they are divided by their mean, so that ``temperature`` has
    no unit [ours]. ``none``: raw gradient RMS (the paper's formula). Raw values are far below 1, and the temperature
    must be of their size. Not read by ``module``."""

    outlier_threshold: float = Field(13.0, gt=0, allow_inf_nan=False)
    """A weight is an outlier if its absolute value times the norm of its input feature is above this many times the
    mean of its layer (paper: M). 13 is what the name of the ratio file says that was released with the paper's code.
    Sampler ``outlier`` only."""

    always_active: tuple[Literal["embed", "norm", "head", "other"], ...] | None = None
    """Modules outside the layers that always train. ``embed``: the embeddings. ``norm``: the final norm. ``head``: the
    output layers, that is the projection to the vocabulary or, in a model without one, everything above the layers (a
    classifier, the score of a reward model). ``other``: everything else (a value head, a projector), and model parts
    with layers of their own (an encoder, a vision tower). Null: all but the embeddings, the projection to the
    vocabulary and such model parts; in a language model that is the final norm [ours]. With ``embed``, backward always
    runs to the bottom, and embeddings and head are most of the trained weights (70 % at 8B). With tied embeddings
    ``embed`` and ``head`` are the same. A module that the model lacks is an error."""

    layers_path: str | None = None
    """Dotted path of the list of decoder layers, for example ``model.layers``. Null: found by inspection of the
    model."""

    cyclic_order: Literal["random", "ascending", "descending"] | tuple[int, ...] = "random"
    """Order in which layers take turns. ``random``: a new permutation for every cycle. A list: these layers in this
    order; others do not train. Sampler ``cyclic`` only."""

    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the sampler's own random generator. The global generators are neither read nor advanced."""

    expansion: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Step of the inactive layers above the lowest active one, whose gradients backward can give anyway: their weights
    move by this share of the learning rate against the sign of the gradient, without optimizer state (relatives: BREAD,
    FRUGAL). 0: they do not move."""

    expansion_depth: int | None = Field(None, ge=0)
    """``expansion`` moves layers down to this one, too, so that backward always runs down to it. Null: down to the
    lowest active layer."""

    sampler_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a sampler that is not one of ours."""

    missing_gradients: Literal["error", "zero"] = "error"
    """What happens if an active layer, or a module of ``always_active``, receives no gradient on any rank in a whole
    accumulation window. ``error``: training stops with the name and likely causes; for modules that train by default,
    without being listed, there is one warning. ``zero``: the gradient counts as zeros, as in DeepSpeed. Use it for
    data of which some rows do not use the module (text rows beside a vision tower), and for layers that are dropped at
    random (LayerDrop)."""

    state_on_switch: Literal["keep", "reset"] = "keep"
    """What happens to the optimizer state of a layer that leaves the active set. ``keep``: moments, step count and
    master weights are kept until its return (the paper). ``reset``: they are dropped, and built anew from the weights
    (BAdam)."""

    offload: OffloadConfig = Field(default_factory=OffloadConfig)
    """Where optimizer state is kept while its layer does not step: the keys below."""

    @model_validator(mode="before")
    @classmethod
    def _budget_chooses(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("num_active_layers") == "auto":
            if data.get("memory_budget") is None:
                raise ValueError('num_active_layers = "auto" needs memory_budget and row_length')
            return {key: value for key, value in data.items() if key != "num_active_layers"}
        return data

    @field_validator("memory_budget")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _budgeted(self) -> "GrassConfig":
        if self.memory_budget is None:
            if self.row_length is not None:
                raise ValueError(f"row_length = {self.row_length} has no effect without memory_budget: leave it out")
            return self
        if self.row_length is None:
            raise ValueError(
                f'memory_budget = "{self.memory_budget}" needs row_length: set it to the longest row in tokens'
            )
        if "num_active_layers" in self.model_fields_set:
            raise ValueError(
                f"num_active_layers = {self.num_active_layers}, but memory_budget chooses it: leave one of them out"
            )
        drawn = find_sampler(self.sampler)
        if drawn.draws_weights or drawn.adapters or not drawn.draws:
            raise ValueError(f'memory_budget has no effect with sampler "{self.sampler}": leave it out')
        return self

    @field_validator("sampler")
    @classmethod
    def _is_known(cls, value: str) -> str:
        find_sampler(value)
        return value

    @model_validator(mode="after")
    def _expands(self) -> "GrassConfig":
        if self.expansion_depth is not None and self.expansion == 0:
            raise ValueError(
                f"expansion_depth = {self.expansion_depth} has no effect without expansion: set expansion above 0, or "
                "leave expansion_depth out"
            )
        if self.expansion > 0 and self.sampler == "full":
            raise ValueError(
                f'expansion = {self.expansion:g} has no effect with sampler "full", which trains all layers: leave it out'
            )
        return self

    def controller_arguments(self) -> dict[str, Any]:
        """The keyword arguments of :class:`Controller` that are keys of the block."""
        return self.model_dump(include={field.name for field in dataclasses.fields(SamplingSettings)})

    def controller(self, layers: ModelLayers) -> Controller:
        """The controller that draws from these layers. Raises ValueError if the sampler refuses its settings."""
        return Controller(len(layers.names), sizes=layers.sizes, **self.controller_arguments())


def parse_grass_block(ds_config: Mapping[str, Any]) -> GrassConfig | None:
    """Return the validated ``"grass"`` block of a DeepSpeed config, None if there is none or it is disabled.

    Raises:
        GrassConfigError: every bad key with its value, the allowed range and the remedy.
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
    try:
        config = GrassConfig(**block)
    except ValidationError as error:
        raise GrassConfigError(_explain(error)) from None
    return config if config.enabled else None


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        # Of a union, pydantic names the alternative: "cyclic_order", "tuple[int, ...]", 0.
        path = ".".join((BLOCK, *(str(part) for part in detail["loc"] if "[" not in str(part))))
        if detail["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key. {_nearest(detail['loc'])}")
        else:
            message = detail["msg"].replace("valid tuple", "valid list").removeprefix("Value error, ")
            remedy = _REMEDIES.get(str(detail["loc"][0])) if detail["loc"] else None
            lines.append(f"{path}: got {detail['input']!r}; {message}" + (f"; {remedy}" if remedy else ""))
    return f'the "{BLOCK}" block of the DeepSpeed config is wrong:\n  - ' + "\n  - ".join(lines)


def _nearest(loc: Sequence[int | str]) -> str:
    model = OffloadConfig if len(loc) > 1 else GrassConfig
    close = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(model.model_fields)}"
