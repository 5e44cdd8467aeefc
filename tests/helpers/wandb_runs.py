# SPDX-License-Identifier: Apache-2.0
"""Reading back what the wandb client wrote offline."""

import json
import struct
from pathlib import Path
from typing import Any


def read_history(file: Path) -> list[dict[str, Any]]:
    """The rows logged to an offline run: protobuf records in LevelDB's log format (wandb ships no reader)."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, struct.Struct("<IHB")
    data, position, payload, rows = file.read_bytes(), 7, b"", []
    while position + header.size <= len(data):
        if block - position % block < header.size:
            position += block - position % block
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        payload += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole record, or its last part
            record = Record.FromString(payload)
            payload = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
