# SPDX-License-Identifier: Apache-2.0
"""The installed packages against the ranges that grass_ds was tested with, and whether they load."""

import importlib
import netrc
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

# What a training script may use without needing it, by the name of the extra.
EXTRAS = ("wandb", "mpi", "tensorboard", "peft")
CORE = ("torch", "deepspeed", "transformers", "accelerate", "datasets")


def check_versions() -> Iterator[Finding]:
    """Python and the packages named in the metadata of grass_ds."""
    try:
        own = distribution("grass_ds")
    except PackageNotFoundError:
        found = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
        yield Finding(
            "versions", WARN, f"grass_ds is not installed, which knows the tested ones; {found}", "pip install -e ."
        )
        return
    yield from judge_versions(own.metadata["Requires-Python"] or "", own.requires or [])


def judge_versions(python: str, requirements: list[str]) -> Iterator[Finding]:
    """One finding per package of ``requirements`` (as in a package's metadata) and one for Python (range ``python``)."""
    yield _judge("python", platform.python_version(), python, required=True)
    for requirement in map(Requirement, requirements):
        extra = next((name for name in EXTRAS if _wanted(requirement, name)), None)
        required = _wanted(requirement, "")
        if required or extra:
            ranges = str(requirement.specifier)
            found = installed(requirement.name)
            if found is not None or required:
                yield _judge(requirement.name, found, ranges, required)
            else:
                yield Finding(requirement.name, OK, f"not installed (optional: pip install 'grass_ds[{extra}]')")


def installed(name: str) -> str | None:
    """The version of a package, None if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    return {"python": platform.python_version()} | {name: installed(name) or "missing" for name in CORE}


def check_import() -> Iterator[Finding]:
    """Whether the library loads, which checks DeepSpeed for the names that it relies on."""
    importlib.import_module("grass_ds.runtime.engine")
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


def _wanted(requirement: Requirement, extra: str) -> bool:
    return (
        requirement.marker is None
        if not extra
        else bool(requirement.marker and requirement.marker.evaluate({"extra": extra}))
    )


def _judge(name: str, found: str | None, ranges: str, required: bool) -> Finding:
    remedy = f"pip install '{name}{ranges}'" if name != "python" else f"use a Python {ranges}"
    if found is None:
        return Finding(name, FAIL, "not installed", remedy)
    if SpecifierSet(ranges).contains(found, prereleases=True):
        return Finding(name, OK, f"{found} ({ranges})")
    return Finding(name, FAIL if required else WARN, f"{found} is outside of the tested range {ranges}", remedy)


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
