# SPDX-License-Identifier: Apache-2.0
"""Which precision is chosen for what a device computes, and what is said of one that it emulates."""

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import logger

from grass_ds import precision
from grass_ds.doctor import machine
from grass_ds.doctor.finding import FAIL, OK, examine
from grass_ds.precision import Rates

ROOT = Path(__file__).resolve().parents[2]
# GFLOP/s, measured with torch 2.13 on CPUs (one core); of GPUs their data sheets, with emulated bf16 at a tenth of
# fp16.
CPU = {
    "AVX2": ({"bf16": 1.5, "fp32": 20.0}, "fp32"),
    "AVX-512 without bf16": ({"bf16": 30.3, "fp32": 141.7}, "fp32"),
    "avx512_bf16": ({"bf16": 85.9, "fp32": 158.0}, "bf16"),
    "amx_bf16": ({"bf16": 900.0, "fp32": 110.0}, "bf16"),
}
GPU = {
    "A100": ({"bf16": 250e3, "fp16": 250e3, "fp32": 19e3}, "bf16"),
    "V100": ({"bf16": 9e3, "fp16": 100e3, "fp32": 14e3}, "fp16"),
    "bf16 refused": ({"bf16": 0.0, "fp16": 50e3, "fp32": 8e3}, "fp16"),
    "GTX 1080": ({"bf16": 0.0, "fp16": 130.0, "fp32": 8e3}, "fp32"),
    "nothing works": ({"bf16": 0.0, "fp32": 0.0}, "fp32"),
}


@pytest.mark.parametrize("device", [*CPU, *GPU])
def test_the_precision_is_the_one_that_the_device_computes(device: str) -> None:
    gflops, expected = (CPU | GPU)[device]
    rates = Rates(gflops)
    assert rates.recommended() == expected
    assert rates.warning(expected) is None
    assert rates.warning("fp32") is None  # slower on a GPU by design
    assert rates.recommended(["fp32"]) == "fp32"


def test_the_warning_names_the_slowdown_and_the_remedy() -> None:
    text = Rates(CPU["AVX2"][0]).warning("bf16")
    assert text is not None
    assert (
        "13 times" in text and "bf16 matrix products at 1.5 GFLOP/s, fp32 at 20 GFLOP/s" in text and "use fp32" in text
    )
    text = Rates(GPU["bf16 refused"][0]).warning("bf16")
    assert text is not None and "does not work" in text and "use fp16" in text


def test_the_doctor_fails_a_config_that_asks_for_what_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "ds.json")
    nothing: list[dict[str, Any]] = [{}, {"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": False}}, {"fp16": True}]
    bf16: list[dict[str, Any]] = [{"bf16": {"enabled": True}}]
    bf16 += [{"bfloat16": {"enabled": True}, "fp16": {"enabled": False}}]  # DeepSpeed reads both names
    for config in nothing + bf16:
        Path(file).write_text(json.dumps(config))
        assert machine.asked_for(file) == (["bf16"] if config in bf16 else [])
    for device, status in (("AVX2", FAIL), ("amx_bf16", OK)):
        monkeypatch.setattr(precision, "measure", lambda names, device=device: Rates(CPU[device][0]))
        first, second = machine.check_precision(file)
        assert (first.status, second.check, second.status) == (OK, "config", status)
        assert f"train in {CPU[device][1]}: bf16 matrix products at" in first.finding
        assert file in second.finding
    for text, said in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        Path(file).write_text(text)
        (found,) = examine("precision", machine.check_precision, file)
        assert found.status == FAIL and said in found.finding and file in found.finding
    assert examine("precision", machine.check_precision, str(tmp_path / "none.json"))[0].status == FAIL


def test_this_device_is_measured_once() -> None:
    rates = precision.measure(["fp16"])
    assert list(rates.gflops) == ["bf16", "fp16", "fp32"]
    assert rates.gflops["fp32"] > 0
    assert precision.measure(["fp16"]) == rates  # two measurements would differ
    assert list(precision.measure().gflops) == list(precision.candidates()) == ["bf16", "fp32"]


def test_one_warning_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(precision, "measure", lambda names=(): Rates(CPU["AVX2"][0]))
    monkeypatch.setattr(logger, "warning", said.append)
    monkeypatch.setattr(precision, "_WARNED", set())
    for name in ("bf16", "fp32", "bf16"):
        precision.warn_if_emulated(name)
    assert len(said) == 1
    precision.warn_if_emulated("fp16", Rates({"fp16": 9.0, "fp32": 10.0}))  # as another rank's device computes it
    assert len(said) == 1


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the switches are those of x86")
def test_a_cpu_without_bf16_instructions_is_told_by_measuring() -> None:
    """torch, oneDNN and MKL held to AVX2, as on most desktops. No flag of the CPU says so."""
    code = "from grass_ds import precision as p; print(p.measure().recommended(p.candidates()))"
    switches = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | switches, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == ["fp32"], done.stderr[-2000:]
