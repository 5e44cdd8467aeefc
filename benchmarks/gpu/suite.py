# SPDX-License-Identifier: Apache-2.0
"""Suite ``gpu``: the paper's models on one device; with several GPUs also on ZeRO-3, one rank per GPU."""

from collections.abc import Iterator
from itertools import product

from deepspeed.accelerator import get_accelerator

from benchmarks.case import Case
from benchmarks.gpu.tables import PAPER
from benchmarks.suite import Request


def cases(request: Request) -> Iterator[Case]:
    """``grass`` probes, so its memory counts; "offload" blocks are compared among ``uniform``, whose draws need no
    gradients. The state of all layers would not fit on the device: ``none`` allocates it when a layer is drawn.
    """
    gpus = get_accelerator().device_count()
    for seed, model, batch in product(range(request.rounds), PAPER, (1, 4)):
        common = {
            "kind": "cost",
            "model": model,
            "micro_batch": batch,
            "sequence": 1024,
            "checkpointing": True,
            "grass": {"sample_period": 5},
            "warmup": 5,
            "steps": 25,
            "seed": seed,
        }
        for method in ("full", "lora", "lisa", "grass"):
            yield Case(**common, method=method)
        for offload in ("none", "cpu-stream", "cpu-stream-serial"):
            yield Case(**common, method="uniform", offload=offload, prepare_state=offload != "none")
        if gpus > 1:
            for method in ("full", "lora", "lisa", "grass"):
                yield Case(**common, method=method, stage=3, ranks=gpus)
