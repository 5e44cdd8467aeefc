# SPDX-License-Identifier: Apache-2.0
"""Suite ``epoch``: what methods reach in the regime that people use, a pass through the rows of a real task.

A case takes hours on a small machine. It goes on from its last checkpoint: end ``run.py`` with ``--minutes``.
"""

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Case, Request
from benchmarks.tasks import TASKS

TASK = "epoch"
ROWS_PER_STEP = 8
STEPS = 308  # a third of GSM8K's training rows
TEST_ROWS = 200
SEEDS = (0, 1, 2)
SETTINGS = {"probe_steps": 4, "sample_period": 5, "refresh_period": 10}
# Method, keys of its "grass" block, learning rate: that of suite ``frontier``.
RUNS: tuple[tuple[str, dict[str, float], float], ...] = (
    ("full", {}, 1e-4),
    ("lora", {}, 4e-4),
    ("uniform", {"num_active_layers": 8, "expansion": 0.8}, 2e-4),
    ("sign-sgd", {"num_active_layers": 30}, 2e-4),
    ("uniform", {"num_active_layers": 8}, 2e-4),
    ("grass", {"num_active_layers": 8}, 2e-4),
    ("cyclic", {"num_active_layers": 8}, 2e-4),
    ("uniform", {"num_active_layers": 15}, 2e-4),
    ("grass", {"num_active_layers": 15}, 2e-4),
    ("uniform", {"num_active_layers": 2, "expansion": 0.2}, 8e-4),
)
REPEATED = ("uniform", "grass", "lora")  # with all seeds


def cases(request: Request) -> Iterator[Case]:
    """All methods with the first seed, then the others."""
    task = TASKS[TASK]
    shape = {"micro_batch": task.micro_batch, "accumulation": ROWS_PER_STEP // task.micro_batch}
    for seed, (method, keys, lr) in product(SEEDS, RUNS):
        if seed == SEEDS[0] or method in REPEATED:
            yield Case(
                **{"kind": "epoch", "task": TASK, "method": method, "lr": lr, "seed": seed, "steps": STEPS, **shape},
                grass={**SETTINGS, **keys} if keys else {},
                sequence=task.sequence,
                schedule="cosine",
                test_rows=TEST_ROWS,
                curve=44,
            )
