# SPDX-License-Identifier: Apache-2.0
"""The precision of a file of rows: as asked, as the rows in it, or what the hardware computes."""

from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grass_ds.precision import DTYPES, Rates, candidates, measure

__all__ = ["AUTO", "BYTES", "STATE", "Choice", "candidates", "choose", "measured"]
AUTO = "auto"
# Bytes of a weight, a gradient, an activation.
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
STATE = 12  # bytes of optimizer state per element that trains, in every precision: fp32 master weight and two moments


@dataclass(frozen=True)
class Choice:
    """A precision, the reason for it, and a warning if the device is slow in it."""

    name: str
    reason: str
    warning: str | None = None


def measured(names: Collection[str]) -> Rates:
    """The rates of this device, measured in a process that ends, as the cases need all memory of a GPU."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, names).result()


def choose(
    asked: str, file: Path, rows: Sequence[dict[str, Any]], rates: Rates, among: Collection[str] = tuple(DTYPES)
) -> Choice:
    """The precision of the cases that are to run.

    Args:
        asked: what the user says, :data:`AUTO` or a name of :data:`DTYPES`.
        file: of the rows.
        rows: that are in it already, all of one precision.
        rates: of the device; of the precisions asked for and in the file, too.
        among: what the device may be given unasked.

    Raises:
        ValueError: the device cannot have it, or the user has to decide; says how to go on.
    """
    there = rows[0]["dtype"] if rows else None
    if asked == AUTO and there is None:
        return Choice(rates.recommended(among), "by what the hardware computes")
    if asked not in (AUTO, there) and there is not None:
        raise ValueError(
            f"{file} holds rows of {there}, and --dtype asks for {asked}: measure {asked} into a folder of its own "
            "with --rows FOLDER"
        )
    name = there if asked == AUTO else asked
    if name != "fp32" and not rates.gflops[name]:
        raise ValueError(f"{_why(asked, file, name)}: {name} does not work on this device; {_elsewhere(rates, among)}")
    warning = rates.warning(name, among)
    if asked != AUTO:
        return Choice(name, f"asked for by --dtype {name}", warning)
    if warning is not None:
        raise ValueError(
            f"{_why(asked, file, name)}: {warning}; {_elsewhere(rates, among)}, or go on in {name} nevertheless with "
            f"--dtype {name}"
        )
    return Choice(name, f"as the rows in {file}")


def _why(asked: str, file: Path, name: str) -> str:
    return f"--dtype {name}" if asked != AUTO else f"{file} holds rows of {name}"


def _elsewhere(rates: Rates, among: Collection[str]) -> str:
    return f"measure rows of {rates.recommended(among)} into a folder of their own with --rows FOLDER"
