# SPDX-License-Identifier: Apache-2.0
"""`GrassCallback` in a real HF Trainer on one CPU process; a fake handle stands in for the engine's."""

import copy
import itertools
import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers.markdown import code_blocks, lines_of
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

import grass_ds
from grass_ds.trainer import callback as callback_module
from grass_ds.trainer import throughput
from grass_ds.trainer.callback import GrassCallback
from grass_ds.trainer.history import History

NUM_LAYERS = 3
SEQUENCE = 8
BATCH = 2
SAVING = {"save_strategy": "steps", "save_steps": 4}


class FakeHandle:
    """Trains layer (step mod 3) after two probe steps; `switch` is what the engine does at the end of a step."""

    layers = tuple(f"model.layers.{i}" for i in range(NUM_LAYERS))
    probabilities = (0.25, 0.25, 0.5)
    most_active = 1
    checkpoint = None

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.waits = 0

    @property
    def phase(self) -> str:
        return "probe" if self.step < 2 else "train"

    @property
    def active_layers(self) -> tuple[int, ...]:
        return tuple(range(NUM_LAYERS)) if self.step < 2 else (self.step % NUM_LAYERS,)

    @property
    def scores(self) -> tuple[float, ...] | None:
        return None if self.step < 2 else (1.0, 2.0, 3.0)

    @property
    def visits(self) -> tuple[int, ...]:
        return (self.step,) * NUM_LAYERS

    def memory(self, peak: bool = False) -> dict[str, dict[str, int]]:
        return {"weights": {"device": 10, "host": 0}}

    def wait_for_checkpoint(self) -> None:
        self.waits += 1


class FakeGrassOptimizer(torch.optim.SGD):
    """Carries the handle as the engine's ZeRO optimizer does, inside accelerate's wrapper."""

    grass: FakeHandle

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.grass.step += 1


class Recorder(TrainerCallback):
    """Stands where the Trainer puts wandb and TensorBoard: ahead of the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.events: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("begin")


class LastRecorder(Recorder):
    pass


def make_trainer(folder: Path, callbacks: list[Any], handle: FakeHandle | None = None, **arguments: Any) -> Trainer:
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=NUM_LAYERS, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    if handle is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    else:
        optimizer = FakeGrassOptimizer(model.parameters(), lr=0.01)
        optimizer.grass = handle
    tokens = torch.arange(SEQUENCE)
    options = {
        "max_steps": 6,
        "logging_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        **arguments,
    }
    args = TrainingArguments(output_dir=str(folder), **options)
    if handle is not None:
        args.hf_deepspeed_config = SimpleNamespace(config={"grass": {"sampler": "cyclic", "num_active_layers": 1}})
    return Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 64,
        eval_dataset=[{"input_ids": tokens, "labels": tokens}] * 4,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def a_second_per_reading(patch: pytest.MonkeyPatch) -> None:
    """A step takes one second then, and no pause counts: tokens per second are tokens per step."""
    clock = itertools.count()
    patch.setattr(throughput, "perf_counter", lambda: float(next(clock)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One attached run of 6 steps, that the tests below look at."""
    folder = tmp_path_factory.mktemp("run")
    before, callback, after = Recorder(), GrassCallback(), LastRecorder()
    options = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2}
    report_to = "tensorboard" if find_spec("tensorboard") else "none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        a_second_per_reading(patch)
        trainer = make_trainer(
            folder, [before, callback, after], FakeHandle(), report_to=report_to, **SAVING, **options
        )
        assert grass_ds.attach(trainer) is callback
        trainer.train()
    return SimpleNamespace(folder=folder, before=before, callback=callback, after=after)


def test_every_callback_sees_the_summary(run: SimpleNamespace) -> None:
    assert run.before.events == run.after.events == ["begin"]
    assert run.before.logs == run.after.logs
    first, second, third = (log for log in run.before.logs if "loss" in log)
    assert first["grass/phase"] == 1.0  # read after the second step: the next one trains
    assert [log["grass/active_layers"] for log in (first, second, third)] == ["2", "1", "0"]
    assert third["grass/bytes/device"] == 10.0
    assert not any(key.rsplit("/", 1)[-1].isdigit() for log in run.before.logs for key in log), (
        "values of single layers"
    )
    assert [log["tokens_per_second"] for log in (first, second, third)] == [2 * BATCH * SEQUENCE] * 3


