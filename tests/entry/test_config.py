# SPDX-License-Identifier: Apache-2.0
"""The ``"grass"`` block: what it accepts, what it says about mistakes, and that every field is explained."""

import math
from typing import Any

import pytest

from grass_ds.config import GrassConfig, GrassConfigError, OffloadConfig, parse_grass_block
from grass_ds.sampling.controller import Controller


def error_of(block: Any) -> str:
    with pytest.raises(GrassConfigError) as caught:
        parse_grass_block({"grass": block})
    return str(caught.value)


# key, bad value, what the message must say besides both: the range or the choices
MISTAKES = [
    ("enabled", 2, "boolean"),
    (
        "sampler",
        "gras",
        'did you mean "grass"? use grass, static, outlier, uniform, cyclic, module, ist, full, or the path of a class',
    ),
    ("sampler", 3, "string"),
    ("sampler_args", [1], "dictionary"),
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
    ("outlier_threshold", 0, "greater than 0"),
    ("outlier_threshold", -13.0, "greater than 0"),
    ("outlier_threshold", math.inf, "finite"),
    ("outlier_threshold", math.nan, ""),
    ("outlier_threshold", "high", "number"),
    ("outlier_threshold", True, "number"),
    ("always_active", "norm", "Input should be a valid"),
    ("always_active", ["norm", "lm_head"], "'embed', 'norm', 'head' or 'other'"),
    ("layers_path", 3, "string"),
    ("cyclic_order", "up", "'random', 'ascending' or 'descending'"),
    ("cyclic_order", [0, "up"], "integer"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than"),
    ("seed", 1.5, "integer"),
    ("state_on_switch", "drop", "'keep' or 'reset'"),
    ("expansion", -0.1, "greater than or equal to 0"),
    ("expansion", 1.5, "less than or equal to 1"),
    ("expansion", math.nan, "finite"),
    ("expansion_depth", -1, "greater than or equal to 0"),
    ("expansion_depth", 1.5, "integer"),
    ("offload", "cpu", "dictionary"),
    ("offload.device", "disk", "'none', 'cpu' or 'nvme'"),
    ("offload.residency", "epoch", "'stream' or 'period'"),
    ("offload.nvme_path", 3, "string"),
    ("offload.chunk_numel", 0, "greater than or equal to 1"),
    ("offload.chunk_numel", True, "integer"),
    ("offload.host_buffers", 0, "greater than or equal to 1"),
    ("offload.device_buffers", 0, "greater than or equal to 1"),
    ("offload.prefetch", "forward", "'backward' or 'step'"),
    ("offload.checksum", "maybe", "boolean"),
    ("offload.io", "uring", "'auto', 'aio' or 'posix'"),
    ("offload.trace", 3, "string"),
]


@pytest.mark.parametrize(("path", "value", "allowed"), MISTAKES, ids=lambda value: str(value)[:20])
def test_a_bad_value_names_path_value_and_range(path: str, value: Any, allowed: str) -> None:
    section, _, key = path.rpartition(".")
    message = error_of({section: {key: value}} if section else {key: value})
    assert f"grass.{path}" in message
    assert (repr(value[-1]) if isinstance(value, list) else f": got {value!r}") in message
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


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ({"expansion_depth": 0}, "expansion_depth = 0 has no effect without expansion: set expansion above 0"),
        ({"expansion": 0.1, "sampler": "full"}, 'expansion = 0.1 has no effect with sampler "full"'),
    ],
)
def test_expansion_without_an_effect_is_refused(block: dict[str, Any], wanted: str) -> None:
    assert wanted in error_of(block)
    assert GrassConfig(expansion=0.1, expansion_depth=0).expansion_depth == 0


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
        ({"sample_perid": 5}, "grass.sample_perid", "Did you mean 'sample_period'?"),
        ({"xyz": 5}, "grass.xyz", "Known keys: enabled, sampler, num_active_layers"),
        ({"offload": {"pin_memry": True}}, "grass.offload.pin_memry", "Did you mean 'pin_memory'?"),
        ({"offload": {"xyz": 1}}, "grass.offload.xyz", "Known keys: device, residency, state_format, nvme_path"),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(block: dict[str, Any], path: str, hint: str) -> None:
    message = error_of(block)
    assert f"{path}: unknown key" in message
    assert hint in message


def test_auto_is_refused_with_the_remedy_but_for_io() -> None:
    for block, path in (({"seed": "auto"}, "grass.seed"), ({"offload": {"device": "auto"}}, "grass.offload.device")):
        message = error_of(block)
        assert path in message and "leave the key out or write null" in message
    assert "grass.always_active.0: got 'auto'" in error_of({"always_active": ["auto"]})
    assert "auto" in error_of("auto")
    assert parse_grass_block({"grass": {"offload": {"io": "auto"}}}) == GrassConfig()


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


def test_null_is_the_default_as_is_an_empty_block() -> None:
    blocks: list[dict[str, Any]] = [{}, *({name: None} for name in GrassConfig.model_fields)]
    blocks += [{"offload": {name: None}} for name in OffloadConfig.model_fields]
    for block in blocks:
        assert parse_grass_block({"grass": block}) == GrassConfig(), block


def test_no_block_or_a_disabled_one_is_none() -> None:
    for block in (None, {"enabled": False}, {"enabled": False, "seed": 3}):
        assert parse_grass_block({"grass": block}) is parse_grass_block({}) is None


def test_a_disabled_block_is_checked_all_the_same() -> None:
    assert "grass.seed" in error_of({"enabled": False, "seed": -1})


@pytest.mark.parametrize("sampler", ["grass", "static", "outlier", "uniform", "cyclic", "full"])
def test_every_accepted_config_builds_a_controller(sampler: str) -> None:
    config = GrassConfig(sampler=sampler)
    controller = Controller(12, **config.controller_arguments())
    assert (controller.phase.value == "probe") == (sampler in ("grass", "static", "outlier"))


def test_the_key_reaches_the_draw() -> None:
    for gamma, parts in ((4, [0, 1, 2, 3]), (8, [*range(8)])):
        config = GrassConfig(sampler="uniform", num_active_layers=gamma, stratified=True)
        controller = Controller(8, **config.controller_arguments())
        assert [layer * gamma // 8 for layer in controller.active_layers] == parts
