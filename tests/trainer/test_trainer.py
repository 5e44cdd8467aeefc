# SPDX-License-Identifier: Apache-2.0
"""HF Trainer, accelerate and a plain loop train alike; the Trainer saves, resumes and reports a GRASS run."""

import copy
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import rounding
from helpers.faults import said
from helpers.models import LAYERS, grass_block, snapshot, tiny_llama
from helpers.observed import difference, observe
from helpers.trainers import Rows, clean_process, hf_trainer, losses, losses_seen
from helpers.wandb_runs import read_history
from torch import nn

import grass_ds
from grass_ds.checkpoint import folder as engine_parts
from grass_ds.trainer import checkpoints
from grass_ds.trainer.checkpoints import SEAL, seal_checkpoint
from grass_ds.zero.activation_checkpointing import inputs_require_gradients

pytestmark = pytest.mark.dist

STEPS, GAS, MICRO, LR = 11, 2, 2, 1e-2  # 2 probing steps, then a switch every 3


def hf_config(dtype: str = "fp32", optimizer: bool = True, stage: int = 2, **block: Any) -> dict[str, Any]:
    """A DeepSpeed config with what the Trainer fills in left to it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "grass": grass_block(**block),
    }
    if optimizer:
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return config


def model_of(dtype: str, seed: int = 0) -> Any:
    return tiny_llama(seed=seed).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def trainer_settings(dtype: str, clip: float = 0.0, steps: int = STEPS) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "learning_rate": LR,
        "weight_decay": 0.0,
        "gradient_accumulation_steps": GAS,
        "max_grad_norm": clip,
        "train_sampling_strategy": "sequential",
        "bf16": dtype == "bf16",
    }


# ---- four loops, one run --------------------------------------------------------------------------------------------


def observed(engine: Any, model: nn.Module, seen: list[float]) -> dict[str, Any]:
    return {
        "losses": seen,
        "weights": snapshot(model),
        "visits": engine.grass.visits,
        "active": engine.grass.active_layers,
        "scores": engine.grass.scores,
        "units": len(engine.optimizer.units),
        "lr": engine.get_lr(),
    }


@contextmanager
def clipping_by(given: Sequence[float] | None = None) -> Iterator[list[float]]:
    """Steps clip by these squared global norms, if any are given. Yields those that were measured."""
    from grass_ds.zero import optimizer

    measure, measured = optimizer.global_squares, []

    def squares(*args: Any) -> Any:
        norms, sums = measure(*args)
        measured.append(sum(norms.values()))
        if given is not None:  # the step adds the units up, and zeros change no sum
            total = given[len(measured) - 1]
            norms = {unit: 0.0 if index else total for index, unit in enumerate(norms)}
        return norms, sums

    with mock.patch.object(optimizer, "global_squares", squares):
        yield measured


def by_trainer(dtype: str, clip: float, folder: Path, optimizer: bool) -> dict[str, Any]:
    model = model_of(dtype)
    config = hf_config(dtype, optimizer=optimizer, num_active_layers=2)
    settings = trainer_settings(dtype, clip) | {"optim": "adamw_torch"}  # the default one, fused, rounds otherwise
    with hf_trainer(config, folder, model, **settings) as trainer, losses_seen(model) as seen:
        trainer.train()
        return observed(trainer.deepspeed, model, seen)


def filled_in(dtype: str, clip: float) -> dict[str, Any]:
    """The same config with what the Trainer would put for "auto"."""
    config = hf_config(dtype, num_active_layers=2)
    config |= {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": GAS, "gradient_clipping": clip}
    params = {"lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    config["optimizer"] = {"type": "AdamW", "params": params}
    return config


def linear(optimizer: torch.optim.Optimizer) -> Any:
    from transformers import get_scheduler

    return get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)


def by_accelerate(dtype: str, clip: float, folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler

    model = model_of(dtype)
    with clean_process(), grass_ds.enable(), losses_seen(model) as seen:
        PartialState(cpu=True)  # without an accelerator accelerate would otherwise see one process
        plugin = DeepSpeedPlugin(hf_ds_config=filled_in(dtype, clip))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=GAS)
        optimizer = DummyOptim(model.parameters())
        scheduler = DummyScheduler(optimizer, lr_scheduler_callable=linear)
        rows = torch.utils.data.DataLoader(Rows(), batch_size=MICRO)
        engine, optimizer, rows, scheduler = accelerator.prepare(model, optimizer, rows, scheduler)
        for index, inputs in enumerate(rows):
            if index == STEPS * GAS:
                break
            with accelerator.accumulate(engine):
                accelerator.backward(engine(**inputs).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        found = observed(engine, model, seen)
        accelerator.free_memory()
        return found


def by_plain_loop(dtype: str, clip: float, folder: Path) -> dict[str, Any]:
    from deepspeed import comm as dist

    model, rows = model_of(dtype), Rows()
    engine, *_ = grass_ds.initialize(
        model=model, config=filled_in(dtype, clip), model_parameters=list(model.parameters()), lr_scheduler=linear
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    with losses_seen(model) as seen:
        for micro in range(STEPS * GAS):
            first = (micro * world + rank) * MICRO
            batch = [rows[index] for index in range(first, first + MICRO)]
            inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            engine.backward(engine(**inputs).loss)
            engine.step()
    found = observed(engine, model, seen)
    engine.destroy()
    return found


def all_loops(dtype: str, clip: float, folder: Path) -> dict[str, dict[str, Any]]:
    loops = {
        "trainer": by_trainer(dtype, clip, folder, optimizer=True),
        "accelerate": by_accelerate(dtype, clip, folder),
    }
    with clipping_by() as norms:
        loops["plain loop"] = by_plain_loop(dtype, clip, folder) | {"norms": norms}
    with clipping_by(norms) as measured:
        loops["trainer's own optimizer"] = by_trainer(dtype, clip, folder, optimizer=False) | {"norms": measured}
    return loops


# The same bits everywhere. The Trainer's own optimizer has a decay and a no-decay group, so two units per layer:
# element for element the same arithmetic, but norms are summed in other portions. It clips here by the norms of the
# plain loop, once its own are found to be these.
@pytest.mark.parametrize(("dtype", "clip"), [("fp32", 0.0), ("bf16", 0.1)])
def test_every_loop_trains_alike(two_ranks: Any, dtype: str, clip: float, tmp_path: Path) -> None:
    # Each run measures with this relative error: two differ by at most twice that, squares by twice as much again.
    of_norm = rounding.of_norm(sum(p.numel() for p in model_of(dtype).model.layers[0].parameters()), 2, GAS)
    for loops in two_ranks.run(all_loops, dtype=dtype, clip=clip, folder=tmp_path, timeout=240):
        reference = loops["plain loop"]
        assert len(reference["losses"]) == STEPS * GAS
        assert sum(reference["visits"]) == 2 * (STEPS - 2)
        assert min(reference["norms"]) > clip**2  # or nothing was clipped
        start = snapshot(model_of(dtype))
        moved = max(float((weight - start[name]).float().abs().max()) for name, weight in reference["weights"].items())
        assert moved > 2 * LR  # it trained
        for name in loops:
            for what in ("losses", "weights", "visits", "active"):
                assert difference(loops[name][what], reference[what], what) is None, name
            assert loops[name]["lr"][0] == reference["lr"][0], name
        for name in ("trainer", "accelerate"):
            assert loops[name]["scores"] == reference["scores"], name
        own = loops["trainer's own optimizer"]
        assert own["units"] > reference["units"]
        assert own["norms"] == pytest.approx(reference["norms"], rel=4 * of_norm)
        assert own["scores"] == pytest.approx(reference["scores"], rel=2 * of_norm)


# ---- training again -------------------------------------------------------------------------------------------------


def train_again(folder: Path, optimizer: bool) -> list[dict[str, Any]]:
    """One Trainer trains twice, then a new one trains the same model: what each of the three runs trained.

    Under any DeepSpeed config Transformers 5.23 takes its engine of the first train() for the model of the second one,
    which then has none; ``model_wrapped`` is to be reset by hand.
    """
    model, runs = model_of("fp32"), []
    config = hf_config(optimizer=optimizer, sampler="uniform", sample_period=1)
    settings = trainer_settings("fp32", steps=12)

    def run(trainer: Any) -> None:
        start = snapshot(model)
        trainer.train()
        end = snapshot(model)
        moved = {name.split(".")[2] for name in end if ".layers." in name and not torch.equal(end[name], start[name])}
        runs.append({"visits": trainer.deepspeed.grass.visits, "moved": moved})

    with hf_trainer(copy.deepcopy(config), folder, model, **settings) as trainer:
        run(trainer)
        trainer.model_wrapped = trainer.model
        run(trainer)
    with hf_trainer(copy.deepcopy(config), folder, model, **settings) as trainer:
        run(trainer)
    return runs


@pytest.mark.parametrize("optimizer", [True, False], ids=["config's optimizer", "trainer's optimizer"])
def test_a_second_and_a_third_train_can_train_every_layer(two_ranks: Any, optimizer: bool, tmp_path: Path) -> None:
    for runs in two_ranks.run(train_again, folder=tmp_path, optimizer=optimizer):
        for run in runs:
            assert sum(run["visits"]) == 12
            assert {str(layer) for layer, visits in enumerate(run["visits"]) if visits} == run["moved"]
        for run in runs[1:]:
            assert run["moved"] == {str(layer) for layer in range(LAYERS)}


# ---- resuming -------------------------------------------------------------------------------------------------------

# While probing, on a switch (2 probing steps and a period of 3), one step into a period.
SAVED = {"probing": 1, "switch": 5, "mid-period": 6}


def save_and_load(trainer: Any, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Save the model with the Trainer, load it with Transformers, and compare both; ``start``: before training."""
    from deepspeed import comm as dist
    from transformers import AutoModelForCausalLM

    folder = Path(trainer.args.output_dir) / "model"
    trainer.save_model(str(folder))
    dist.barrier()
    loaded, live = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), snapshot(trainer.model)
    return {
        "difference": difference(live, snapshot(loaded)),  # on ZeRO-3 it is partitioned, too
        "dtypes": {param.dtype for param in loaded.parameters()},
        "trained": any(not torch.equal(live[name], start[name]) for name in live),
        "inactive": sum(not param.requires_grad for param in trainer.model.parameters()),
        "files": {path.name for path in folder.iterdir()},
    }


