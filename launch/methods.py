"""The methods of launch/train.py --method: which DeepSpeed configuration each one takes, and what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass_ds.config import parse_grass_block

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


@dataclass(frozen=True)
class Method:
    """What distinguishes a method.

    Attributes:
        config: its file in ds_configs/, taken without --deepspeed.
        sampler: `sampler` of the "grass" block that its configuration has; None: the configuration has no block.
        adapters: LoRA adapters (PEFT) train instead of the model's own weights.
        frozen: adapter parameters with this in their name do not train.
    """

    config: str
    sampler: str | None = None
    adapters: bool = False
    frozen: str | None = None


# One line per method.
METHODS: dict[str, Method] = {
    "full": Method("full.json"),
    "lora": Method("full.json", adapters=True),
    "lora-fa": Method("full.json", adapters=True, frozen="lora_A"),
    "grass": Method("grass.json", sampler="grass"),
    "lisa": Method("lisa.json", sampler="uniform"),
    "badam": Method("badam.json", sampler="cyclic"),
    "ows": Method("ows.json", sampler="outlier"),
    "misa": Method("misa.json", sampler="module"),
    "ist": Method("ist.json", sampler="ist", adapters=True),
}
WITH_ADAPTERS = tuple(name for name, method in METHODS.items() if method.adapters)


def find(name: str) -> Method:
    """The method of this name. ValueError: there is none; names those that there are."""
    if name not in METHODS:
        raise ValueError(f"--method {name}: no such method; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def check_config(name: str, path: Path, ds_config: Mapping[str, Any]) -> None:
    """Refuse a configuration that trains by another method than `name`.

    Raises:
        ValueError: the sampler of the "grass" block is another, there is none, or there should be none; names both.
    """
    wanted, block = find(name).sampler, parse_grass_block(ds_config)
    found = None if block is None else block.sampler
    if found != wanted:
        raise ValueError(
            f"--method {name} and --deepspeed {path} contradict each other: the method needs {_described(wanted)}, "
            f"the file has {_described(found)}; leave out one of the two, or give a file that fits, such as "
            f"ds_configs/{find(name).config}"
        )


def _described(sampler: str | None) -> str:
    return 'no "grass" block' if sampler is None else f'a "grass" block with the sampler {sampler!r}'
