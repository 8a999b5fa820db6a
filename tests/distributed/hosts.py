"""Several hosts on one machine: python tests/distributed/hosts.py --json FILE     (Linux, root: network namespaces)

    host0 (10.77.0.1) --- host1 (10.77.0.2) --- host2        namespaces with their own interface, name, /etc/hosts

Two and three hosts with one and two ranks each, started by `deepspeed` with a hostfile, by torchrun and with the
variables of srun, train the same run as one process does: 12 clips per step, however they are shared. Then a link is
cut, and a host vanishes: without a last packet, as machines do. The others must say which rank and host is gone, and
end, within the limit. What namespaces share with real hosts is the network; disk, clock and program are one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from data.feature_folders import write_features
from safetensors.torch import load_file

from re2tal.structures import Action

ROOT = Path(__file__).resolve().parents[2]
CLIPS_PER_STEP = 12
LAUNCHERS = ("deepspeed", "torchrun", "srun")
LIMIT_SECONDS = 20.0
"""How long a rank waits for another in the runs that lose one."""
HUNG = 77


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def why_not() -> str:
    """Why this machine has no namespaces for us; "" where it has."""
    try:
        ip("netns", "add", "re2tal-probe")
        ip("netns", "del", "re2tal-probe")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"
    return ""


class Hosts:
    """Hosts that exist inside `connected_hosts`."""

    def __init__(self, number: int) -> None:
        self.names = [f"host{index}" for index in range(number)]
        self.namespaces = [f"re2tal-{name}" for name in self.names]
        self.processes: list[tuple[int, subprocess.Popen]] = []

    def start(self, host: int, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen:
        """`command` on a host; its output goes to `log`."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[host]]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
        clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespaces[host], *named, *command],
                env={**clean, "PYTHONPATH": str(ROOT), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
        self.processes.append((host, process))
        return process

    def cut(self, host: int) -> None:
        """Nothing reaches this host any more, and nothing leaves it."""
        ip("-n", "re2tal-switch", "link", "set", f"port{host}", "down")

    def vanish(self, host: int) -> None:
        """The host is gone, and nobody was told."""
        self.cut(host)
        pids = subprocess.run(
            ["ip", "netns", "pids", self.namespaces[host]], capture_output=True, text=True, check=True
        )
        for pid in pids.stdout.split():
            os.kill(int(pid), 9)

    def end(self) -> None:
        for host, process in self.processes:
            pids = subprocess.run(["ip", "netns", "pids", self.namespaces[host]], capture_output=True, text=True)
            for pid in pids.stdout.split():
                os.kill(int(pid), 9)
            process.wait()


@contextmanager
def connected_hosts(number: int) -> Iterator[Hosts]:
    """A switch, and `number` hosts that know each other by name."""
    hosts = Hosts(number)
    table = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} {name}\n" for n, name in enumerate(hosts.names))
    try:
        ip("netns", "add", "re2tal-switch")
        ip("-n", "re2tal-switch", "link", "add", "switch", "type", "bridge")
        ip("-n", "re2tal-switch", "link", "set", "switch", "up")
        for index, namespace in enumerate(hosts.namespaces):
            ip("netns", "add", namespace)
            folder = Path("/etc/netns") / namespace  # `ip netns exec` shows its files in place of those of /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(table)
            ip("-n", namespace, "link", "set", "lo", "up")
            peer = ("peer", "name", f"port{index}", "netns", "re2tal-switch")
            ip("-n", namespace, "link", "add", "net0", "type", "veth", *peer)
            ip("-n", "re2tal-switch", "link", "set", f"port{index}", "master", "switch", "up")
            ip("-n", namespace, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "net0")
            ip("-n", namespace, "link", "set", "net0", "up")
        yield hosts
    finally:
        hosts.end()
        for namespace in ("re2tal-switch", *hosts.namespaces):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- a run


