# SPDX-License-Identifier: Apache-2.0
"""What draws cost a compiled model: graphs and seconds, the blocks compiled one by one beside the model in one piece.

    python -m benchmarks.compiling

Every way runs in a process of its own on ZeRO-2 with the same draws and one rank; all must reach the same loss.
"""

import json
import subprocess
import sys
import time

import torch
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import grass_ds
from benchmarks.models import llama

LAYERS, DRAWS, PERIOD = 8, 10, 2
BACKEND = "aot_eager"  # traces forward and backward as inductor does, but generates no code
WAYS = {"eager": "not compiled", "blocks": "engine.compile()", "whole": "model.compile()"}


def measure(way: str) -> dict[str, float]:
    """Graphs, seconds in all, and the last loss of DRAWS * PERIOD steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(64, 128, LAYERS, 4, 256, use_cache=False))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "grass": {"sampler": "uniform", "num_active_layers": 2, "sample_period": PERIOD},
    }
    engine, *_ = grass_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    if way == "blocks":
        engine.compile(backend=BACKEND)
    elif way == "whole":
        model.compile(backend=BACKEND)
    began = time.perf_counter()
    for step in range(DRAWS * PERIOD):
        ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(step))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    seconds = time.perf_counter() - began
    engine.destroy()
    return {"graphs": counters["stats"]["unique_graphs"], "seconds": seconds, "loss": loss.item()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.compiling", way]
        rows[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    if len({row["loss"] for row in rows.values()}) > 1:
        raise AssertionError(f"the ways do not compute the same: {rows}")
    print(f"{LAYERS} layers, {DRAWS} draws of 2, backend {BACKEND}")
    for way, row in rows.items():
        print(f"{WAYS[way]:<18}{row['graphs']:>3} graphs {row['seconds']:>6.1f} s")


if __name__ == "__main__":
    main()
