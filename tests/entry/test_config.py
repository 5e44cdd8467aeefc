# SPDX-License-Identifier: Apache-2.0
"""The ``"grass"`` block: what it accepts, what it says about mistakes, and that every field is explained."""

import ast
import inspect
import math
from typing import Any

import pytest

from grass_ds import config as config_module
from grass_ds.config import GrassConfig, GrassConfigError, OffloadConfig, parse_grass_block
from grass_ds.sampling.controller import Controller


def error_of(block: Any) -> str:
    with pytest.raises(GrassConfigError) as caught:
        parse_grass_block({"grass": block})
    return str(caught.value)


# key, bad value, what the message must say besides both: the range or the choices
MISTAKES = [
    ("enabled", 2, "boolean"),
    ("sampler", "gras", "'grass', 'static', 'uniform', 'cyclic' or 'full'"),
    ("sampler", 3, "'grass'"),
    ("num_active_layers", 0, "greater than or equal to 1"),
    ("num_active_layers", -2, "greater than or equal to 1"),
    ("num_active_layers", 1.5, "integer"),
    ("num_active_layers", "two", "integer"),
    ("num_active_layers", [2], "integer"),
    ("num_active_layers", True, "integer"),
    ("probe_steps", 0, 'greater than or equal to 1; to train without probing use "sampler": "uniform"'),
    ("probe_steps", 2.5, "integer"),
    ("sample_period", 0, "greater than or equal to 1"),
    ("refresh_period", 0, "greater than or equal to 1"),
    ("reprobe_period", -1, "greater than or equal to 0"),
    ("reprobe_period", True, "integer"),
    ("temperature", 0, "greater than 0"),
    ("temperature", -1.0, "greater than 0"),
    ("temperature", math.inf, "finite"),
    ("temperature", math.nan, ""),
    ("temperature", "hot", "number"),
    ("ema_alpha", 0, 'greater than 0; to keep the probed scores use "sampler": "static"'),
    ("ema_alpha", 1.5, "less than or equal to 1"),
    ("ema_alpha", math.nan, ""),
    ("score_normalization", "max", "'mean' or 'none'"),
    ("always_active", "norm", "Input should be a valid"),
    ("always_active", ["norm", "lm_head"], "'embed', 'norm', 'head' or 'other'"),
    ("layers_path", 3, "string"),
    ("cyclic_order", "up", "'random', 'ascending' or 'descending'"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than"),
    ("seed", 1.5, "integer"),
    ("state_on_switch", "drop", "'keep' or 'reset'"),
    ("offload", "cpu", "dictionary"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), MISTAKES, ids=lambda value: str(value)[:20])
def test_a_bad_value_names_key_value_and_range(key: str, value: Any, allowed: str) -> None:
    message = error_of({key: value})
    assert key in message
    assert (repr(value[-1]) if isinstance(value, list) else repr(value)) in message
    assert allowed in message


def test_a_bad_nested_value_is_named_by_its_path() -> None:
    message = error_of({"offload": {"device": "disk"}})
    assert "grass.offload.device: got 'disk'" in message
    assert "'none', 'cpu' or 'nvme'" in message


OFFLOAD_MISTAKES = [
    ("residency", "epoch", "'stream' or 'period'"),
    ("nvme_path", 3, "string"),
    ("chunk_numel", 0, "greater than or equal to 1"),
    ("chunk_numel", True, "integer"),
    ("host_buffers", 0, "greater than or equal to 1"),
    ("device_buffers", 0, "greater than or equal to 1"),
    ("prefetch", "forward", "'backward' or 'step'"),
    ("checksum", "maybe", "boolean"),
    ("io", "uring", "'auto', 'aio' or 'posix'"),
    ("trace", 3, "string"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), OFFLOAD_MISTAKES, ids=lambda value: str(value)[:20])
def test_a_bad_value_in_offload_names_path_value_and_range(key: str, value: Any, allowed: str) -> None:
    message = error_of({"offload": {key: value}})
    assert f"grass.offload.{key}: got {value!r}" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("offload", "wanted"),
    [
        ({"device": "nvme"}, 'device "nvme" needs nvme_path: name an existing folder'),
        ({"device": "nvme", "nvme_path": ""}, 'device "nvme" needs nvme_path: name an existing folder'),
        ({"host_buffers": 3}, "host_buffers = 3 is too few for device_buffers = 2: at least 4"),
        ({"host_buffers": 5, "device_buffers": 4}, "host_buffers = 5 is too few for device_buffers = 4: at least 6"),
    ],
)
def test_values_in_offload_that_do_not_go_together(offload: dict[str, Any], wanted: str) -> None:
    message = error_of({"offload": offload})
    assert "grass.offload" in message
    assert wanted in message


def test_buffers_that_suffice_are_accepted() -> None:
    block = {"device": "nvme", "nvme_path": "/nvme", "host_buffers": 6, "device_buffers": 4}
    config = parse_grass_block({"grass": {"offload": block}})
    assert config is not None
    assert (config.offload.host_buffers, config.offload.device_buffers) == (6, 4)


def test_all_mistakes_are_listed_at_once() -> None:
    message = error_of({"sampler": "x", "seed": -1, "offload": {"pin_memory": 7}, "gamma": 2})
    assert all(path in message for path in ("grass.sampler", "grass.seed", "grass.offload.pin_memory", "grass.gamma"))


