"""Read the files that wait for an upload to W&B's server."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


@dataclass
class Sent:
    """The content of a .wandb file, as W&B's server would receive it."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    definitions: list[Any] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    """The last artifact of each type."""
    every_artifact: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    stats: set[str] = field(default_factory=set)
    """Names of the machine's numbers."""
    preempting: bool = False
    exit_code: int | None = None


def records(file: Path) -> Iterator[Any]:
    """Yield the protobufs of a file in LevelDB's log format.

    The file consists of blocks of 32 KiB. They hold pieces of records, each with CRC, length and kind.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # the file is still being written
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record or its last piece
            yield Record.FromString(record)
            record = b""


def collect(items: Any, into: dict[str, Any]) -> dict[str, Any]:
    """Add W&B's items to nested dicts. The key of an item is a name or a path."""
    for item in items:
        *path, name = list(item.nested_key) or [item.key]
        node = into
        for part in path:
            node = node.setdefault(part, {})
        node[name] = json.loads(item.value_json)
    return into


def read(file: Path) -> Sent:
    """Return the content of a .wandb file."""
    one = Sent(file.parent)
    for record in records(file):
        match record.WhichOneof("record_type"):
            case "run":
                one.run = record.run
                collect(record.run.config.update, one.config)
            case "history":
                one.history.append(collect(record.history.item, {}))
            case "summary":
                collect(record.summary.update, one.summary)
            case "metric":
                one.definitions.append(record.metric)
            case "artifact":
                one.artifacts[record.artifact.type] = record.artifact
                one.every_artifact.append(record.artifact)
            case "stats":
                one.stats |= {item.key for item in record.stats.item}
            case "files":
                one.files += [file.path for file in record.files.files]
            case "preempting":
                one.preempting = True
            case "exit":
                one.exit_code = record.exit.exit_code
    return one


def sent(folder: Path) -> list[Sent]:
    """Return the uploads that wait in a run's folder, oldest first. W&B writes the end a little after it reports it."""
    deadline = time.monotonic() + 60
    while True:
        files = sorted((folder / "wandb").glob("*run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
        found = [read(file) for file in files]
        if found[-1].exit_code is not None or time.monotonic() > deadline:
            return found
        time.sleep(0.05)
