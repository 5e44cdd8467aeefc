# SPDX-License-Identifier: Apache-2.0
"""The installed packages against the ranges that grass_ds is tested with, and whether they load."""

import importlib
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.versions import RANGES, installed, is_tested, remedy

# What a training script may use without needing it, by the name of the extra.
EXTRAS = {"launch": "datasets", "wandb": "wandb", "mpi": "mpi4py", "tensorboard": "tensorboard", "peft": "peft"}
CORE = ("python", "torch", "deepspeed", "transformers", "accelerate", "datasets")


def check_versions() -> Iterator[Finding]:
    """Python and the packages that grass_ds needs, against the ranges that it is tested with."""
    for name in RANGES:
        if name not in EXTRAS.values():
            yield judge_version(name, installed(name))
    for extra, name in EXTRAS.items():
        found = installed(name)
        if found is None:
            yield Finding(name, OK, f"not installed (optional: pip install 'grass_ds[{extra}]')")
        elif name in RANGES:
            yield judge_version(name, found)
        else:
            yield Finding(name, OK, found)


def judge_version(name: str, found: str | None) -> Finding:
    """What to say of version ``found`` (None: not installed) of a package that has a range."""
    if found is None:
        return Finding(name, FAIL, "not installed", remedy(name))
    if is_tested(name, found):
        return Finding(name, OK, f"{found} ({RANGES[name]})")
    return Finding(name, WARN, f"{found} is outside of the tested range {RANGES[name]}", remedy(name))


def installed_versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    return {name: installed(name) or "missing" for name in CORE}


def check_import() -> Iterator[Finding]:
    """Whether the library loads, which checks DeepSpeed for the names that it relies on."""
    importlib.import_module("grass_ds.zero.engine")
    yield Finding("import", OK, "torch, deepspeed and grass_ds load")


def check_wandb() -> Iterator[Finding]:
    """Where ``--report_to wandb`` would log to. Never more than a hint: training does not need it."""
    if installed("wandb") is None:
        return
    mode = os.environ.get("WANDB_MODE", "online")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if mode in ("offline", "disabled"):
        yield Finding("wandb login", OK, f"not needed: WANDB_MODE={mode}")
    elif os.environ.get("WANDB_API_KEY"):
        yield Finding("wandb login", OK, "WANDB_API_KEY is set")
    elif _in_netrc(host):
        yield Finding("wandb login", OK, f"there is a key for {host}")
    else:
        yield Finding(
            "wandb login", OK, "nobody is logged in", "for --report_to wandb: wandb login, or WANDB_MODE=offline"
        )


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
