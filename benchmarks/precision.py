# SPDX-License-Identifier: Apache-2.0
"""The precision of a file of rows: as the rows in it, as asked, or what the hardware computes."""

from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.case import Row
from grass_ds.precision import DTYPES, Rates, measure

AUTO = "auto"
# Bytes of a weight, a gradient, an activation.
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
STATE = 12  # bytes of optimizer state per element that trains, in every precision: fp32 master weight and two moments


def measured(names: Collection[str]) -> Rates:
    """The rates of this device, measured in a process that ends, as the cases need all memory of a GPU."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, names).result()


def choose(asked: str, file: Path, rows: Sequence[Row], rates: Rates, among: Collection[str]) -> tuple[str, str]:
    """The precision of the cases that are to run, and the reason, with a warning if the device lacks it.

    Args:
        asked: what the user says, :data:`AUTO` or a name of :data:`DTYPES`.
        file, rows: where rows go, and those that are there, all of one precision.
        rates: of the device; of the precisions asked for and in the file, too.
        among: what the device may be given unasked.

    Raises:
        ValueError: the rows have another precision than asked.
    """
    if rows and asked not in (AUTO, rows[0]["dtype"]):
        raise ValueError(
            f"{file} holds rows of {rows[0]['dtype']}, and --dtype asks for {asked}: measure {asked} into a folder of "
            "its own with --rows FOLDER"
        )
    if rows:
        name, reason = rows[0]["dtype"], f"as the rows in {file}"
    elif asked != AUTO:
        name, reason = asked, f"asked for by --dtype {asked}"
    else:
        name, reason = rates.recommended(among), "by what the hardware computes"
    warning = rates.warning(name, among)
    return name, f"{reason}; {warning}" if warning else reason
