# SPDX-License-Identifier: Apache-2.0
"""Ranges of versions: equal in package and code; a warning outside of them; a message where a package is missing."""

import importlib.metadata
import re
import sys
from pathlib import Path
from unittest import mock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

import pytest
from deepspeed.utils import logger
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import grass_ds
from grass_ds import entry, validation, versions
from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.core import deepspeed_compat
from launch import startup

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    return {(r := Requirement(line)).name: r.specifier for line in lines}


EXTRAS = {extra: requirements(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
CORE = requirements(PROJECT["dependencies"])


def test_the_package_declares_the_tested_ranges() -> None:
    stated = CORE | EXTRAS["hf"] | {"datasets": EXTRAS["launch"]["datasets"]}
    stated["python"] = SpecifierSet(f"{PROJECT['requires-python']},<3.14")
    assert {name: stated[name] for name in versions.RANGES} == {
        name: SpecifierSet(ranges) for name, ranges in versions.RANGES.items()
    }


def test_the_core_needs_torch_deepspeed_and_numpy() -> None:
    assert CORE.keys() == {"torch", "deepspeed", "numpy", "packaging"}
    theirs = requirements([line for line in importlib.metadata.requires("deepspeed") or [] if "extra ==" not in line])
    assert {"psutil", "pydantic", "packaging"} <= theirs.keys()  # which the core imports, too


def test_every_optional_package_is_in_its_extra() -> None:
    assert {name: name in EXTRAS[extra] for name, extra in versions.EXTRAS.items()} == dict.fromkeys(
        versions.EXTRAS, True
    )
    assert EXTRAS.keys() == {*versions.EXTRAS.values(), "demo", "dev", "release"}


def test_the_programs_have_an_extra_of_their_own() -> None:
    programs = EXTRAS["launch"]
    assert Requirement(PROJECT["optional-dependencies"]["launch"][0]).extras == {"hf", "plots"}
    assert {"datasets", "transformers", "psutil", "tqdm"} < programs.keys()


@pytest.mark.parametrize(
    ("name", "found", "tested"),
    [
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.6.0", True),
        ("torch", "2.5.1", False),
        ("torch", "2.15.0a0+git1", True),
        ("torch", "2.6.0a0+ecf3bae.nv25.1", True),
        ("torch", "2.16.0.dev20261101", False),
        ("transformers", "4.51.0.dev0", True),
        ("numpy", "of my own", False),
        ("torch", "2.16.0", False),
        ("deepspeed", "0.19.9+local", True),
        ("python", "3.9.18", False),
    ],
)
def test_what_counts_as_tested(name: str, found: str, tested: bool) -> None:
    with mock.patch.object(versions, "installed", return_value=found):
        sentence = versions.untested([name])
    assert versions.is_tested(name, found) is tested
    assert (sentence == "") is tested
    if not tested:
        assert f"{name} {found} (tested: {versions.RANGES[name]}; " in sentence
        assert f"pip install '{name}{versions.RANGES[name]}'" in sentence or "use a Python" in sentence


def test_what_is_not_installed_is_not_untested() -> None:
    with mock.patch.dict(versions.RANGES, {"no-such-package": ">=1"}):
        assert versions.untested(["no-such-package"]) == ""


def warnings_of_a_start(rank: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    entry._warn_of_untested_versions.cache_clear()
    said: list[str] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logger, "warning", said.append)
    monkeypatch.setattr(versions, "installed", {"torch": "2.99.0", "deepspeed": "0.19.8"}.get)
    for _ in range(2):
        entry._warn_of_untested_versions()
    entry._warn_of_untested_versions.cache_clear()
    return said


def test_rank_0_alone_says_once_what_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    [said] = warnings_of_a_start("0", monkeypatch)
    assert said == f"grass_ds is not tested with {outside('torch', '2.99.0')}"
    assert warnings_of_a_start("1", monkeypatch) == []


def outside(name: str, found: str) -> str:
    return f"{name} {found} (tested: {versions.RANGES[name]}; pip install '{name}{versions.RANGES[name]}')"


def test_an_import_that_fails_names_the_package_that_may_be_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback imports names that old releases lack; Python's message has no version."""
    monkeypatch.setattr(versions, "installed", {"transformers": "4.30.0"}.get)
    monkeypatch.delitem(sys.modules, "grass_ds.trainer.callback", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate.state", None)
    with pytest.raises(ImportError, match="accelerate.state.*" + re.escape(outside("transformers", "4.30.0"))):
        grass_ds.GrassCallback  # noqa: B018


COMMAND = "deepspeed 0.19.2 does not have: x: pip install 'deepspeed>=0.19.3'"
FAILED_IMPORTS: list[tuple[str, str, Exception, str]] = [
    (
        "GrassCallback", "4.60.0", ModuleNotFoundError("No module named 'transformers'", name="transformers"),
        r"^No module named 'transformers': pip install 'transformers>=.*extra 'hf'",
    ),
    (  # what transformers makes of a failed import
        "GrassCallback", "4.40.0", RuntimeError("Failed to import transformers.integrations"),
        "^Failed to import .*" + re.escape(outside("transformers", "4.40.0")),
    ),
    ("initialize", "4.60.0", ImportError(COMMAND), f"^{re.escape(COMMAND)}$"),  # names the command already
]  # fmt: skip


@pytest.mark.parametrize(("name", "transformers", "error", "said"), FAILED_IMPORTS)
def test_a_failed_import_names_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, transformers: str, error: Exception, said: str
) -> None:
    monkeypatch.setattr(versions, "installed", {"transformers": transformers, "deepspeed": "0.19.2"}.get)
    monkeypatch.setattr(grass_ds, "import_module", mock.Mock(side_effect=error))
    with pytest.raises(ImportError, match=said):
        getattr(grass_ds, name)


def test_a_package_that_deepspeed_needs_is_not_taken_for_a_name_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ModuleNotFoundError("No module named 'hjson'", name="hjson")
    monkeypatch.setattr(deepspeed_compat.importlib, "import_module", mock.Mock(side_effect=lacking))
    with pytest.raises(ModuleNotFoundError, match="hjson"):
        deepspeed_compat.missing_names()


def test_programs_say_at_start_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    startup.check_packages()
    with monkeypatch.context() as patch:
        patch.setattr(startup, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"need datasets, which is not installed: pip install '.\[launch\]'"):
            startup.check_packages()
    monkeypatch.delattr("transformers.Trainer._run_epoch")
    with pytest.raises(
        ImportError, match=r"_run_epoch, which transformers .* does not have: pip install '.\[launch\]'"
    ):
        startup.check_packages()


def test_zero3_on_cpu_ranks_needs_a_deepspeed_that_waits_for_its_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_compat, "waits_for_all_gathers", lambda: False)
    monkeypatch.setattr(validation, "installed", lambda _: "0.19.3")
    configs = {stage: {"zero_optimization": {"stage": stage}, "grass": {"sampler": "uniform"}} for stage in (1, 2, 3)}
    for stage in (1, 2):
        validation.check_ds_config(configs[stage], GrassConfig())
    with pytest.raises(GrassConfigError) as caught:
        validation.check_ds_config(configs[3], GrassConfig())
    for part in ("zero_optimization.stage = 3", "deepspeed 0.19.3", "pip install 'deepspeed>=0.19.8,<0.20'"):
        assert part in str(caught.value)


# What front-ends and a GPU image hold in November 2026.
ENVIRONMENTS = {
    "axolotl": {"torch": "2.12.1", "transformers": "5.14.1", "accelerate": "1.13.0", "datasets": "4.8.5"},
    "LLaMA-Factory": {"transformers": "5.6.2", "datasets": "4.0.0"},
    "ms-swift": {"transformers": "5.19.0", "datasets": "4.8.4"},
    "Unsloth": {"transformers": "5.17.0", "datasets": "4.8.5"},
    "GPU image": {"torch": "2.11.0+cu130", "transformers": "5.17.0", "accelerate": "1.15.0", "python": "3.12.3"},
}


def test_the_ranges_admit_what_users_have() -> None:
    for name, packages in ENVIRONMENTS.items():
        assert [p for p, found in packages.items() if not versions.is_tested(p, found)] == [], name
