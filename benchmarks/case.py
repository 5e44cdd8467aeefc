# SPDX-License-Identifier: Apache-2.0
"""A case of a benchmark: one method in one setting with one seed; ``worker.py`` measures it into a row of a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Fields have the defaults of a row that does not name them. A row holds its case as JSON under ``cell``.

    Attributes:
        kind: what is measured, a key of ``worker.MEASUREMENTS``.
        method: a name of ``methods.METHODS``.
        model: a name that ``models.load`` knows.
        micro_batch, accumulation, sequence: rows, micro-batches, tokens per row of one optimizer step on one rank.
        warmup, steps: steps before the measured ones (cost), and the measured ones (quality: all steps).
        grass: merged into the method's "grass" block.
        offload: a name of ``offload.suite.OFFLOADS``; None: the method's own. Keys of ``grass["offload"]`` are added.
        prepare_state: allocate the optimizer state of all layers before the first step.
        plain: time the same passes in plain PyTorch afterwards (cost).
        async_save: write the checkpoint in the background (checkpoint).
        task, test_rows: what is trained on, and rows per measurement (quality).
        tuning: measure the development loss alone (quality).
        answers: have the test answers graded, too (quality).
        curve: measure that loss every so many steps (quality); 0: never.
        schedule: of the learning rate after its warm-up, to zero: "linear" or "cosine".
        ramp: after every draw the rate rises linearly again over so many steps (quality); 0: it does not.
        dtype, disk, data: precision, folder on a local disk, folder of data sets; not part of the key.
    """

    kind: str
    method: str
    model: str = "smollm2-135m"
    ranks: int = 1
    stage: int = 2
    micro_batch: int = 2
    accumulation: int = 1
    sequence: int = 128
    warmup: int = 2
    steps: int = 8
    lr: float = 2e-4
    seed: int = 0
    grass: dict[str, Any] = field(default_factory=dict)
    offload: str | None = None
    prepare_state: bool = False
    checkpointing: bool = False
    plain: bool = False
    async_save: bool = False
    task: str | None = None
    test_rows: int = 48
    tuning: bool = False
    answers: bool = True
    curve: int = 0
    schedule: str = "linear"
    ramp: int = 0
    dtype: str = "bf16"
    disk: str | None = None
    data: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case of a JSON object. Old rows write ``micro-batch``, and ``async`` for ``async_save``."""
        given = {name.replace("-", "_"): value for name, value in json.loads(text).items()}
        return cls(**{"async_save" if name == "async" else name: value for name, value in given.items()})

    def text(self, *, local: bool = False) -> str:
        """JSON of the fields that differ from their defaults; ``local``: with ``dtype``, ``disk`` and ``data``.

        Cases with the same text are the same, so it is the key of a row.
        """
        default = asdict(Case(kind="", method=""))
        hidden = () if local else ("dtype", "disk", "data")
        changed = {
            name: value for name, value in asdict(self).items() if value != default[name] and name not in hidden
        }
        return json.dumps(changed, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks of a suite; ``rows`` are those in its file.

    Attributes:
        rounds: repetitions of the whole suite, each with a seed of its own (not of quality).
        parts, tasks: of the quality suite; tasks also of the suite of samplers.
    """

    rounds: int = 3
    parts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rows: Sequence[Row] = ()


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, none if there is no file. Fields that old rows lack are filled in.

    Raises:
        ValueError: the file holds rows of several precisions, which no table may compare.
    """
    rows = [_complete(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    if len(found := sorted({row["dtype"] for row in rows})) > 1:
        raise ValueError(
            f"{file}: rows of {' and '.join(found)}; a file holds one precision, so keep them in two folders"
        )
    return rows


def _complete(row: Row) -> Row:
    """Rows without these fields are of bf16, and cases of quality then ran two at a time."""
    return {"dtype": "bf16", "jobs": 2 if row["kind"] == "quality" else 1, **row}
