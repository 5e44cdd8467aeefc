# SPDX-License-Identifier: Apache-2.0
"""What `import grass_ds` needs and gives: the core works without the extras, and old names work with a warning."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.ranks import free_port, rank_environment

import grass_ds
from grass_ds.cluster import placement

ROOT = Path(__file__).resolve().parents[2]

# A process without the extras. psutil and tqdm are not among them: DeepSpeed needs both. That the core imports neither
# itself is a rule of test_architecture.
WITHOUT_EXTRAS = """
    import importlib.machinery, sys

    EXTRAS = {"transformers", "accelerate", "datasets", "matplotlib", "wandb", "tensorboard", "peft", "mpi4py"}
    searched = []

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name in EXTRAS:
                searched.append(name)
                return None
            return super().find_spec(name, path, target)

    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""

PLAIN_LOOP = """
    import torch
    from torch import nn

    import grass_ds

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(16, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
            self.head = nn.Linear(8, 16)

        def forward(self, ids):
            hidden = self.tokens(ids)
            for block in self.blocks:
                hidden = block(hidden)
            return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())

    def run(stage, folder):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "grass": {"num_active_layers": 1, "probe_steps": 1, "sample_period": 2},
        }
        model = Net()
        engine, *_ = grass_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
        for _ in range(4):
            loss = engine(torch.zeros(2, 4, dtype=torch.long))
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(folder)
        assert engine.load_checkpoint(folder)[0] is not None
        assert sum(engine.grass.visits) == 3
        engine.destroy()

    for stage in (2, 3):
        run(stage, f"{sys.argv[1]}/{stage}")
    assert not EXTRAS & sys.modules.keys()
    try:
        grass_ds.GrassCallback
    except ImportError as error:
        assert str(error).endswith("(extra 'hf' of grass_ds)"), error
    else:
        raise AssertionError("the callback needs transformers")
    assert {"transformers", "accelerate"} & set(searched)
"""


def test_a_plain_loop_needs_no_extra(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(textwrap.dedent(WITHOUT_EXTRAS) + textwrap.dedent(PLAIN_LOOP))
    environment = {**os.environ, **rank_environment(0, 1, free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_the_last_release_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"grass_ds\.placement is now grass_ds\.cluster\.placement"):
        from grass_ds import placement as old
    assert old is placement


def test_every_public_name_is_there() -> None:
    assert {name for name in grass_ds.__all__ if getattr(grass_ds, name, None) is None} == set()
    assert set(grass_ds.__all__) == set(grass_ds._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        grass_ds.nothing  # noqa: B018
