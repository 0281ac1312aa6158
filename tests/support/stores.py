"""A store of objects on this machine, moto's S3, in a process of its own that ends with the test."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VARIABLES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_WAIT = 60.0


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Start the store on a free port, and yield the environment variables that lead a client to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield {**VARIABLES, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        process.kill()
        process.wait()


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start the store for this process and its children, and yield the name of a new bucket."""
    with server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield make_bucket()


def make_bucket() -> str:
    """Make a bucket in the store of the environment and return its name."""
    import s3fs

    bucket = f"bucket-{secrets.token_hex(4)}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return bucket


def fill(bucket: str, folder: Path) -> None:
    """Copy the files of a folder into a bucket."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.put_file(str(file), f"{bucket}/{os.path.relpath(file, folder)}")