def features(folder: Path) -> Path:
    """Twelve videos to train on and two to judge by."""
    for subset, number in (("training", CLIPS_PER_STEP), ("validation", 2)):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(number)}
        write_features(folder / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    return folder


def options(data: Path, out: Path, *, ranks: int, epochs: int, limit_seconds: float = 120.0) -> list[str]:
    """Of `re2tal train`. Nothing of a step is drawn per rank."""
    words = {
        "--ds": "zero2",
        "--data.shards": str(data),
        "--data.clips.workers": "0",
        "--localizer.channels": "16",
        "--localizer.path-drop": "0",
        "--engine.batch-size": "1",
        "--engine.gradient-accumulation": str(CLIPS_PER_STEP // ranks),
        "--engine.timeout-minutes": str(limit_seconds / 60),
        "--schedule.warmup-epochs": "0.5",
        "--training.epochs": str(epochs),
        "--training.log-every-steps": "1",
        "--out": str(out),
    }
    return [word for pair in words.items() for word in pair]


def launch(hosts: Hosts, launcher: str, each: int, given: Sequence[str], folder: Path) -> list[subprocess.Popen]:
    """A run on all hosts, `each` ranks on each of them. One process per host, or per rank with srun's variables."""
    number = len(hosts.names)
    script = [str(ROOT / "launch" / "train.py"), *given]
    binaries = Path(sys.executable).parent
    started = []
    (folder / "hostfile").write_text("".join(f"{name} slots={each}\n" for name in hosts.names))
    for host in range(number):
        if launcher == "srun":
            for local in range(each):
                rank = host * each + local
                variables = {
                    "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": str(local),
                    "SLURM_NTASKS": str(number * each),
                    "SLURM_JOB_NODELIST": f"host[0-{number - 1}]",
                    "SLURM_STEP_ID": "0",
                    "SLURM_JOB_ID": "4711",
                }
                log = folder / f"host{host}.{local}.log"
                started.append(hosts.start(host, [sys.executable, *script], log, variables))
            continue
        if launcher == "torchrun":
            words = ["--nnodes", str(number), "--node-rank", str(host), "--nproc-per-node", str(each)]
            command = [str(binaries / "torchrun"), *words, "--master-addr", "host0", "--master-port", "29511", *script]
        else:
            words = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--node_rank", str(host)]
            words += ["--master_addr", "host0", "--master_port", "29511"]
            command = [str(binaries / "deepspeed"), *words, *script]
        started.append(hosts.start(host, command, folder / f"host{host}.0.log", {"PATH": path_with(binaries)}))
    return started


def path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def said(folder: Path) -> str:
    """The last lines of all logs."""
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))


def wait_for(condition: Callable[[], bool], *, seconds: float, folder: Path) -> float:
    """How long it took; AssertionError with the logs if it took longer."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, said(folder)
        time.sleep(0.1)
    return time.monotonic() - began


def by_one_process(data: Path, *, epochs: int) -> dict[str, torch.Tensor]:
    """The weights that all of the runs on `data` must end with, trained once."""
    folder = data.with_name("alone")
    if not (folder / "model.safetensors").exists():
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *options(data, folder, ranks=1, epochs=epochs)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with folder.with_suffix(".log").open("w") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True, cwd=ROOT)
    return load_file(folder / "model.safetensors")


def train_on(number: int, each: int, launcher: str, *, data: Path, folder: Path, epochs: int = 4) -> dict[str, Any]:
    """A run on hosts to its end: seconds, and the largest difference of a weight from that of one process."""
    expected = by_one_process(data, epochs=epochs)
    with connected_hosts(number) as hosts:
        given = options(data, folder / "run", ranks=number * each, epochs=epochs)
        processes = launch(hosts, launcher, each, given, folder)
        seconds = wait_for(lambda: None not in [one.poll() for one in processes], seconds=280, folder=folder)
        ended = [process.returncode for process in processes]
        assert set(ended) == {0}, f"{ended}\n{said(folder)}"
    found = load_file(folder / "run" / "model.safetensors")
    assert found.keys() == expected.keys()
    difference = max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())
    return {"seconds": round(seconds, 1), "difference": difference, "held": difference <= 1e-5}


def lose_one(number: int, each: int, fault: str, *, data: Path, folder: Path) -> dict[str, Any]:
    """The last host is lost in training; what the others say and after how long."""
    with connected_hosts(number) as hosts:
        given = options(data, folder / "run", ranks=number * each, epochs=100_000, limit_seconds=LIMIT_SECONDS)
        processes = launch(hosts, "srun", each, given, folder)
        log, lost = folder / "run" / "metrics.jsonl", number - 1
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, seconds=200, folder=folder)
        (hosts.cut if fault == "cut link" else hosts.vanish)(lost)
        others = processes[: lost * each]
        seconds = wait_for(lambda: None not in [one.poll() for one in others], seconds=150, folder=folder)
        statuses = [process.wait(timeout=60) for process in (processes if fault == "cut link" else others)]
    texts = [path.read_text() for path in sorted(folder.glob("host*.log"))]
    named = [f"(host host{lost}" in text and "Traceback" not in text for text in texts[: lost * each]]
    if fault == "cut link":  # its own ranks live, and see the others gone
        named += ["(host host0" in text for text in texts[lost * each :]]
    held = all(named) and set(statuses) == {HUNG} and seconds < 2 * LIMIT_SECONDS
    if not held:
        print(said(folder), file=sys.stderr)
    return {"seconds": round(seconds, 1), "statuses": statuses, "named": named, "held": held}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    given = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = features(Path(scratch) / "features")
        for number, each, what in product((2, 3), (1, 2), (*LAUNCHERS, "cut link", "vanished host")):
            folder = Path(scratch) / f"{number}-{each}-{what}"
            folder.mkdir()
            act = train_on if what in LAUNCHERS else lose_one
            rows.append(
                {"hosts": number, "ranks": each, "what": what, **act(number, each, what, data=data, folder=folder)}
            )
            print(rows[-1], flush=True)
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