def check_saved(found: dict[str, Any]) -> None:
    assert found["difference"] is None
    assert found["dtypes"] == {torch.bfloat16}
    assert found["trained"]
    assert found["inactive"]  # some layers were frozen for the moment, and saved all the same
    assert {"config.json", "model.safetensors"} <= found["files"]


def train_from(folder: Path, step: int, config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """From ``checkpoint-<step>`` with a model of other weights, or from the beginning, with evaluations."""
    from transformers import IntervalStrategy

    model, callback = model_of("bf16", seed=step), grass_ds.GrassCallback()
    start = snapshot(model)
    settings = {**settings, "save_strategy": "no" if step else "steps", "save_steps": 1, "eval_steps": 2}
    with hf_trainer(config, folder, model, callbacks=[callback], **settings) as trainer, losses_seen(model) as seen:
        if step == 0:
            trainer.eval_dataset, trainer.args.eval_strategy = Rows(8), IntervalStrategy.STEPS
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}") if step else None)
        return {
            **observe(trainer.deepspeed),
            "losses": seen,
            "logged": losses(trainer),
            "history": None if callback.history is None else [row.active_layers for row in callback.history.rows],
            "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "saved": None if step else save_and_load(trainer, start),
        }


def run_and_resume(folder: Path, optimizer: bool, stage: int, background: bool) -> dict[str, Any]:
    """Straight through, then from each checkpoint of :data:`SAVED`; bf16, shuffled data."""
    config = hf_config("bf16", optimizer=optimizer, stage=stage) | {"checkpoint": {"async": background}}
    settings = {**trainer_settings("bf16", clip=1.0), "weight_decay": 0.1, "train_sampling_strategy": "random"}
    straight = train_from(folder, 0, copy.deepcopy(config), settings)
    found = {key: straight.pop(key) for key in ("saved", "evaluated")} | {"differences": {}}
    for step in SAVED.values():
        resumed = train_from(folder, step, copy.deepcopy(config), settings)
        expected = {**straight, "losses": straight["losses"][step * GAS :]}
        found["differences"][step] = difference(expected, {key: resumed[key] for key in expected})
    return found | {key: len(straight[key]) for key in ("losses", "logged")}


