"""Measure a causal language model on a task: exact match, multiple choice or loss. All ranks share the work.

    python launch/evaluate.py --model runs/grass --data builtin:arithmetic --task exact
    deepspeed launch/evaluate.py --model runs/grass --data path/to/folder --task choice

- exact: generate greedily and compare what follows "The answer is" (or the last number) with the row's `answer`, see
  launch/evaluation/grading.py;
- choice: the option whose text the model finds most likely, over the row's `choices` or its "Answer format: a/b/c";
- loss: mean cross-entropy per answer token, in nats.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script: look for modules in the project, not in launch/, whose evaluate.py would hide a library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.startup  # noqa: F401, I001  # before what takes seconds to import
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from transformers import HfArgumentParser

from launch import distributed, dtype
from launch.arguments import option
from launch.data.chat_template import Template
from launch.data.rows import Rows, not_read
from launch.data.sources import load_measured
from launch.data.text_files import UTF8
from launch.data.tokenization import largest_token, tokenize
from launch.evaluation.measures import choice_accuracy, exact_match, mean_loss
from launch.evaluation.tasks import TASKS, choose_task, largest_token_read
from launch.model import DEFAULT_MODEL, check_tokens, load


@dataclass
class Arguments:
    """What to measure."""

    model: str = option(
        DEFAULT_MODEL, "Model folder, folder with adapters (train.py --method lora), hub name, or smollm2-135m."
    )
    data: str = option(
        "builtin:arithmetic",
        "builtin:arithmetic, a json/jsonl/csv/tsv/parquet file, a folder with a test file, or a hub name.",
    )
    encoding: str = option(UTF8, "How a text file is encoded, e.g. latin-1 or utf-16-le.")
    data_config: str | None = option(None, "Configuration of a hub dataset, e.g. main.")
    split: str = option(
        "test", "Which rows: test (of a file: all), train, or held_out (those that train.py --data holds out)."
    )
    task: str = option("auto", "exact, choice, loss, or auto (what the rows allow).")
    samples: int | None = option(None, "Only the first so many rows; all if left out.")
    batch_size: int = option(16, "Rows per batch and rank.")
    max_new_tokens: int | None = option(
        None, "Longest generated answer (task exact); a quarter more than the rows' longest if left out."
    )
    max_length: int = option(
        1024, "Longest row in tokens (task loss): longer ones are cut, or left out if the answer does not fit."
    )
    length_normalized: bool = option(False, "Task choice: likelihood per token.")
    template: str = option("auto", "chat, plain, or auto (chat if the tokenizer has one).")
    dtype: str = option(dtype.AUTO, "bf16, fp16, fp32, or auto (what the hardware computes).")


def run(arguments: Arguments) -> dict[str, Any]:
    """Load and measure.

    Returns:
        "task", "value", "rows" (how many were measured), "model", "data" and "precision".

    Raises:
        ValueError: an option, the data or the model with which the task cannot be measured.
    """
    if arguments.task not in (*TASKS, "auto"):
        raise ValueError(f"unknown task {arguments.task!r}: choose one of {', '.join(TASKS)}, auto")
    precision = dtype.choose(arguments.dtype)
    precision.announce()
    rows, task = distributed.on_every_rank(lambda: _rows(arguments))
    model, tokenizer = distributed.on_every_rank(lambda: load(arguments.model, precision.name))
    template = distributed.on_every_rank(lambda: Template.choose(tokenizer, arguments.template))
    examples, largest = distributed.on_every_rank(lambda: _tokens(rows, task, template, arguments.max_length))
    check_tokens(model, arguments.model, tokenizer, max(largest, tokenizer.pad_token_id))
    model.to(get_accelerator().current_device_name())
    batch = arguments.batch_size
    if task == "exact":
        value = exact_match(model, template, rows, batch_size=batch, max_new_tokens=arguments.max_new_tokens)
    elif task == "choice":
        normalized = arguments.length_normalized
        value = choice_accuracy(model, template, rows, batch_size=batch, length_normalized=normalized)
    else:
        value = mean_loss(model, template, list(examples or ()), batch_size=batch)
    measured = len(rows) if examples is None else len(examples)
    result = {"task": task, "value": value, "rows": measured, "model": arguments.model, "data": arguments.data}
    return result | {"precision": precision.as_dict()}


def _rows(arguments: Arguments) -> tuple[Rows, str]:
    """The rows to measure on, and the task; rank 0 prints which they are."""
    found = load_measured(arguments.data, arguments.split, arguments.data_config, encoding=arguments.encoding)
    if distributed.rank() == 0:
        print(f"data: measuring on {found.share(arguments.samples, '--samples')}{not_read(found)}", flush=True)
    rows = found.take(arguments.samples)
    return rows, choose_task(arguments.task, rows)


def _tokens(rows: Rows, task: str, template: Template, max_length: int) -> tuple[Dataset | None, int]:
    """The tokens of rows whose loss is measured, and the largest token that the model will read."""
    if task != "loss":
        return None, largest_token_read(template, rows, task)
    examples = tokenize(rows, template, max_length, "drop")
    return examples, largest_token(examples)


def main() -> int:
    """Run the command line; the exit status."""
    parser = HfArgumentParser(Arguments)
    arguments = parser.parse_args_into_dataclasses(args=distributed.own_arguments(sys.argv[1:]))[0]
    try:
        distributed.start()
        result = run(arguments)
        if distributed.rank() == 0:
            print(json.dumps(result))
    except (ValueError, OSError) as error:
        distributed.report_error(error)
        return 1
    except Exception as error:
        if distributed.speaks_of(error):
            raise
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
