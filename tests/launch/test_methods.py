# SPDX-License-Identifier: Apache-2.0
"""launch/train.py --method: which configuration it takes, what it refuses, and what adapters train, save and resume."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import VOCAB, batch, tiny_llama
from helpers.programs import ROOT, run_forked
from transformers import AutoModelForCausalLM

from grass_ds.config import parse_grass_block
from launch import adapters, arguments, dtype, evaluate, methods
from launch.adapters import Lora
from launch.arguments import MethodArguments
from launch.model import load, resolve

CONFIGS = ROOT / "ds_configs"


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_takes_its_own_configuration(name: str) -> None:
    method = methods.METHODS[name]
    path, ds_config, run = arguments._configuration(["--method", name])
    assert path == CONFIGS / method.config
    assert run == name
    block = parse_grass_block(ds_config)
    assert (None if block is None else block.sampler) == method.sampler


@pytest.mark.parametrize(
    ("name", "file", "run"),
    [("lora", "zero3_full.json", "lora-zero3_full"), ("grass", "zero1_grass.json", "grass-zero1_grass")],
)
def test_a_method_takes_another_configuration_that_fits(name: str, file: str, run: str) -> None:
    path, _, found = arguments._configuration(["--method", name, "--deepspeed", str(CONFIGS / file)])
    assert (path, found) == (CONFIGS / file, run)


def test_without_a_method_the_configuration_decides() -> None:
    path, ds_config, run = arguments._configuration(["--deepspeed", str(CONFIGS / "lisa.json")])
    assert (path, run) == (CONFIGS / "lisa.json", "lisa")
    assert ds_config == json.loads((CONFIGS / "lisa.json").read_text())
    assert arguments._lora(MethodArguments()) is None


@pytest.mark.parametrize(
    ("name", "file", "needs", "has"),
    [
        ("lora", "grass.json", 'no "grass" block', "the sampler 'grass'"),
        ("lora-fa", "lisa.json", 'no "grass" block', "the sampler 'uniform'"),
        ("full", "badam.json", 'no "grass" block', "the sampler 'cyclic'"),
        ("lisa", "grass.json", "the sampler 'uniform'", "the sampler 'grass'"),
        ("badam", "lisa.json", "the sampler 'cyclic'", "the sampler 'uniform'"),
        ("grass", "full.json", "the sampler 'grass'", 'no "grass" block'),
    ],
)
def test_a_configuration_that_contradicts_the_method_is_refused(name: str, file: str, needs: str, has: str) -> None:
    with pytest.raises(ValueError, match=f"--method {name} and --deepspeed .*{file} contradict") as refused:
        arguments._configuration(["--method", name, "--deepspeed", str(CONFIGS / file)])
    said = str(refused.value)
    assert said.index(needs) < said.index(has)


def test_a_disabled_block_is_none(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "grass.json").read_text())
    config["grass"]["enabled"] = False
    (tmp_path / "off.json").write_text(json.dumps(config))
    arguments._configuration(["--method", "lora", "--deepspeed", str(tmp_path / "off.json")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "lorra"], "--method lorra: no such method; choose one of full, lora, "),
        ([], "say how to train with --method NAME or --deepspeed FILE"),
        (["--method"], "say how to train"),
    ],
)
def test_a_method_that_is_not_there_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments._configuration(given)


def test_the_adapters_follow_the_options() -> None:
    chosen = arguments._lora(MethodArguments(method="lora"))
    assert chosen == Lora(rank=128, alpha=256, targets="all-linear", frozen=None)
    given = MethodArguments(method="lora-fa", lora_rank=8, lora_targets="q_proj, v_proj")
    assert arguments._lora(given) == Lora(rank=8, alpha=16, targets=("q_proj", "v_proj"), frozen="lora_A")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "grass", "lora_rank": 8}, "--lora_rank 8: only --method lora and lora-fa"),
        ({"lora_targets": "q_proj"}, "--lora_targets q_proj: only --method"),
        ({"method": "lora", "lora_rank": 0}, "--lora_rank must be at least 1, got 0"),
        ({"method": "lora", "lora_alpha": -1}, "--lora_alpha must be at least 1, got -1"),
        ({"method": "lora", "lora_targets": "q_proj,"}, "--lora_targets 'q_proj,'"),
    ],
)
def test_options_of_adapters_that_cannot_work_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments._lora(MethodArguments(**given))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def test_what_adapters_need_is_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, fa = (Lora(8, 16, "all-linear", frozen) for frozen in (None, "lora_A"))
    gathers = zero(3, stage3_gather_16bit_weights_on_model_save=True)
    for each, config in ((lora, zero(2)), (fa, zero(1)), (lora, gathers)):
        adapters.check("--method x", each, config)
    with pytest.raises(ValueError, match=r"--method lora with ZeRO-3 .*stage3_gather_16bit_weights_on_model_save"):
        adapters.check("--method lora", lora, zero(3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--method lora needs PEFT, which is not installed: pip install '.\[peft\]'"):
        adapters.check("--method lora", lora, zero(2))
    with pytest.raises(ValueError, match=r"--model out: adapters need PEFT"):
        adapters.load_saved(tiny_llama(), "out")


@pytest.mark.parametrize("gathers", [True, False])
def test_lora_fa_on_zero3_is_refused_at_start(gathers: bool, tmp_path: Path, without_ranks: None) -> None:
    """By the command line, before a model is loaded; with one remedy, as no setting of ZeRO-3 would help."""
    config = json.loads((CONFIGS / "zero3_full.json").read_text())
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gathers
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    given = ["--deepspeed", str(tmp_path / "zero3.json"), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    with pytest.raises(
        ValueError, match=r"^--method lora-fa with ZeRO-3: .* give a --deepspeed file with ZeRO stage 1 or 2"
    ):
        arguments.parse(["--method", "lora-fa", *given])
    if gathers:
        assert arguments.parse(["--method", "lora", *given]).lora() == Lora.choose(None, None, None, None)


def test_label_smoothing_is_refused_with_ist(without_ranks: None) -> None:
    given = ["--method", "ist", "--bf16", "false", "--label_smoothing_factor", "0.1"]
    with pytest.raises(ValueError, match=r"--label_smoothing_factor 0.1: the Trainer would take the labels"):
        arguments.parse(given)


def test_a_target_that_the_model_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module 'query'; its linear ones are down_proj, .*q_proj"):
        adapters.wrap(tiny_llama(), Lora(8, 16, ("q_proj", "query"), None))


@pytest.fixture
def saved(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with adapters of rank 4, as a checkpoint has them."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapters.wrap(base, Lora.choose(4, None, None, None)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_checkpoint_of_another_method_is_refused(model_folder: Path, saved: Path, tmp_path: Path) -> None:
    adapters.refuse(model_folder)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {saved}: is of a run with adapters"):
        adapters.refuse(saved)

    def adapted(rank: int, targets: str | None = None) -> Any:
        return adapters.wrap(AutoModelForCausalLM.from_pretrained(model_folder), Lora.choose(rank, 8, targets, None))

    adapters.restore(adapted(4), saved)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        adapters.restore(adapted(4), model_folder)
    with pytest.raises(ValueError, match="was trained with --lora_rank 4, this run has 8"):
        adapters.restore(adapted(8), saved)
    with pytest.raises(ValueError, match=r"was trained with --lora_targets \S+q_proj\S+, this run has q_proj"):
        adapters.restore(adapted(4, "q_proj"), saved)


def test_a_resumed_run_keeps_the_precision_of_its_adapters(saved: Path, tmp_path: Path) -> None:
    assert dtype._saved_dtype(str(saved)) == "bf16"
    assert dtype._saved_dtype(str(tmp_path)) is None


def test_adapters_are_no_model_to_train(saved: Path) -> None:
    with pytest.raises(ValueError, match=f"--model {saved}: the folder holds adapters of .*merge_and_unload"):
        resolve(str(saved))


def test_adapters_whose_model_is_gone_are_refused(saved: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(saved)
    file = saved / adapters.CONFIG_FILE
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(ValueError, match=rf"/no/such/model: no such folder.*base_model_name_or_path in {file}"):
        load(str(saved), "fp32")
    file.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say for which model"):
        load(str(saved), "fp32")


# ---- on two ranks --------------------------------------------------------------------------------------------------------


def train_adapters(method: str, base: Path, folder: Path, resume: Path | None, seed: int) -> dict[str, Any]:
    """Four steps on ZeRO-2, saved at two; weights before and after by name, and the logits of the trained model."""
    from helpers.trainers import hf_trainer

    ds_config = json.loads((CONFIGS / methods.METHODS[method].config).read_text())
    if method == "ist":
        ds_config["grass"] |= {"num_active_layers": 1, "refresh_period": 1}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    # With activation checkpointing the input of a layer must require a gradient, or no adapter gets one.
    adapted = adapters.wrap(model, Lora.choose(4, None, None, methods.METHODS[method].frozen), checkpointing=True)
    if resume is not None:
        adapters.restore(adapted, resume)
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    settings = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    with hf_trainer(ds_config, folder, adapted, gradient_checkpointing=True, **settings) as trainer:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder / "out"))
        after = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
        with torch.no_grad():
            logits = adapted.eval()(input_ids=batch(0, 0, 0)).logits
    return {"before": before, "after": after, "logits": logits}


@pytest.mark.dist
@pytest.mark.parametrize("method", ["lora", "lora-fa", "ist"])
def test_adapters_train_save_merge_and_resume(two_ranks: Any, tmp_path: Path, method: str) -> None:
    from peft import PeftModel

    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    run = partial(two_ranks.run, train_adapters, method=method, base=base)
    first = run(folder=tmp_path / "first", resume=None, seed=1)
    before, after = first[0]["before"], first[0]["after"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if "lora_B" in name or (method != "lora-fa" and "lora_A" in name)}
    if method == "ist":  # in each of four steps the adapters of one layer
        assert moved < trained
        trained = moved
    assert moved == trained
    assert len(trained) >= 7  # every linear module of every layer
    assert all(torch.equal(after[name], other["after"][name]) for other in first for name in after)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = model(input_ids=batch(0, 0, 0)).logits
    merged = PeftModel.from_pretrained(model, tmp_path / "first" / "out").merge_and_unload()
    logits = merged(input_ids=batch(0, 0, 0)).logits
    assert logits.shape[-1] == VOCAB
    torch.testing.assert_close(logits, first[0]["logits"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-3)

    # Started with other random adapters: everything comes from the checkpoint, the frozen part, too.
    resumed = run(folder=tmp_path / "second", resume=tmp_path / "first" / "checkpoint-2", seed=2)
    for one, other in zip(first, resumed, strict=True):
        assert all(torch.equal(one["after"][name], other["after"][name]) for name in after)


def train_with(method: str, model: Path, folder: Path, *more: str) -> None:
    from launch import train

    options = ["--method", method, "--model", str(model), "--output_dir", str(folder / "out"), "--bf16", "false"]
    options += ["--max_steps", "3", "--logging_steps", "1", "--eval_samples", "4", "--train_samples", "16"]
    options += ["--eval_task", "loss", "--learning_rate", "0.01", "--disable_tqdm", "true", *more]
    sys.argv = ["launch/train.py", *options]
    sys.exit(train.main())


@pytest.mark.dist
@pytest.mark.slow
def test_the_program_trains_by_method(model_folder: Path, tmp_path: Path) -> None:
    """The report names the method; evaluate.py finds the adapters' loss again, and their model by the folder alone.

    On ZeRO-3, too, where adapters are partitioned like the model and gathered to be saved.
    """
    rows = "".join(json.dumps({"instruction": f"{i} + 1?", "output": f"{i + 1}."}) + "\n" for i in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = ["--data", str(tmp_path / "rows.jsonl"), "--eval_data", str(tmp_path / "rows.jsonl")]
    small = ["--lora_rank", "4", "--lora_targets", "q_proj,up_proj"]
    zero3 = ["--deepspeed", str(CONFIGS / "zero3_full.json")]
    started = {
        tmp_path / "zero3": (2, partial(train_with, "lora", model_folder, tmp_path / "zero3", *data, *small, *zero3)),
        tmp_path / "lora": (2, partial(train_with, "lora", model_folder, tmp_path / "lora", *data, *small)),
        tmp_path / "badam": (1, partial(train_with, "badam", model_folder, tmp_path / "badam", *data)),
    }
    for folder in started:
        folder.mkdir()
    codes = run_forked(started)
    reports = {}
    for folder in started:
        said = (folder / "log").read_text()
        assert codes[folder] == [0] * started[folder][0], said[-3000:]
        reports[folder.name] = json.loads((folder / "out" / "report.json").read_text())
        method = reports[folder.name]["settings"]["method"]
        named = f"{method}, ZeRO-{'3 (zero3_full.json)' if folder.name == 'zero3' else '2'}"
        assert f"method            {named}" in said
        state = json.loads((folder / "out" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    lora, badam = reports["lora"], reports["badam"]
    assert badam["adapters"] is None
    assert lora["parameters"] == badam["parameters"]
    assert {key: lora["adapters"][key] for key in ("rank", "alpha", "targets")} == {
        "rank": 4,
        "alpha": 8,
        "targets": ["q_proj", "up_proj"],
    }
    assert lora["adapters"]["trained"] == lora["adapters"]["parameters"] == 4 * 4 * ((32 + 32) + (32 + 64))
    assert (lora["settings"]["method"], lora["settings"]["max_steps"]) == ("lora", 3)
    assert badam["ds_config"]["grass"]["sampler"] == "cyclic"

    asked = evaluate.Arguments(
        model=str(tmp_path / "lora" / "out"), data=data[1], samples=4, task="loss", dtype="fp32"
    )
    assert evaluate.run(asked)["value"] == pytest.approx(lora["after"]["loss"], rel=1e-4)
    asked.model = str(tmp_path / "zero3" / "out")
    assert evaluate.run(asked)["value"] == pytest.approx(reports["zero3"]["after"]["loss"], rel=1e-4)
    assert reports["zero3"]["adapters"] == lora["adapters"]
    assert reports["zero3"]["after"]["loss"] == pytest.approx(lora["after"]["loss"], abs=1e-3)
    assert lora["after"]["loss"] < lora["before"]["loss"] - 5e-3
    asked.model = str(model_folder)
    assert evaluate.run(asked)["value"] == pytest.approx(lora["before"]["loss"], rel=1e-4)