@pytest.mark.parametrize(
    ("optimizer", "stage", "background"),
    [(False, 2, True), (True, 3, False)],
    ids=["zero2, trainer's optimizer, saved in the background", "zero3, config's optimizer, saved at once"],
)
def test_train_evaluate_save_and_resume_exactly(
    two_ranks: Any, optimizer: bool, stage: int, background: bool, tmp_path: Path
) -> None:
    how = {"optimizer": optimizer, "stage": stage, "background": background}
    for found in two_ranks.run(run_and_resume, folder=tmp_path, timeout=240, **how):
        assert found["differences"] == dict.fromkeys(SAVED.values())
        assert found["losses"] == STEPS * GAS and found["logged"] == STEPS
        assert len(found["evaluated"]) >= STEPS // 2  # newer releases of transformers also evaluate at the end
        assert len(set(found["evaluated"])) > 2
        check_saved(found["saved"])
    assert [checkpoints.problems(checkpoint) for checkpoint in checkpoints.checkpoints(tmp_path)] == [[]] * STEPS
    newest = tmp_path / f"checkpoint-{STEPS}"
    assert grass_ds.last_checkpoint(tmp_path) == newest
    sealed = json.loads((newest / SEAL).read_text())["files"]
    assert {"model.safetensors", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()
    (newest / SEAL).unlink()
    assert checkpoints.problems(newest) == []
    os.truncate(newest / "model.safetensors", sealed["model.safetensors"]["bytes"] - 1)
    assert checkpoints.problems(newest) == ["model.safetensors is cut off"]


# ---- retention ------------------------------------------------------------------------------------------------------


def save_with_limit(folder: Path, limit: int, attached: bool, background: bool) -> dict[str, Any]:
    """Saves at every step; which checkpoints were there, and complete, after each save and at the end.

    In the background none is published before the next step begins.
    """
    from transformers import TrainerCallback

    publish, allowed, seen = engine_parts.publish, threading.Event(), []

    def there() -> dict[int, bool]:
        return {
            checkpoints.step_of(path): not checkpoints.problems(path, contents=False)
            for path in checkpoints.checkpoints(folder)
        }

    def publish_late(*arguments: Any) -> None:
        assert not background or allowed.wait(30)
        allowed.clear()
        publish(*arguments)

    class Watch(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            seen.append(there())

        def on_step_begin(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step:
                allowed.set()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if "train_runtime" in logs:
                allowed.set()

    config = hf_config() | {"checkpoint": {"async": background}}
    settings = {
        **trainer_settings("fp32", steps=4),
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": limit,
    }
    callbacks = [grass_ds.GrassCallback(), Watch()]
    with (
        mock.patch.object(engine_parts, "publish", publish_late),
        hf_trainer(config, folder, tiny_llama(), callbacks=callbacks, **settings) as trainer,
    ):
        args = trainer.args
        if attached:
            grass_ds.attach(trainer)
        trainer.train()
        return {"seen": seen, "end": there(), "limit": args.save_total_limit}


AT_ONCE = [{step: True} for step in range(1, 5)]
LATE = [{1: False}, {1: True, 2: False}, {2: True, 3: False}, {3: True, 4: False}]


@pytest.mark.parametrize(
    ("limit", "attached", "background", "seen", "end"),
    [
        (1, True, False, AT_ONCE, {4: True}),
        (1, True, True, LATE, {4: True}),
        (2, False, True, LATE, {3: True, 4: True}),  # the Trainer's own rotation
    ],
)
def test_the_limit_never_takes_the_only_complete_checkpoint(
    two_ranks: Any, limit: int, attached: bool, background: bool, seen: Any, end: Any, tmp_path: Path
) -> None:
    how = {"limit": limit, "attached": attached, "background": background}
    found, other = two_ranks.run(save_with_limit, folder=tmp_path, **how)
    assert found["seen"] == seen
    assert found["end"] == end
    assert found["limit"] == other["limit"] == limit


def seal_without_a_file(folder: Path) -> str:
    """Rank 1 has not written its random state."""
    from deepspeed import comm as dist

    rank, checkpoint = dist.get_rank(), folder / "checkpoint-3"
    args = SimpleNamespace(output_dir=folder, process_index=rank, world_size=2, should_save=rank == 0)
    if rank == 0:
        checkpoint.mkdir()
        (checkpoint / "rng_state_0.pth").touch()
    dist.barrier()
    return said(lambda: seal_checkpoint(args, 3))


def test_every_rank_learns_of_a_checkpoint_that_cannot_be_sealed(two_ranks: Any, tmp_path: Path) -> None:
    other, own = two_ranks.run(seal_without_a_file, folder=tmp_path)
    assert other.startswith("RankFailedError: rank 1 failed: ") and "rng_state_1.pth" in other
    assert own.startswith("OSError: the checkpoint ") and "rng_state_1.pth" in own
    assert not (tmp_path / "checkpoint-3" / SEAL).exists()


# ---- the callback ---------------------------------------------------------------------------------------------------


def without_enable(folder: Path) -> str:
    settings = {**trainer_settings("fp32"), "callbacks": [grass_ds.GrassCallback()]}
    with hf_trainer(hf_config(), folder, tiny_llama(), enabled=False, **settings) as trainer:
        return said(trainer.train)


def test_a_forgotten_enable_is_an_error_on_every_rank(two_ranks: Any, tmp_path: Path) -> None:
    for message in two_ranks.run(without_enable, folder=tmp_path):
        assert "call grass_ds.enable() before building the Trainer" in message


# ---- wandb ----------------------------------------------------------------------------------------------------------


@contextmanager
def offline_wandb(folder: Path) -> Iterator[None]:
    import wandb

    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_PROJECT": "grass"}
    try:
        yield
    finally:
        wandb.finish()


def run_and_report(folder: Path) -> dict[str, Any]:
    settings = trainer_settings("fp32", clip=1.0)
    with hf_trainer(hf_config(), folder / "out", tiny_llama(), report_to=["wandb"], **settings) as trainer:
        callback = grass_ds.attach(trainer)
        with offline_wandb(folder):
            trainer.train()
        return {"log": trainer.state.log_history, "history": callback.history is not None}


def test_wandb_gets_one_run_with_everything_in_it(two_ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    [found, other] = two_ranks.run(run_and_report, folder=tmp_path)
    assert found["history"] and not other["history"]  # one rank writes
    [run] = tmp_path.glob("wandb/offline-run-*")
    [file] = run.glob("*.wandb")
    rows = read_history(file)
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    training = [row for row in rows if "train/loss" in row]
    assert [row["train/global_step"] for row in training] == list(range(1, STEPS + 1))
    logged = [entry for entry in found["log"] if "loss" in entry]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [row[f"train/{name}"] for row in training] == pytest.approx([entry[name] for entry in logged])
    assert [row["train/grass/phase"] for row in training] == [0.0] + [1.0] * (STEPS - 1)
    for row in training:
        active = [row[f"train/grass/active/{layer:02d}"] for layer in range(LAYERS)]
        assert sum(active) == (1 if row["train/grass/phase"] else LAYERS)
        assert sum(row[f"train/grass/prob/{layer:02d}"] for layer in range(LAYERS)) == pytest.approx(1.0)
        assert ("train/grass/score/00" in row) == bool(row["train/grass/phase"])
        assert row["train/grass/bytes/weights/device"] > 0
        assert {"train/grass/bytes/gradients/device", "train/grass/bytes/optimizer_state/host"} <= set(row)
        assert row["train/tokens_per_second"] > 0
    state = [row["train/grass/bytes/optimizer_state/host"] for row in training]
    assert state[-1] > state[0]
    assert len({tuple(row[f"train/grass/active/{layer:02d}"] for layer in range(LAYERS)) for row in training}) > 2
    assert not any("train/grass/prob/02" in row for row in rows if "train/loss" not in row), "a row of their own"
    assert {"grass/layers", "grass/probabilities"} <= {key.split(".")[0] for row in rows for key in row}  # the plots
    images = run.glob("files/media/images/grass/*.png")
    assert {path.name.split("_")[0] for path in images} == {"layers", "probabilities"}


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


def checkpointed(folder: Path, reentrant: bool | None) -> dict[str, Any]:
    model = tiny_llama()
    start = snapshot(model)
    mode: dict[str, Any] = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        mode["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    config, settings = hf_config(always_active=["norm"]), trainer_settings("fp32")
    with hf_trainer(config, folder, model, **settings, **mode) as trainer, losses_seen(model) as seen:
        trainer.train()
        end = snapshot(model)
        return {
            "losses": seen,
            "weights": end,
            "visits": trainer.deepspeed.grass.visits,
            "moved": {int(n.split(".")[2]) for n in end if ".layers." in n and not torch.equal(end[n], start[n])},
            "on": model.is_gradient_checkpointing,
            "input gradients": inputs_require_gradients(model),
        }


def every_checkpointing_mode(folder: Path) -> dict[bool | None, dict[str, Any]]:
    return {mode: checkpointed(folder, mode) for mode in (None, True, False)}


def test_gradient_checkpointing_changes_nothing_but_memory(two_ranks: Any, tmp_path: Path) -> None:
    for modes in two_ranks.run(every_checkpointing_mode, folder=tmp_path):
        reference = modes.pop(None)
        assert not reference["on"]
        for reentrant, found in modes.items():
            assert found["on"]
            assert found["losses"] == reference["losses"]
            assert difference(found["weights"], reference["weights"]) is None
            assert found["moved"] == {layer for layer, steps in enumerate(found["visits"]) if steps} != set()
            # the hook that reentrant checkpointing needs while the embeddings are frozen
            assert found["input gradients"] == reentrant
