"""The precision of a run: what the user, the configuration or the checkpoint fixes, else what the devices compute. The same on every rank."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass_ds import precision
from launch import distributed

AUTO = "auto"
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Choice:
    """A precision, and why.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        reason: who or what decided, for people.
        rates: of matrix products on the slowest rank.
    """

    name: str
    reason: str
    rates: precision.Rates

    def announce(self) -> None:
        """Say it on rank 0, with a warning if the device emulates the dtype."""
        if distributed.rank() == 0:
            print(f"precision: {self}", flush=True)
            precision.warn_if_emulated(self.name)

    def as_dict(self) -> dict[str, Any]:
        """For reports: name, reason and GFLOP/s by dtype."""
        return {"name": self.name, "reason": self.reason, "gflops": dict(self.rates.gflops)}

    def __str__(self) -> str:
        return f"{self.name}, {self.reason} ({self.rates.text()})"


def measured(names: Collection[str] = ()) -> precision.Rates:
    """The rates of this run's devices: of each dtype the lowest over all ranks. Collective."""
    mine = precision.measure(names).gflops
    return precision.Rates({name: -distributed.max_over_ranks(-rate) for name, rate in mine.items()})


def asked_for(name: str, reason: str) -> Choice:
    """The precision that somebody asked for."""
    return Choice(name, reason, measured([name]))


def by_hardware(among: Collection[str] = tuple(precision.DTYPES)) -> Choice:
    """The precision that all devices of the run compute."""
    rates = measured()
    return Choice(rates.recommended(among), "by what the hardware computes", rates)


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
        checkpoint: the folder that the run continues from. It keeps the precision it began with, also on another machine.

    Raises:
        ValueError: an option that the configuration has no block for: DeepSpeed would train in fp32.
    """
    enabled = {name: _enabled(ds_config, name) for name in options}
    for name, value in options.items():
        if value and enabled[name] is None:
            raise ValueError(
                f'--{name} true: the DeepSpeed configuration has no "{name}" block, so DeepSpeed would train in fp32; add "{name}": '
                '{"enabled": "auto"} to it'
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
    saved = None if checkpoint is None else _saved_dtype(Path(checkpoint))
    if saved in (*undecided, "fp32"):
        return asked_for(saved, f"as {checkpoint} was trained")
    return by_hardware((*undecided, "fp32"))


def _enabled(ds_config: Mapping[str, Any], name: str) -> Any:
    block = ds_config.get(name)
    return block.get("enabled") if isinstance(block, Mapping) else None


def _saved_dtype(checkpoint: Path) -> str | None:
    """The precision of the model in a checkpoint of the Trainer; None where it does not say."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    name = config.get("dtype") or config.get("torch_dtype")  # transformers 5, transformers 4
    return _SHORT.get(str(name))
