"""LoRA adapters by PEFT: made before training, restored when a run resumes, loaded for evaluation."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

DEFAULT_RANK = 128
ALL_LINEAR = "all-linear"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ADAPTER = "default"  # PEFT's name of the only adapter
_PARAMETERS = "lora_"  # in the name of every parameter of an adapter
_PEFT = "PEFT, which is not installed: pip install '.[peft]' in the folder of grass_ds"


@dataclass(frozen=True)
class Lora:
    """Adapters to train.

    Attributes:
        rank: of the update of each weight matrix.
        alpha: the update is scaled by alpha / rank.
        targets: names of the modules that get one, or "all-linear".
        frozen: parameters with this in their name do not train; None: all adapter parameters train.
    """

    rank: int
    alpha: int
    targets: str | tuple[str, ...]
    frozen: str | None

    @classmethod
    def choose(cls, rank: int | None, alpha: int | None, targets: str | None, frozen: str | None) -> Lora:
        """The values of --lora_rank, --lora_alpha and --lora_targets, with defaults for None.

        Raises:
            ValueError: a value that cannot work.
        """
        rank = DEFAULT_RANK if rank is None else rank
        alpha = 2 * rank if alpha is None else alpha
        for name, value in (("rank", rank), ("alpha", alpha)):
            if value < 1:
                raise ValueError(f"--lora_{name} must be at least 1, got {value}")
        if targets is None or targets == ALL_LINEAR:
            return cls(rank, alpha, ALL_LINEAR, frozen)
        names = tuple(name.strip() for name in targets.split(","))
        if not all(names):
            raise ValueError(f"--lora_targets {targets!r}: give names of modules separated by commas, or {ALL_LINEAR}")
        return cls(rank, alpha, names, frozen)


def check(who: str, lora: Lora, ds_config: Mapping[str, Any]) -> None:
    """Find out before training whether adapters can be made and saved.

    Args:
        who: the option that asks for adapters.

    Raises:
        ValueError: PEFT is not installed, or the adapters could not be saved from ZeRO-3.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{who} needs {_PEFT}")
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3 or "grass" in ds_config:  # which has its own word on the stage
        return
    if lora.frozen is not None:
        raise ValueError(
            f"{who} with ZeRO-3: the Trainer would save the adapters without their frozen part; give a --deepspeed "
            "file with ZeRO stage 1 or 2"
        )
    key = "stage3_gather_16bit_weights_on_model_save"
    if not zero.get(key):
        raise ValueError(f'{who} with ZeRO-3 could not save adapters: set "{key}": true in "zero_optimization"')


def wrap(model: PreTrainedModel, lora: Lora, checkpointing: bool = False) -> Any:
    """The model with new adapters in its own dtype; its own weights are frozen. A has random values, B is zero.

    Args:
        checkpointing: whether activations will be recomputed in backward.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ValueError: a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    modules = [name for name, _ in model.named_modules()]
    for target in () if isinstance(lora.targets, str) else lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(
                f"--lora_targets: the model has no module {target!r}; its linear ones are {', '.join(linear)}"
            )
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    adapted = _quietly(get_peft_model, model, config)
    base = Path(model.name_or_path)
    if base.is_dir():  # so that the adapters find it from everywhere
        adapted.peft_config[_ADAPTER].base_model_name_or_path = str(base.resolve())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (lora.frozen and lora.frozen in name))
    if checkpointing:
        adapted.enable_input_require_grads()  # or a recomputed layer would have no input that needs a gradient
    return adapted


def restore(adapted: Any, checkpoint: Path) -> None:
    """Take the adapters of a checkpoint. The engine restores those that train, but it does not save frozen ones.

    Args:
        adapted: what `wrap` returned; changed in place.

    Raises:
        ValueError: the checkpoint has no adapters, or others.
    """
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    where = f"--resume_from_checkpoint {checkpoint}"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{where}: has no {name}, so it is not of a run with adapters; leave out --method")
    own, saved = adapted.peft_config[_ADAPTER], LoraConfig.from_pretrained(str(checkpoint))
    for option, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha"), ("lora_targets", "target_modules")):
        ours, theirs = getattr(own, key), getattr(saved, key)
        if ours != theirs:
            raise ValueError(f"{where}: was trained with --{option} {_text(theirs)}, this run has {_text(ours)}")
    set_peft_model_state_dict(adapted, load_peft_weights(str(checkpoint), device="cpu"))


def refuse(checkpoint: Path) -> None:
    """ValueError: the checkpoint is of a run with adapters, and this run has none."""
    if (checkpoint / CONFIG_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: is of a run with adapters; give the --method that it was started "
            "with"
        )


def saved_dtype(checkpoint: Path) -> str | None:
    """The dtype of the adapters in a checkpoint, as safetensors names it ("BF16"); None without adapters."""
    from safetensors import safe_open

    if not (checkpoint / WEIGHTS_FILE).is_file():
        return None
    with safe_open(checkpoint / WEIGHTS_FILE, framework="pt") as weights:
        return next((str(weights.get_slice(name).get_dtype()) for name in weights.keys()), None)  # noqa: SIM118


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the adapters; none without adapters."""
    return (value for name, value in model.named_parameters() if is_adapted(model) and _PARAMETERS in name)


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model."""
    return hasattr(model, "peft_config")


def base_model(folder: str) -> str | None:
    """The model that the adapters in a folder are for; None: the folder holds no adapters.

    Raises:
        ValueError: the adapters' config does not name a model.
    """
    file = Path(folder).expanduser() / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        name = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file}: base_model_name_or_path does not say for which model the adapters are")
    return name


def load_saved(model: PreTrainedModel, folder: str) -> Any:
    """The model with the adapters in a folder, not merged: a merge rounds the sum to the model's dtype.

    Raises:
        ValueError: PEFT is not installed, or the adapters do not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"--model {folder}: adapters need {_PEFT}")
    from peft import PeftModel

    path = str(Path(folder).expanduser())
    try:
        return _quietly(PeftModel.from_pretrained, model, path).eval()
    except RuntimeError as error:
        raise ValueError(f"--model {folder}: the adapters do not fit {model.name_or_path}: {error}") from error


def _quietly(make: Callable[..., Any], *arguments: Any) -> Any:
    """A model with adapters in its own dtype: the engine keeps fp32 masters, and ZeRO-3 refuses a second dtype."""
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5 renames.
        warnings.simplefilter("ignore", FutureWarning)
        return make(*arguments, autocast_adapter_dtype=False)


def _text(value: Any) -> str:
    return ",".join(sorted(value)) if isinstance(value, set | list) else str(value)
