"""Starts a real Slurm on this machine, with two nodes, and removes all of it afterwards.

python tests/slurm_cluster.py 600      starts one for so many seconds, and prints how to use it

It has a munged, a slurmctld and two slurmds of its own, on free ports.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "srun")
FREEZER = Path("/sys/fs/cgroup/freezer")
PATIENCE = 240  # seconds
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/m/munge.socket,cred_expire=5
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd-%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={d}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
FirstJobId={first_job}
ReturnToService=2
KillWait=5
SlurmdTimeout=10
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=200000 Gres=gpu:1 State=UNKNOWN
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=200000 Gres=gpu:1 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""  # noqa: E501


def what_is_missing() -> str | None:
    """Says why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if not _program(name)]
    if not missing:
        return None
    install = "apt-get install slurmctld slurmd slurm-client munge"
    return f"no {', '.join(missing)} (Debian, Ubuntu: {install})"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


@dataclass(frozen=True)
class Cluster:
    folder: Path
    nodes: tuple[str, str]
    proctrack: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment to submit from, without anything of a Slurm that the tests themselves run under."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "ACCELERATE_USE_CPU": "true"}

    def run(self, *command: object, cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            list(map(str, command)), env={**self.environment, **environment}, cwd=cwd, capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: object, cwd: Path, **environment: str) -> str:
        """Submits a job and returns its number."""
        # A job that names no memory would take the whole node's.
        flags = ("--parsable", "--gpus-per-node=0", "--mem=1G", "--cpus-per-task=2")
        return self.run("sbatch", *flags, *arguments, cwd=cwd, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of the job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, number: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Waits until `condition` is true of what `job` returns, and returns that."""
        end = time.monotonic() + PATIENCE
        while not condition(job := self.job(number)):
            assert time.monotonic() < end, job
            time.sleep(0.1)
        return job

    def revive(self, node: str) -> None:
        """Makes a node that was set down usable again, if it is not already: its slurmd may have answered."""
        command = ["scontrol", "update", f"nodename={node}", "state=resume"]
        subprocess.run(command, env=self.environment, capture_output=True)
        _wait(lambda: _states(self) <= {"idle", "mixed", "allocated"}, self.folder)

    def ended(self, number: str) -> dict[str, str]:
        """Waits until the job has ended."""
        return self.until(number, lambda job: job["JobState"] in FINAL)


@contextlib.contextmanager
def cluster(first_job: int = 1) -> Iterator[Cluster]:
    """A running cluster whose first job has this number."""
    folder, mark = Path(tempfile.mkdtemp(prefix="sl")), secrets.token_hex(2)
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    for name in ("m", "state", "spool", "log"):
        (folder / name).mkdir(mode=0o755)
    nodes = (f"a{mark}", f"b{mark}")
    proctrack = "proctrack/cgroup" if os.geteuid() == 0 and FREEZER.is_dir() else "proctrack/linuxproc"

    text = CONF.format(
        d=folder, user=getpass.getuser(), ports=free_ports(3), nodes=nodes, proctrack=proctrack, first_job=first_job
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text("Name=gpu Count=1 File=/dev/null\n")
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    made = Cluster(folder, nodes, proctrack)
    daemons: list[subprocess.Popen] = []
    try:
        m = folder / "m"
        files = {"socket": "munge.socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        munge = [f"--{flag}={m / name}" for flag, name in files.items()]
        daemons.append(_start(made, "munged", "--foreground", "--force", f"--key-file={folder / 'key'}", *munge))
        _wait(lambda: (m / "munge.socket").exists(), folder)
        daemons.append(_start(made, "slurmctld", "-D"))
        daemons += [_start(made, "slurmd", "-D", "-N", node) for node in nodes]
        _wait(lambda: _states(made) == {"idle"}, folder)
        yield made
    finally:
        _stop(made, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _start(made: Cluster, program: str, *arguments: str) -> subprocess.Popen:
    with open(made.folder / "log" / f"{program}.out", "ab") as log:
        command = [_program(program), *arguments]
        return subprocess.Popen(command, env=made.environment, stdout=log, stderr=log, start_new_session=True)


def _states(made: Cluster) -> set[str]:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=made.environment, capture_output=True, text=True)
    return set(done.stdout.split()) if done.returncode == 0 else set()


def _wait(condition, folder: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        logs = "\n".join(path.read_text()[-1500:] for path in (folder / "log").iterdir())
        assert time.monotonic() < end, logs
        time.sleep(0.05)


def _stop(made: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Ends the jobs, then the daemons with munged last, then whatever process is left that uses this cluster."""

    def quietly(*command):
        with contextlib.suppress(subprocess.SubprocessError):
            return subprocess.run(command, env=made.environment, capture_output=True, text=True, timeout=20).stdout

    quietly("scancel", "--signal=KILL", "--full", f"--user={os.geteuid()}")
    quietly("scancel", f"--user={os.geteuid()}")
    end = time.monotonic() + 15
    while quietly("squeue", "-h") and time.monotonic() < end:
        time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(5)
    mine = f"SLURM_CONF={made.folder / 'slurm.conf'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mine in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    for node in made.nodes:
        root = FREEZER / f"slurm_{node}"
        for path in sorted(root.rglob("*/"), reverse=True) if root.is_dir() else []:
            with contextlib.suppress(OSError):
                path.rmdir()
        with contextlib.suppress(OSError):
            root.rmdir()


if __name__ == "__main__":
    with cluster(int(sys.argv[2]) if len(sys.argv) > 2 else 1) as running:
        print(f"export SLURM_CONF={running.folder / 'slurm.conf'}   # {running.proctrack}", flush=True)
        time.sleep(float(sys.argv[1]))
