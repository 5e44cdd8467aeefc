# SPDX-License-Identifier: Apache-2.0
"""docs/recipes.md, each recipe in the environment of its front-end: two CPU ranks, a tiny model, six steps.

Layer 0 is active in the first three steps, layer 1 in the others. The run that is resumed after three steps sets
checkpointing to reentrant, and must end with the same bits.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers.markdown import code_blocks
from helpers.ranks import free_port
from helpers.tokenizers import CHATML, byte_level
from safetensors.torch import load_file

from grass_ds.integrations import __file__ as integrations
from grass_ds.trainer.history import History

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = Path(os.environ.get("GRASS_FRONT_ENDS") or ROOT / ".cache" / "front_ends")
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
WARNING = "activation checkpointing is reentrant"
STEPS = 6
GRASS = {"sampler": "cyclic", "cyclic_order": "ascending", "num_active_layers": 1, "sample_period": STEPS // 2}
OFFLINE = {
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder with a tiny model, data and a DeepSpeed config, in which a recipe runs."""

    folder: Path
    reentrant: bool
    resumed: bool

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name


def block(language: str, part: str) -> str:
    """The one block of the page in this language with ``part``."""
    [found] = [block for block in code_blocks(RECIPES, language) if part in block]
    return found


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def trl(kind: str, place: Place) -> list[str]:
    code = replaced(
        block("python", f"# {kind}.py"),
        ("Qwen/Qwen3-0.6B", "model"),
        ("ds_configs/grass.json", "ds.json"),
        ("bf16=True,", f'use_cpu=True, bf16=False, max_steps={STEPS}, max_length=64, report_to="none",'),
        ("save_steps=500", f"save_steps={STEPS // 2}"),
        ('"use_reentrant": False', f'"use_reentrant": {place.reentrant}'),
    )
    code = re.sub(r"learning_rate=\S+,", "learning_rate=1e-3,", re.sub(r"_batch_size=\d", "_batch_size=2", code))
    return [place.write(f"{kind}.py", code)]