def test_evaluation_logs_and_the_closing_summary_stay_as_they_are(run: SimpleNamespace) -> None:
    others = [log for log in run.before.logs if "loss" not in log]
    assert ["eval_loss" in log for log in others] == [True, True, False]
    assert "train_runtime" in others[-1]
    assert not any(key.startswith("grass/") for log in others for key in log)


def test_history_holds_what_each_step_trained(run: SimpleNamespace) -> None:
    rows = History.load(run.folder / callback_module.HISTORY_FILE).rows
    assert rows == run.callback.history.rows
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.phase for row in rows] == ["probe"] * 2 + ["train"] * 4
    # Not what the engine drew at the end of the step.
    assert [row.active_layers for row in rows] == [(0, 1, 2), (0, 1, 2), (2,), (0,), (1,), (2,)]
    assert rows[0].scores is None
    assert rows[-1].probabilities == (0.25, 0.25, 0.5)


def test_plots_are_drawn_at_the_end(run: SimpleNamespace) -> None:
    plots = run.folder / "plots"
    assert run.callback.plot_paths == [plots / "layers.png", plots / "probabilities.png"]
    assert all(path.is_file() for path in run.callback.plot_paths)


def test_the_model_card_tells_of_the_run(run: SimpleNamespace, tmp_path: Path) -> None:
    card = ModelCard.load(run.folder / "README.md")
    assert card.data.tags == ["grass"] and card.data.library_name == "transformers"
    assert "sampler `cyclic`: at most 1 of 3 layers" in card.text
    assert "for 4 optimizer steps after 2 that only measured gradients" in card.text
    assert [line["steps"] for line in lines_of(card.text)] == ["1", "1", "2"]
    [block] = code_blocks(card.text, "json")
    assert json.loads(block) == {"always_active": None, "sampler": "cyclic", "num_active_layers": 1}
    assert f"torch {torch.__version__}" in card.text
    # Of another folder's card everything else stays, and a second section replaces the first.
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- trl\n---\n# Mine\n\nBy \\1 me.\n")
    for _ in range(2):
        run.callback.add_to_model_card(tmp_path)
    other = ModelCard.load(tmp_path / "README.md")
    assert (other.data.license, other.data.tags) == ("mit", ["trl", "grass"])
    assert other.text.strip().startswith("# Mine\n\nBy \\1 me.\n\n<!-- grass_ds -->")
    assert other.text.count("## Layer-sampled fine-tuning") == 1


def test_a_bad_model_card_ends_nothing_and_tags_are_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(callback_module.logger, "warning", warnings.append)
    (tmp_path / "README.md").write_text("---\n- no mapping\n---\n")
    trainer = make_trainer(tmp_path, [], FakeHandle(), max_steps=3)
    grass_ds.attach(trainer)
    assert trainer.train().global_step == 3
    [said] = warnings
    assert said.startswith("could not write the model card") and "should be a dict" in said
    assert trainer.model.model_tags == ["grass"]  # which push_to_hub adds to the card


def test_tensorboard_gets_the_values_of_each_layer(run: SimpleNamespace) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = next(run.folder.rglob("events.out.tfevents.*"))  # transformers 4 has a folder of its own for them
    events = EventAccumulator(str(written.parent))
    events.Reload()

    def scalars(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(f"train/grass/{name}")}

    assert scalars("phase") == {2: 1.0, 4: 1.0, 6: 1.0}
    assert scalars("active/01") == {2: 0.0, 4: 1.0, 6: 0.0}
    assert scalars("score/02") == {2: 3.0, 4: 3.0, 6: 3.0}
    assert scalars("prob/02") == {2: 0.5, 4: 0.5, 6: 0.5}
    assert scalars("bytes/weights/device") == {2: 10.0, 4: 10.0, 6: 10.0}


def test_resume_continues_the_history(run: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    recorder, resumed = Recorder(), make_trainer(tmp_path, [], FakeHandle(step=4), **SAVING)
    resumed.add_callback(recorder)
    callback = grass_ds.attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row.step for row in callback.history.rows] == [1, 2, 3, 4, 5, 6]
    assert History.load(tmp_path / callback_module.HISTORY_FILE).rows == callback.history.rows
    assert "grass/phase" in recorder.logs[0]


