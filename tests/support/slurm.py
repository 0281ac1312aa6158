"""A SLURM cluster of two nodes on this machine. It needs root and the Debian packages slurm-wlm and munge."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import icl_msr
from icl_msr.cli.processes import clean_environment
from support.programs import LIMIT, until
from support.tiny import DATA, MODEL

NODES = ("n1", "n2")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

CHECKOUT = Path(icl_msr.__file__).parents[1]
RUN = f"RUN='{sys.executable} -m icl_msr.run'"

CPU = ["hardware.accelerator=cpu", "hardware.precision=32-true"]
SHORT = ["regularizer=none", "evaluation=none", "trainer.max_epochs=1", "logger=csv", "~callbacks.online"]
WORDS = " ".join([*DATA, *MODEL, *CPU, *SHORT, "method=simclr", "trainer.log_every_n_steps=1"])
"""The words of a run that takes seconds."""

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job begins when its credential has expired, after 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait=30
MinJobAge=3600
"""


class Cluster:
    """slurmctld and two slurmd in the foreground, which end with the object. Each node has its own processes."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until the nodes are idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        host, cpus = socket.gethostname().partition(".")[0], os.cpu_count()
        controller, *ports = _free_ports(1 + len(NODES))
        lines = [CONFIG.format(host=host, controller=controller, folder=self.folder)]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=2000"
            for node, port in zip(NODES, ports, strict=True)
        ]
        lines.append(f"PartitionName=low Nodes={','.join(NODES)} Default=YES PriorityTier=1")
        lines.append(f"PartitionName=high Nodes={','.join(NODES)} PriorityTier=9 PreemptMode=OFF")
        self.config.write_text("\n".join(lines) + "\n")
        # A node finds the other one by name, as on a real cluster.
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        files |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munge.seed"}
        self._start(
            "munged", "munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())
        )
        until((self.folder / "munge.socket").exists, 20)
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self.start_node(node)
        until(lambda: self.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == str(len(NODES)), 60)

    def start_node(self, node: str) -> None:
        """Start a node. All of its processes end when it is killed, as those of a machine do."""
        mount = f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -f {self.config} -N {node}"
        self._start(node, "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", mount)

    def kill_node(self, node: str) -> None:
        """Let a node die with all of its processes."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def stop(self) -> None:
        """Cancel the jobs and end the daemons."""
        if "slurmctld" in self.daemons:
            self.ask("scancel", "--user=root", "--signal=KILL", "--full")
            self.ask("scancel", "--user=root")
        for name, daemon in reversed(self.daemons.items()):
            daemon.send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)
            daemon.wait()
        self.daemons.clear()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )

    def environment(self) -> dict[str, str]:
        """Return the environment of a user of this cluster. The packages are found from any folder."""
        ours = {**clean_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = [str(CHECKOUT), str(CHECKOUT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {**ours, "SLURM_CONF": str(self.config), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

    def task(self, job: str, rank: int) -> int:
        """Return the process number of a task of a job's first step, which is the program itself."""
        wanted = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank)}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = dict(v.partition("=")[::2] for v in (entry / "environ").read_text().split("\0"))
                if wanted.items() <= variables.items():
                    found.append(int(entry.name))
        return min(found)

    def ask(self, *command: str) -> str:
        """Run a command of SLURM's and return what it prints."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        return done.stdout

    def command(self, script: str, folder: Path) -> tuple[str, str]:
        """Run a script of a user who sits at a terminal, with `$RUN` for the program; return stdout and stderr."""
        done = subprocess.run(
            ["bash", "-c", f"{RUN}; {script}"],
            env=self.environment(),
            cwd=folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def submit(self, script: str, folder: Path, *options: str, **environment: str) -> "Batch":
        """Submit a batch script that runs in `folder`, with `$RUN` for the program. Its output goes to files there."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{RUN}\n{script}\n")
        said = ["--output=job-%a.out", "--error=job-%a.err", "--open-mode=append", "--job-name=job"]
        done = subprocess.run(
            ["sbatch", "--parsable", *said, *options, str(file)],
            env={**self.environment(), **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Batch(self, done.stdout.strip(), folder)


class Batch:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, folder: Path):
        self.cluster, self.number, self.folder = cluster, number, folder

    def facts(self) -> list[Mapping[str, str]]:
        """Return what SLURM knows of the job, or of each task of an array."""
        lines = self.cluster.ask("scontrol", "show", "job", "-o", self.number).splitlines()
        return [dict(word.partition("=")[::2] for word in line.split()) for line in lines if line]

    @property
    def state(self) -> str:
        """The states of the job's tasks, joined if they differ."""
        return "+".join(sorted({fact["JobState"] for fact in self.facts()}))

    @property
    def restarts(self) -> int:
        return sum(int(fact.get("Restarts", 0)) for fact in self.facts())

    def wait(self, seconds: float = LIMIT) -> str:
        """Wait until no task waits or runs any more, and return the state."""
        until(lambda: set(self.state.split("+")) <= FINAL and not self._leaving(), seconds)
        return self.state

    def _leaving(self) -> bool:
        return bool(self.cluster.ask("squeue", "-h", "-j", self.number).strip())

    @property
    def out(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("job-*.out")))

    @property
    def err(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("job-*.err")))


def available() -> bool:
    """Return whether a cluster can be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "unshare"))


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
