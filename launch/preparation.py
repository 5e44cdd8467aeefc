"""What launch/train.py loads and checks before it trains: nothing that a user can get wrong is left for later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.validation import check_ds_config, check_model
from launch import adapters, distributed, tracking
from launch.arguments import Arguments
from launch.data.chat_template import Template
from launch.data.preview import count_tokens
from launch.data.rows import Rows, summary
from launch.data.sources import load_splits, load_test
from launch.data.tokenization import largest_token, tokenize
from launch.evaluation.tasks import choose_task, largest_token_read
from launch.model import check_tokens, load_model, load_tokenizer
from launch.saving import check_saving


@dataclass
class Task:
    """Everything a run needs beside the model, checked: the tokens to train on and what to measure."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: datasets.Dataset
    test: Rows | None
    test_tokens: datasets.Dataset | None
    measure: str
    """"exact", "choice", "loss" or "none"."""
    token_count: dict[str, float]
    grass: GrassConfig | None
    """The enabled "grass" block of the DeepSpeed configuration."""


def prepare(options: Arguments) -> Task:
    """Load and check everything but the model.

    Raises:
        ValueError: whatever is wrong with the data or the configuration.
    """
    tracking.check(options.training.report_to)
    config = parse_grass_block(options.ds_config)
    if config is not None:
        check_ds_config(options.ds_config, config)
    data, evaluation = options.data, options.evaluation
    splits = load_data(options)
    tokenizer = load_tokenizer(options.model.model)
    template = Template.choose(tokenizer, data.template)
    rows = splits["train"].take(data.train_samples)
    train = tokenize(rows, template, data.max_length, data.on_long_answer, data.on_long_row)
    test = splits["test"].take(evaluation.eval_samples) if "test" in splits else None
    measure = task_to_measure(evaluation.eval_task, test)
    measured = test is not None and measure != "none"
    test_tokens = tokenize(test, template, data.max_length, "drop") if measured else None
    partitioned = options.ds_config.get("zero_optimization", {}).get("stage") == 3
    if measured and partitioned and len(test) < distributed.world_size():
        raise ValueError(
            f"{len(test)} test rows for {distributed.world_size()} ranks: evaluation with ZeRO-3 needs one per rank"
        )
    return Task(tokenizer, template, train, test, test_tokens, measure, count_tokens(train), config)


def prepare_model(options: Arguments, task: Task) -> tuple[PreTrainedModel, Callable[[int], int]]:
    """The model, and how many of a number of steps only measure it.

    Raises:
        ValueError: whatever is wrong with the model, and with the folder that it will be saved in.
    """
    model = load_model(options.model.model, options.precision.name, task.tokenizer)
    check_tokens(model, options.model.model, task.tokenizer, _largest_token(task))
    model = _with_adapters(model, options)
    if distributed.rank() == 0:
        zero = options.ds_config.get("zero_optimization", {})
        check_saving(model, task.tokenizer, Path(str(options.training.output_dir)), zero)
    if task.grass is None:
        return model, lambda steps: 0
    layers = check_model(model, task.grass)
    probe_steps_within = task.grass.controller(layers).probe_steps_within
    steps = options.training.max_steps
    if 0 < steps == probe_steps_within(steps):
        raise ValueError(
            f"--max_steps {steps} leaves nothing to train: the first grass.probe_steps = {task.grass.probe_steps} "
            "steps only measure; raise --max_steps or lower probe_steps"
        )
    return model, probe_steps_within


def _with_adapters(model: PreTrainedModel, options: Arguments) -> PreTrainedModel:
    """The model as the method trains it: with new adapters, with those of the checkpoint, or as it is."""
    lora, checkpoint = options.lora(), options.checkpoint
    if lora is None:
        if checkpoint is not None:
            adapters.refuse(Path(checkpoint))
        return model
    adapted = adapters.wrap(model, lora, options.training.gradient_checkpointing)
    if checkpoint is not None:
        adapters.restore(adapted, Path(checkpoint))
    return adapted


def load_data(options: Arguments) -> dict[str, Rows]:
    """The "train" rows and, if there are any to measure, the "test" rows; rank 0 prints which they are.

    Raises:
        ValueError: see `load_splits`; or a source without training rows.
    """
    data, evaluation = options.data, options.evaluation
    hold_out = data.eval_data is None and evaluation.eval_task != "none"
    splits = load_splits(data.data, data.data_config, encoding=data.encoding, hold_out=hold_out)
    if "train" not in splits:
        raise ValueError(f"--data {data.data}: has test rows only; give a source with training rows")
    if data.eval_data is not None:
        if "test" in splits:
            splits["train"] = splits["train"].leaving(f"{splits['test'].source} (--eval_data takes its place)")
        splits["test"] = load_test(data.eval_data, data.data_config, encoding=data.encoding)
    if distributed.rank() == 0:
        measured = None if evaluation.eval_task == "none" else splits.get("test")
        line = summary(splits["train"], data.train_samples, measured, evaluation.eval_samples)
        print(f"data: {line}", flush=True)
    return splits


def task_to_measure(wanted: str, test: Rows | None) -> str:
    """The task to measure: "exact", "choice", "loss" or "none".

    Raises:
        ValueError: no test rows, or one that the wanted task cannot be measured on.
    """
    if test is None and wanted not in ("auto", "none"):
        raise ValueError(f"--eval_task {wanted}: the data has no test rows; name some with --eval_data")
    return "none" if test is None or wanted == "none" else choose_task(wanted, test)


def _largest_token(task: Task) -> int:
    """The largest token that the model will read."""
    tokens = [largest_token(rows) for rows in (task.train, task.test_tokens) if rows is not None]
    if task.test is not None:
        tokens.append(largest_token_read(task.template, task.test, task.measure))
    return max(*tokens, task.tokenizer.pad_token_id)