def llama_factory(place: Place) -> list[str]:
    config = yaml.safe_load(block("yaml", "stage: sft"))
    assert config["deepspeed"] == "ds_configs/grass.json"
    changed = {"model_name_or_path": "model", "deepspeed": "ds.json", "dataset_dir": ".", "cutoff_len": 64}
    changed |= {"bf16": False, "use_cpu": True, "report_to": "none", "template": "qwen", "max_steps": STEPS}
    changed |= {"save_steps": STEPS // 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    if place.resumed:
        changed["resume_from_checkpoint"] = "out/checkpoint-3"
    config |= changed
    if place.reentrant:  # LLaMA-Factory's own checkpointing, by its defaults
        for name in ("disable_gradient_checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs"):
            del config[name]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    mine = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    place.write("dataset_info.json", json.dumps({"mine": mine}))
    *_, flag, module, _ = shlex.split(block("bash", "integrations.llama_factory"))
    return [flag, module, place.write("train.yaml", yaml.safe_dump(config))]


def ms_swift(place: Place) -> list[str]:
    text = block("bash", "swift.cli.sft").replace("\\\n", " ")
    _, command = text.splitlines()  # the first finds the folder of the plugin
    words = shlex.split(command.replace("${plugin%__init__.py}", integrations.removesuffix("__init__.py")))
    words = words[words.index("-m") :]
    changed = {
        "--deepspeed": "ds.json",
        "--model": "model",
        "--torch_dtype": "float32",
        "--save_steps": str(STEPS // 2),
    }
    changed |= {"--per_device_train_batch_size": "2", "--learning_rate": "1e-3"}
    for option, value in changed.items():
        words[words.index(option) + 1] = value
    words += ["--model_type", "llama", "--template", "chatml", "--use_cpu", "true", "--max_steps", str(STEPS)]
    words += ["--fp16", "false", "--bf16", "false"]  # it takes float32 for mixed precision
    words += ["--report_to", "none", "--gradient_accumulation_steps", "1", "--max_length", "64"]
    if place.reentrant:  # its default
        at = words.index("--gradient_checkpointing_kwargs")
        del words[at : at + 2]
    if place.resumed:
        words += ["--resume_from_checkpoint", "out/checkpoint-3"]
    # Its own AdamW: an optimizer in the config is what the page warns of.
    config = json.loads((place.folder / "ds.json").read_text())
    config.pop("optimizer", None)
    place.write("ds.json", json.dumps(config))
    assert "optimizer" not in json.loads((ROOT / "ds_configs" / "ms_swift.json").read_text())
    return words


CPU_PLUGIN = """
from axolotl.integrations.base import BasePlugin

class Cpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}
"""
CPU_START = """
import runpy
from accelerate import PartialState

initialize = PartialState.__init__
PartialState.__init__ = lambda self, cpu=False, **kwargs: initialize(self, cpu=True, **kwargs)
"""


def axolotl(place: Place) -> list[str]:
    config = yaml.safe_load(block("yaml", "axolotl.GrassPlugin"))
    changed = {"base_model": "model", "deepspeed": "ds.json", "bf16": False, "micro_batch_size": 2, "sequence_len": 64}
    changed |= {"learning_rate": 1e-3, "max_steps": STEPS, "save_steps": STEPS // 2}
    # Or it places the model on a GPU for each of several ranks.
    changed["max_memory"] = {"cpu": "8GiB"}
    if place.reentrant:
        changed["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    if place.resumed:
        changed["resume_from_checkpoint"] = "out/checkpoint-3"
    *_, module, _ = shlex.split(block("bash", "axolotl.cli.train"))
    # axolotl has no option for the CPU. Without one accelerate takes every rank for rank 0.
    config["plugins"] = [*config["plugins"], "cpu.Cpu"]
    place.write("cpu.py", CPU_PLUGIN)
    start = CPU_START + f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [place.write("start.py", start), place.write("train.yaml", yaml.safe_dump({**config, **changed}))]


# Environment, what makes the command, whether the engine is to warn in the second run.
FRONT_ENDS: dict[str, tuple[str, Callable[[Place], list[str]], bool]] = {
    "trl-sft": ("trl", lambda place: trl("sft", place), True),
    "trl-dpo": ("trl", lambda place: trl("dpo", place), True),
    # Its helper lets the input of a layer that trains require a gradient.
    "llama_factory": ("llama_factory", llama_factory, False),
    "ms_swift": ("ms_swift", ms_swift, True),
    "axolotl": ("axolotl", axolotl, True),
}


def fill(folder: Path) -> None:
    """The model, with a tokenizer of bytes, the data and the DeepSpeed config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level(CHATML)
    token = tokenizer.eos_token_id
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 69, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": token, "eos_token_id": token, "pad_token_id": token}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **shape, **ends, num_key_value_heads=2, max_position_embeddings=256
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows, preferences = [], []
    for i in range(64):
        question, answer = ({"role": r, "content": c} for r, c in (("user", f"{i} + 1"), ("assistant", f"{i + 1}")))
        rows.append({"messages": [question, answer]})
        wrong = {"role": "assistant", "content": f"{i}"}
        preferences.append({"prompt": [question], "chosen": [answer], "rejected": [wrong]})
    for name, lines in (("train.jsonl", rows), ("preferences.jsonl", preferences)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ds_config = json.loads((ROOT / "ds_configs" / "grass.json").read_text())
    (folder / "ds.json").write_text(json.dumps({**ds_config, "grass": GRASS}))


def run(name: str, folder: Path, reentrant: bool, resumed: bool) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after the last step, and what was printed."""
    environment, make, _ = FRONT_ENDS[name]
    python = ENVIRONMENTS / environment / "bin" / "python"
    command = make(Place(folder, reentrant, resumed))
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*map(str, launcher), *command], cwd=folder, env={**os.environ, **OFFLINE, "HF_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return load_file(folder / "out" / f"checkpoint-{STEPS}" / "model.safetensors"), done.stdout


@pytest.mark.front_ends
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_recipe_samples_layers_and_resumes(tmp_path: Path, name: str) -> None:
    if not (ENVIRONMENTS / FRONT_ENDS[name][0] / "bin" / "python").exists():
        pytest.skip(f"bash tests/front_ends/setup.sh {FRONT_ENDS[name][0]}")
    fill(tmp_path)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after, said = run(name, tmp_path, reentrant=False, resumed=False)
    assert "grass_ds: cyclic over 4 layers" in said
    assert WARNING not in said
    assert after.keys() == before.keys()
    moved = {weight for weight in before if not torch.equal(before[weight], after[weight])}
    active = ("model.layers.0.", "model.layers.1.", "model.norm.")
    assert moved == {weight for weight in before if weight.startswith(active)}
    assert History.load(tmp_path / "out" / "grass_history.jsonl").visits() == [3, 3, 0, 0]
    assert "Layer-sampled fine-tuning" in (tmp_path / "out" / "README.md").read_text()

    shutil.rmtree(tmp_path / "out" / f"checkpoint-{STEPS}")
    resumed, said = run(name, tmp_path, reentrant=True, resumed=True)
    assert said.count(WARNING) == FRONT_ENDS[name][2]
    assert [weight for weight in after if not torch.equal(after[weight], resumed[weight])] == []
    assert History.load(tmp_path / "out" / "grass_history.jsonl").visits() == [3, 3, 0, 0]


@pytest.mark.front_ends
def test_llama_factorys_own_checkpointing_keeps_what_the_page_says() -> None:
    """Above the active layer it keeps everything, of which the page gives the share; the Trainer's does not."""
    python = ENVIRONMENTS / "llama_factory" / "bin" / "python"
    if not python.exists():
        pytest.skip("bash tests/front_ends/setup.sh llama_factory")
    command = [str(python), str(ROOT / "tests" / "front_ends" / "kept_activations.py")]
    done = subprocess.run(
        command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout.splitlines()[-1])
    lowest, highest = ({name: both[index] for name, both in kept.items()} for index in (0, 1))
    shares = {name: round(100 * lowest[name] / lowest["none"]) for name in ("llama_factory", "trainer")}
    text = " ".join(RECIPES.split())
    assert f"{shares['llama_factory']}% of what is kept without checkpointing" in text
    assert f"the Trainer's {shares['trainer']}%" in text
    assert highest["llama_factory"] < highest["trainer"]  # the inputs of seven layers that need no backward
