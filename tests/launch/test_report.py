from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers.programs import in_memory

from launch import report
from launch.data.chat_template import Template
from launch.data.tokenization import tokenize
from launch.preparation import Task


@pytest.mark.parametrize(("loss_rows", "left_out"), [(4, ""), (3, " (3 of 4 test rows, the others are too long)")])
def test_the_report_says_how_many_rows_were_measured(loss_rows: int, left_out: str) -> None:
    before, after = {"exact": 0.5, "loss": 2.0}, {"exact": 0.75, "loss": 1.0}
    assert report._accuracy({"before": before, "after": after, "eval_rows": 4, "loss_rows": loss_rows}) == [
        "exact match       50.0% before, 75.0% after (4 test rows)",
        f"eval loss         2.000 before, 1.000 after{left_out}",
    ]


def test_the_report_counts_the_rows_of_the_loss(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "engine_memory", lambda _: {})
    rows = [{"instruction": "q", "output": output} for output in ("a", "b", "c", "words " * 100)]
    test, template = in_memory(rows), Template.choose(tokenizer)
    tokens = tokenize(test, template, 64, "drop")
    task = Task(tokenizer, template, tokens, test, tokens, "loss", MagicMock(), None)
    options, trainer = MagicMock(ds_config={}), MagicMock(deepspeed=None)
    options.lora.return_value = None
    stopwatch = MagicMock(seconds=1.0, first_step=0)
    options.training.output_dir, trainer.state.global_step = "out", 4
    options.training.train_batch_size = options.training.gradient_accumulation_steps = 1
    numbers = report.collect(options, task, trainer, stopwatch, SimpleNamespace(plot_paths=[], tokens_per_second=1.0))
    assert numbers["eval_rows"] == 4
    assert numbers["loss_rows"] == 3
