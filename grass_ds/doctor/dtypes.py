# SPDX-License-Identifier: Apache-2.0
"""The precision to train in on this device, and whether it computes the one that a DeepSpeed config asks for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grass_ds import precision
from grass_ds.doctor.finding import FAIL, OK, Finding


def check_precision(config: str | None) -> Iterator[Finding]:
    """Time matrix products. ``config``: path of a DeepSpeed config, or None."""
    asked = [] if config is None else asked_for(config)
    yield from judge_precision(precision.measure(asked), precision.candidates(), config, asked)


def asked_for(config: str) -> list[str]:
    """The 16-bit dtypes that the DeepSpeed config in the file enables; "auto" asks for none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object.
    """
    try:
        found = json.loads(Path(config).read_text())
    except ValueError as error:
        raise ValueError(f"{config}: not valid JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{config}: must hold a JSON object, not a {type(found).__name__}")
    return [name for name in ("bf16", "fp16") if precision.enabled(found, name) is True]


def judge_precision(
    rates: precision.Rates, candidates: Sequence[str], config: str | None, asked: Sequence[str]
) -> Iterator[Finding]:
    """``candidates``: what training may choose here; ``asked``: what ``config`` enables."""
    yield Finding("precision", OK, f"train in {rates.recommended(candidates)}: {rates.text()}")
    if config is not None and not asked:
        yield Finding("config", OK, f"{config} asks for no 16-bit precision by itself")
    for name in asked:
        warning = rates.warning(name, candidates)
        if warning is None:
            yield Finding("config", OK, f"{config} asks for {name}, which this device computes")
        else:
            remedy = (
                f'"{name}": {{"enabled": "auto"}} under launch/train.py or the Trainer; no such block in your own loop'
            )
            yield Finding("config", FAIL, f"{config}: {warning}", remedy)
