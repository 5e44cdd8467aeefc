# SPDX-License-Identifier: Apache-2.0
"""Arguments of a plan, and the search for what fits."""

import argparse
from typing import Any

import pytest

from grass_ds.config import GrassConfig
from grass_ds.plan.request import Request, add_arguments, parse_gpus, parse_size, request_of
from grass_ds.plan.search import largest

GB = 10**9


def parsed(*words: str) -> Request:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return request_of(parser.parse_args(["--model", "llama-2-7b", "--gpus", "2x24GB", *words]))


def test_sizes() -> None:
    assert parse_size("--host", "1.5TB") == 1500 * GB
    assert parse_size("--host", "80 GiB") == 80 * 2**30
    assert parse_gpus("2x24GB") == (2, 24 * GB)
    assert parse_gpus("80gib") == (1, 80 * 2**30)


def test_the_number_of_layers_is_the_default_of_the_key() -> None:
    assert parsed().gamma == GrassConfig().num_active_layers


def test_every_argument_reaches_the_request() -> None:
    words = "--host 64GB --nvme 1TB --stage 3 --method lisa --gamma 4 --offload nvme --state_format 8bit --dtype fp32"
    rest = "--sequence 512 --micro_batch 2 --accumulation 3 --checkpointing --lora_rank 8 --reserve 2GB --link 10"
    found = parsed(
        *words.split(),
        *rest.split(),
        "--interconnect",
        "20",
        "--device_tflops",
        "50",
        "--attention",
        "eager",
        "--expansion",
        "0.2",
    )
    sizes = {"device_bytes": 24 * GB, "host_bytes": 64 * GB, "nvme_bytes": 1000 * GB, "reserve": 2 * GB}
    chosen = {"stage": 3, "method": "lisa", "gamma": 4, "offload": "nvme", "state_format": "8bit", "dtype": "fp32"}
    rows = {
        "expansion": 0.2,
        "attention": "eager",
        "sequence": 512,
        "micro_batch": 2,
        "accumulation": 3,
        "checkpointing": True,
        "lora_rank": 8,
    }
    speeds = {"link": 10.0, "interconnect": 20.0, "device_tflops": 50.0}
    assert found == Request("llama-2-7b", 2, **sizes, **chosen, **rows, **speeds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "two"], "--gpus two: expected a size above 0 with its unit, as in 24GB"),
        (["--gpus", "0x24GB"], "--gpus 0x24GB: expected a number above 0 and a size"),
        (["--host", "64"], "--host 64: expected a size"),
        (["--nvme", "0TB"], "--nvme 0TB: expected a size above 0"),
        (["--stage", "4"], "--stage 4: must be one of auto, 1, 2, 3"),
        (["--method", "adam"], "--method adam: must be one of grass, lisa, full, lora"),
        (["--attention", "flash_attention_2"], "--attention flash_attention_2: must be one of sdpa, eager"),
        (["--state_format", "4bit"], "--state_format 4bit: must be one of fp32, exact, bf16, 8bit"),
        (["--gamma", "0"], "--gamma 0: must be at least 1"),
        (["--expansion", "2"], "--expansion 2.0: must be a number from 0 to 1"),
        (["--expansion", "0.2", "--method", "lora"], "--expansion 0.2 with --method lora: no layer is inactive there"),
        (["--sequence", "0"], "--sequence 0: must be at least 1"),
        (["--micro_batch", "-1"], "--micro_batch -1: must be at least 1"),
        (["--link", "0"], "--link 0.0: must be a finite number above 0"),
        (["--device_tflops", "nan"], "--device_tflops nan: must be a finite number above 0"),
        (["--reserve", "24GB"], "is not more than --reserve 24.0 GB"),
        (["--offload", "nvme"], "--offload nvme needs the size of the disk: --nvme 1TB"),
        (["--method", "lora", "--offload", "cpu"], "--offload cpu with --method lora"),
    ],
)
def test_a_wrong_argument_is_named_with_its_range(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parsed(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize("answer", [0, 1, 2, 5, 7, 8, 31, 32])
def test_the_search_finds_the_largest(answer: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= answer

    assert largest(fits, 32) == answer
    assert len(asked) <= 2 + 2 * 5
    assert max(asked) <= 32


def test_the_search_ends_at_the_most() -> None:
    def always(_: Any) -> bool:
        return True

    assert [largest(always, most) for most in (1, 3, 32)] == [1, 3, 32]
