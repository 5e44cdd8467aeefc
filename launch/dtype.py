"""The precision of a run, the same on every rank: chosen by the user, the checkpoint or the hardware."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass_ds import precision
from launch import adapters, distributed

AUTO = "auto"
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_SAFETENSORS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class Choice:
    """A precision, and why.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        reason: who or what decided, for people.
        rates: of matrix products on the rank whose device lacks 16 bits the most.
    """

    name: str
    reason: str
    rates: precision.Rates

    def announce(self) -> None:
        """Say it on rank 0, with a warning if the device emulates the dtype."""
        if distributed.rank() == 0:
            print(f"precision: {self}", flush=True)
            precision.warn_if_emulated(self.name, self.rates)

    def as_dict(self) -> dict[str, Any]:
        """For reports: name, reason and GFLOP/s by dtype."""
        return {"name": self.name, "reason": self.reason, "gflops": dict(self.rates.gflops)}

    def __str__(self) -> str:
        return f"{self.name}, {self.reason} ({self.rates.text()})"


def measured(names: Collection[str] = ()) -> precision.Rates:
    """The rates of the rank whose device is slowest in 16 bits, relative to its fastest dtype; collective.

    The run cannot use what that device emulates.
    """
    everywhere = distributed.gather(lambda: precision.measure(names))
    return min(
        everywhere,
        key=lambda rates: [rates.gflops[name] / rates.fastest for name in rates.gflops if name != "fp32"],
    )


def asked_for(name: str, reason: str) -> Choice:
    """The precision that somebody asked for."""
    return Choice(name, reason, measured([name]))


def by_hardware(among: Collection[str] = tuple(precision.DTYPES)) -> Choice:
    """The precision that all devices of the run compute."""
    rates = measured()
    restricted = f" of {', '.join(among)}" if len(among) < len(precision.DTYPES) else ""
    return Choice(rates.recommended(among), f"by what the hardware computes{restricted}", rates)


def choose(name: str) -> Choice:
    """The precision of a `--dtype` option: "auto", a short name or torch's name.

    Raises:
        ValueError: an unknown name.
    """
    if name == AUTO:
        return by_hardware()
    short = _SHORT.get(name, name)
    if short not in precision.DTYPES:
        raise ValueError(f"--dtype {name!r}: choose one of {', '.join([AUTO, *precision.DTYPES])}")
    return asked_for(short, f"asked for by --dtype {name}")


def choose_for_training(
    ds_config: Mapping[str, Any], options: Mapping[str, bool | None], checkpoint: str | None
) -> Choice:
    """The precision to train in.

    Args:
        ds_config: the DeepSpeed configuration; "auto" in `bf16.enabled` or `fp16.enabled` leaves that one open.
        options: --bf16 and --fp16 by name; None where the command line does not say.
        checkpoint: the folder that the run continues from. It keeps its precision, also on another machine.

    Raises:
        ValueError: an option that the configuration has no block for: DeepSpeed would train in fp32.
    """
    enabled = {name: precision.enabled(ds_config, name) for name in options}
    for name, value in options.items():
        if value and enabled[name] is None:
            raise ValueError(
                f'--{name} true: the DeepSpeed configuration has no "{name}" block, so DeepSpeed would train in fp32; '
                f'add "{name}": {{"enabled": "auto"}} to it'
            )
        if value:
            return asked_for(name, f"asked for by --{name}")
    unsaid = [name for name, value in options.items() if value is None]
    for name in unsaid:
        if enabled[name] is True:
            return asked_for(name, "as the DeepSpeed configuration says")
    undecided = [name for name in unsaid if enabled[name] == AUTO]
    if not undecided:
        return asked_for("fp32", "as the DeepSpeed configuration and the command line leave no other")
    # Rank 0's answer: another machine may not see the file yet, and what follows is collective.
    saved = distributed.gather(lambda: _saved_dtype(checkpoint) if distributed.rank() == 0 else None)[0]
    if saved in (*undecided, "fp32"):
        return asked_for(saved, f"as {checkpoint} was trained")
    return by_hardware((*undecided, "fp32"))


def _saved_dtype(checkpoint: str | None) -> str | None:
    """The precision of the model or the adapters in a checkpoint of the Trainer; None where it does not say."""
    if checkpoint is None:
        return None
    file = Path(checkpoint) / "config.json"
    if not file.is_file():  # as with adapters, which have the dtype of their model
        return _SAFETENSORS.get(adapters.saved_dtype(Path(checkpoint)) or "")
    with contextlib.suppress(ValueError):  # a file that cannot be read says nothing; loading the model will say why
        config = json.loads(file.read_text())
        return _SHORT.get(str(config.get("dtype") or config.get("torch_dtype")))  # transformers 5, transformers 4
    return None
