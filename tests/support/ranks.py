"""A pool of gloo processes that cannot hang a test."""

import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """`size` processes; `pool(function, *arguments)` runs a module-level function on all and returns every result.

    The pool ends with the cause if a rank fails, or if ranks wait for each other longer than `timeout` seconds. The
    next call starts it again.
    """

    def __init__(self, size: int, timeout: float = 120.0):
        self.size, self.timeout = size, timeout
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        context = mp.get_context("spawn")
        self.folder = TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, f"file://{self.folder.name}/store", there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)
        self._receive(timeout=300)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self.processes:
            self.start()
        task = pickle.dumps((function, arguments))  # plain pickle copies tensors, while torch's would share descriptors
        for connection in self.connections:
            connection.send_bytes(task)
        return self._receive(self.timeout)

    def _receive(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size:
            for rank, connection in enumerate(self.connections):
                if rank not in results and connection.poll(0.002):
                    results[rank], error = pickle.loads(connection.recv_bytes())
                    if error:
                        self.close()
                        raise AssertionError(f"rank {rank} of {self.size}:\n{error}")
            if time.monotonic() > deadline:
                self.close()
                missing = set(range(self.size)) - results.keys()
                raise TimeoutError(f"ranks {missing} of {self.size} still wait after {timeout} s: a deadlock?")
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.connections = [], []


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    connection.send_bytes(pickle.dumps(("ready", "")))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(task)
            answer = pickle.dumps((function(*arguments), ""))
        except Exception:
            answer = pickle.dumps((None, traceback.format_exc()))
        connection.send_bytes(answer)