@pytest.mark.parametrize(
    ("block", "path", "hint"),
    [
        ({"sample_perid": 5}, "grass.sample_perid: unknown key", "Did you mean 'sample_period'?"),
        ({"num_active_layer": 5}, "grass.num_active_layer: unknown key", "Did you mean 'num_active_layers'?"),
        ({"xyz": 5}, "grass.xyz: unknown key", "Known keys: enabled, sampler, num_active_layers"),
        ({"offload": {"pin_memry": True}}, "grass.offload.pin_memry: unknown key", "Did you mean 'pin_memory'?"),
        (
            {"offload": {"xyz": 1}},
            "grass.offload.xyz: unknown key",
            "Known keys: device, residency, nvme_path, pin_memory",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(block: dict[str, Any], path: str, hint: str) -> None:
    message = error_of(block)
    assert path in message
    assert hint in message


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ({"seed": "auto"}, "grass.seed"),
        ({"offload": {"device": "auto"}}, "grass.offload.device"),
        ({"always_active": ["auto"]}, "grass.always_active.0"),
    ],
)
def test_auto_is_refused_with_the_remedy(block: dict[str, Any], path: str) -> None:
    message = error_of(block)
    assert path in message
    assert "auto" in message
    if not isinstance(next(iter(block.values())), list):
        assert "leave the key out or write null" in message


def test_auto_is_a_choice_of_io() -> None:
    assert parse_grass_block({"grass": {"offload": {"io": "auto"}}}) == GrassConfig()


def test_block_auto_is_refused() -> None:
    assert "auto" in error_of("auto")


@pytest.mark.parametrize("block", [[], "grass", 3, True])
def test_the_block_must_be_an_object(block: Any) -> None:
    message = error_of(block)
    assert '"grass" must be an object' in message
    assert repr(block) in message


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "optimizer"])
def test_a_block_in_the_wrong_place_is_not_ignored(section: str) -> None:
    with pytest.raises(GrassConfigError, match=rf'"{section}\.grass".*top level'):
        parse_grass_block({section: {"stage": 2, "grass": {}}})


def test_numeric_strings_are_coerced() -> None:
    strings = {"num_active_layers": "3", "temperature": "0.25", "ema_alpha": "1", "seed": "7", "probe_steps": "4"}
    config = parse_grass_block({"grass": strings})
    assert config is not None
    found = {name: getattr(config, name) for name in strings}
    assert found == {"num_active_layers": 3, "temperature": 0.25, "ema_alpha": 1.0, "seed": 7, "probe_steps": 4}
    assert all(isinstance(found[name], float if name in ("temperature", "ema_alpha") else int) for name in found)


@pytest.mark.parametrize("name", list(GrassConfig.model_fields))
def test_null_is_the_default(name: str) -> None:
    assert GrassConfig(**{name: None}) == GrassConfig()


@pytest.mark.parametrize("name", list(OffloadConfig.model_fields))
def test_null_is_the_default_in_offload(name: str) -> None:
    assert parse_grass_block({"grass": {"offload": {name: None}}}) == GrassConfig()


@pytest.mark.parametrize(
    "config", [{}, {"grass": None}, {"grass": {"enabled": False}}, {"grass": {"enabled": False, "seed": 3}}]
)
def test_no_block_or_a_disabled_one_is_none(config: dict[str, Any]) -> None:
    assert parse_grass_block(config) is None


def test_a_disabled_block_is_checked_all_the_same() -> None:
    assert "grass.seed" in error_of({"enabled": False, "seed": -1})


def test_an_empty_block_is_the_default() -> None:
    assert parse_grass_block({"grass": {}}) == GrassConfig()


@pytest.mark.parametrize("sampler", ["grass", "static", "uniform", "cyclic", "full"])
def test_every_accepted_config_builds_a_controller(sampler: str) -> None:
    config = GrassConfig(sampler=sampler)
    controller = Controller(4, **config.controller_arguments())
    assert (controller.phase.value == "probe") == (sampler in ("grass", "static"))


# ---- documentation --------------------------------------------------------------------------------------------------

SYMBOLS = {
    "num_active_layers": "gamma",
    "probe_steps": "T_p",
    "sample_period": "T_s",
    "refresh_period": "T_u",
    "temperature": "tau",
    "ema_alpha": "alpha",
}


def documented_fields() -> dict[str, str]:
    """``Class.field`` -> the string literal below it."""
    found = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                literal = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                found[f"{node.name}.{field.target.id}"] = str(below.value.value) if literal else ""  # type: ignore[union-attr]
    return found


def test_every_field_is_explained() -> None:
    found = documented_fields()
    fields = {f"{cls.__name__}.{name}" for cls in (GrassConfig, OffloadConfig) for name in cls.model_fields}
    assert fields <= found.keys()
    assert [name for name in sorted(fields) if len(found[name].split()) < 2] == []


@pytest.mark.parametrize(("name", "symbol"), SYMBOLS.items())
def test_the_papers_symbol_is_named(name: str, symbol: str) -> None:
    assert f"(paper: {symbol}" in documented_fields()[f"GrassConfig.{name}"]


@pytest.mark.parametrize(
    "name",
    [
        "probe_steps",
        "sample_period",
        "refresh_period",
        "reprobe_period",
        "temperature",
        "ema_alpha",
        "score_normalization",
    ],
)
def test_our_own_defaults_are_called_ours(name: str) -> None:
    assert "[ours]" in documented_fields()[f"GrassConfig.{name}"]