def test_a_history_of_another_model_is_kept_aside(run: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / callback_module.HISTORY_FILE
    other = file.read_text().replace("model.layers.2", "model.layers.9")
    file.write_text(other)
    resumed = make_trainer(tmp_path, [GrassCallback()], FakeHandle(step=4), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row.step for row in History.load(file).rows] == [5, 6]
    assert (tmp_path / "grass_history.jsonl.old").read_text() == other


# ---- attach ---------------------------------------------------------------------------------------------------------


def test_unattached_only_the_callbacks_after_it_see_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(callback_module.logger, "warning", warnings.append)
    before, after = Recorder(), LastRecorder()
    trainer = make_trainer(tmp_path, [before, GrassCallback(), after], FakeHandle())
    trainer.args.report_to = ["tensorboard"]
    trainer.train()
    assert [("grass/phase" in log) for log in after.logs] == [True, True, True, False]
    assert not any("grass/phase" in log for log in before.logs)
    [warning] = warnings
    assert warning.startswith("tensorboard will not show") and "grass_ds.attach(trainer)" in warning


@pytest.mark.parametrize(("strategy", "steps"), [("steps", [2, 4, 6]), ("epoch", [6])])
def test_wandb_gets_its_values_before_any_callback_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, steps: list[int]
) -> None:
    rows: list[Any] = []
    monkeypatch.setattr(callback_module, "add_to_wandb_row", rows.append)

    class Counter(TrainerCallback):
        """Ahead of GrassCallback, as the Trainer's wandb callback."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                rows.append(state.global_step)

    trainer = make_trainer(tmp_path, [Counter(), GrassCallback()], FakeHandle(), logging_strategy=strategy)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    assert rows[1::2] == steps
    assert [row["grass/visits/00"] for row in rows[::2]] == steps
    assert all(row["tokens_per_second"] > 0 and row["grass/bytes/device"] == 10 for row in rows[::2])


def test_attach_puts_one_callback_behind_the_flow_callback_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [Recorder()], FakeHandle(), save_total_limit=0)
    args, callback = trainer.args, grass_ds.attach(trainer)
    assert grass_ds.attach(trainer) is callback
    kinds = [type(other).__name__ for other in trainer.callback_handler.callbacks]
    assert kinds[:3] == ["DefaultFlowCallback", "GrassCallback", "Recorder"]
    assert kinds.count("GrassCallback") == 1
    assert trainer.args is args  # no limit to keep


@pytest.mark.parametrize("changes", [{}, {"hf_deepspeed_config": None}, {"save_only_model": True}])
def test_attach_leaves_the_users_arguments_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, [], FakeHandle(), save_total_limit=3)
    args = trainer.args
    vars(args).update(changes)
    before = dict(vars(args))
    grass_ds.attach(trainer)
    assert vars(args) == before
    assert trainer.args.save_total_limit == (3 if changes else None)  # not a run that the callback can keep it for


def test_a_limit_that_is_not_safe_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [GrassCallback()], FakeHandle(), save_total_limit=1, **SAVING)
    with pytest.raises(ValueError, match=r"save_total_limit = 1: .*grass_ds\.attach\(trainer\)"):
        trainer.train()
    trainer.args.save_only_model = True  # nothing to resume from in any case
    trainer.train()
    assert trainer.args.save_total_limit == 1


# ---- failures and second runs ---------------------------------------------------------------------------------------


def test_a_dashboard_or_a_plot_that_fails_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(callback_module.logger, "warning", warnings.append)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    class Broken(TensorBoardCallback):
        def __init__(self) -> None:
            pass

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pass

        on_train_end = on_train_begin

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grass/prob/00" in logs:
                fail()

    monkeypatch.setattr(callback_module, "save_plots", fail)
    trainer = make_trainer(tmp_path, [Broken()], FakeHandle())
    callback = grass_ds.attach(trainer)
    assert trainer.train().global_step == 6
    assert callback.plot_paths == []
    dashboard, plot = warnings  # of three values that could not be logged, one is told
    assert dashboard.startswith("could not log the values of each layer") and "disk full" in dashboard
    assert plot.startswith("could not draw") and "disk full" in plot


def test_a_second_train_starts_anew(tmp_path: Path) -> None:
    callback, handle = GrassCallback(), FakeHandle()
    trainer = make_trainer(tmp_path, [callback], handle)
    trainer.train()
    assert handle.waits == 1, "a checkpoint may not be published yet"
    assert handle not in vars(callback).values(), "the callback keeps the engine alive"
    assert not trainer.model._forward_pre_hooks
    trainer.train()
    assert [row.step for row in callback.history.rows] == [1, 2, 3, 4, 5, 6]
    assert trainer.callback_handler.callbacks.count(callback) == 1


@pytest.mark.parametrize("count", ["all", "non_padding"])
def test_tokens_that_the_trainer_counts_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    a_second_per_reading(monkeypatch)
    callback = GrassCallback()
    options = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    make_trainer(tmp_path, [callback], None, include_num_input_tokens_seen=count, **options).train()
    assert callback.tokens_per_second == 3 * BATCH * SEQUENCE


def test_without_grass_only_the_throughput_is_reported(tmp_path: Path) -> None:
    recorder, callback = Recorder(), GrassCallback()
    make_trainer(tmp_path, [callback, recorder]).train()
    assert recorder.logs[0]["tokens_per_second"] > 0
    assert not any(key.startswith("grass/") for log in recorder.logs for key in log)
    assert callback.history is None
    assert callback.tokens_per_second > 0
    assert not (tmp_path / callback_module.HISTORY_FILE).exists()


def begin(config: dict[str, Any] | None, **kwargs: Any) -> None:
    source = None if config is None else SimpleNamespace(config=config)
    args = SimpleNamespace(
        hf_deepspeed_config=source,
        include_num_input_tokens_seen="no",
        world_size=1,
        output_dir="unused",
        save_only_model=True,
        save_total_limit=None,
        report_to=[],
    )
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, num_input_tokens_seen=0)
    GrassCallback().on_train_begin(args, state, None, **{"model": torch.nn.Linear(1, 1), **kwargs})


@pytest.mark.parametrize("block", [{}, {"enabled": True}, {"sampler": "uniform"}, None])
def test_a_block_that_the_engine_ignores_is_refused(block: Any) -> None:
    stock = SimpleNamespace(optimizer=SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0)))
    if block is None:
        begin({"zero_optimization": {"stage": 2}}, optimizer=stock)
        begin({"grass": {"enabled": False}}, optimizer=stock)
        begin(None, optimizer=stock)
    else:
        with pytest.raises(RuntimeError, match=r"grass_ds\.enable\(\)"):
            begin({"grass": block}, optimizer=stock)


def test_the_block_of_accelerate_launch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"grass": {}}))
    monkeypatch.setattr(callback_module, "is_initialized", lambda: True)
    monkeypatch.setattr(callback_module, "AcceleratorState", lambda: SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(RuntimeError, match=r"grass_ds\.enable\(\)"):
        begin(None)


def test_the_handle_is_found_in_engine_or_wrapped_optimizer() -> None:
    owner, with_handle, with_optimizer = (
        SimpleNamespace(grass=FakeHandle()),
        *(torch.nn.Linear(1, 1) for _ in range(2)),
    )
    with_handle.grass, with_optimizer.grass, with_optimizer.optimizer = owner.grass, None, owner
    # Each of these would be an error if it were not found.
    begin({"grass": {}}, optimizer=SimpleNamespace(optimizer=owner))
    begin({"grass": {}}, model=with_handle)
    begin({"grass": {}}, model=with_optimizer)


def test_the_callback_pickles_and_copies_in_mid_run(tmp_path: Path) -> None:
    class Copier(TrainerCallback):
        copies: ClassVar[list[GrassCallback]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.copies += [pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)]

    callback = GrassCallback()
    callback_list = [callback, Copier()]
    make_trainer(tmp_path, callback_list, FakeHandle()).train()
    for duplicate in Copier.copies:
        assert vars(duplicate) == vars(GrassCallback())
    assert len(callback.history.rows) == 6, "copying disturbed the original"
    make_trainer(tmp_path / "again", [Copier.copies[0]], FakeHandle()).train()
    assert len(Copier.copies[0].history.rows) == 6
