# SPDX-License-Identifier: Apache-2.0
"""Suite ``gpu``: the paper's models on one device; with several GPUs also on ZeRO-3, one rank per GPU."""

from collections.abc import Iterator
from itertools import product

from deepspeed.accelerator import get_accelerator

from benchmarks.case import Case, Request
from benchmarks.gpu.tables import PAPER


def cases(request: Request) -> Iterator[Case]:
    """``grass`` probes, so its memory counts; "offload" blocks are compared among ``uniform``, whose draws need no
    gradients. The state of all layers would not fit on the device: ``none`` allocates it when a layer is drawn.
    """
    gpus = get_accelerator().device_count()
    for seed, model, batch in product(range(request.rounds), PAPER, (1, 4)):
        shape = {"micro_batch": batch, "sequence": 1024, "checkpointing": True}
        common = {"kind": "cost", "model": model, **shape, "warmup": 5, "steps": 25, "seed": seed}
        common["grass"] = {"sample_period": 5}
        for stage, ranks in ((2, 1), (3, gpus)) if gpus > 1 else ((2, 1),):
            for method in ("full", "lora", "lisa", "grass"):
                yield Case(**common, method=method, stage=stage, ranks=ranks)
        for offload in ("none", "cpu-stream", "cpu-stream-serial"):
            yield Case(**common, method="uniform", offload=offload, prepare_state=offload != "none")
