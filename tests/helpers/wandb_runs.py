# SPDX-License-Identifier: Apache-2.0
"""Reading back what the wandb client wrote offline."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run. ``wandb.finish()`` may return a moment before its process has written the end."""
    deadline = time.monotonic() + 20
    while True:
        kinds = list(records(file))
        if any(kind == "exit" for kind, _ in kinds) or time.monotonic() > deadline:
            return [row for kind, row in kinds if kind == "history"]
        time.sleep(0.05)


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and row of the protobuf records in a file of LevelDB's log format (wandb ships no reader)."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, struct.Struct("<IHB")
    data, position, payload = file.read_bytes(), 7, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:
            position += block - position % block
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        if position + length > len(data):
            return  # still being written
        payload += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole record, or its last part
            record = Record.FromString(payload)
            payload = b""
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            yield record.WhichOneof("record_type"), row
