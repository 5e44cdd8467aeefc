# SPDX-License-Identifier: Apache-2.0
"""A case of a benchmark: one method in one setting with one seed; ``worker.py`` measures it into a row."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What a case is called in the rows where a field is not.
ROW_NAMES = {"async_save": "async", "ablate_layers": "worth"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Fields have the defaults of a row that does not name them. A row holds its case as JSON under ``cell``.

    Attributes:
        kind: what is measured: "cost", "quality" or "checkpoint".
        method: a name of ``methods.METHODS``.
        model: a name that ``models.load`` knows.
        micro_batch, accumulation, sequence: rows, micro-batches, tokens per row of one optimizer step on one rank.
        warmup, steps: steps before the measured ones (cost), and the measured ones (quality: all steps).
        grass: merged into the method's "grass" block.
        offload: a name of ``offload.suite.OFFLOADS``; None: the method's own.
        prepare_state: allocate the optimizer state of all layers before the first step.
        plain: time the same passes in plain PyTorch afterwards (cost).
        async_save: write the checkpoint in the background (checkpoint).
        task, test_rows: what is trained on, and rows per measurement (quality).
        tuning: measure the development loss alone (quality).
        curve, reprobe: measure that loss, or the scores of all layers, every so many steps (quality); 0: never.
        ablate_layers: first train each layer alone for so many steps, on a copy (quality).
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
    curve: int = 0
    reprobe: int = 0
    ablate_layers: int = 0
    dtype: str = "bf16"
    disk: str | None = None
    data: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case of a JSON object, with the names that rows use.

        Raises:
            ValueError: it names no field of a case.
        """
        given = json.loads(text)
        names = {ROW_NAMES.get(one.name, one.name): one.name for one in fields(cls)}
        found = {name.replace("-", "_"): value for name, value in given.items()}
        if unknown := found.keys() - names:
            raise ValueError(f"{', '.join(sorted(unknown))}: no field of a case; known are {', '.join(names)}")
        return cls(**{names[name]: value for name, value in found.items()})

    def text(self, *, local: bool = False) -> str:
        """JSON of the fields that differ from their defaults; ``local``: with ``dtype``, ``disk`` and ``data``.

        Cases with the same text are the same, so it is the key of a row.
        """
        plain = asdict(Case(kind="", method=""))
        changed = {
            ROW_NAMES.get(name, name): value
            for name, value in asdict(self).items()
            if (value != plain[name] and (local or name not in ("dtype", "disk", "data")))
        }
        return json.dumps(changed, sort_keys=True)
