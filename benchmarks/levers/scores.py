# SPDX-License-Identifier: Apache-2.0
"""Two measures of the gradient of every layer (cases of kind ``scores``)."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Row
from benchmarks.tasks import TASKS, Exam
from launch.data.chat_template import Template
from launch.data.tokenization import Collator


def scores(case: Case, model: Any, tokenizer: Any) -> Row:
    """Means over ``steps`` batches of the untrained model, per layer and element: root mean square and mean magnitude.

    An Adam step moves every weight by about lr, so that lr times the L1 norm is the fall of the loss to first order.
    """
    data = Path(case.data) if case.data else None
    exam = Exam(TASKS[str(case.task)], Template.choose(tokenizer), data, case.test_rows)
    batches, collate = exam.batches(case.seed), Collator(tokenizer.pad_token_id)
    layers = model.get_decoder().layers
    rms, l1 = torch.zeros(len(layers), dtype=torch.float64), torch.zeros(len(layers), dtype=torch.float64)
    for _ in range(case.steps):
        model.zero_grad()
        model(**collate(next(batches))).loss.backward()
        for index, layer in enumerate(layers):
            gradient = torch.cat([weight.grad.flatten().double() for weight in layer.parameters()])
            rms[index] += gradient.square().mean().sqrt() / case.steps
            l1[index] += gradient.abs().mean() / case.steps
    return {"data": exam.fingerprint(), "rms": rms.tolist(), "l1": l1.tolist()}
