"""Hosts in network namespaces: a cut link, or a host that is gone, is named within the limit, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults.runs import BIN, TRAIN, alone, end, small, wait_for

from re2tal.runs.exit_status import HUNG

LIMIT_SECONDS = 8.0
PORT = 29_555  # nobody else is in these networks


class Hosts:
    """A switch and `number` hosts on it, 10.77.0.1 and so on, each a network of its own, with a name of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.holders: list[subprocess.Popen] = []
        self.ranks: list[list[subprocess.Popen]] = [[] for _ in range(number)]

    def build(self) -> None:
        self.holders.append(self._holder("unshare", "--net", "sleep", "1000"))
        self._on_switch("ip", "link", "add", "switch", "type", "bridge")
        self._on_switch("ip", "link", "set", "switch", "up")
        for host in range(self.number):
            holder = self._holder("unshare", "--net", "--uts", "sleep", "1000")
            self.holders.append(holder)
            port = f"port{host}"
            link = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)]
            self._on_switch(*link)
            self._on_switch("ip", "link", "set", port, "master", "switch", "up")
            self._run(self.on(host, "hostname", f"node{host}"))
            self._run(self.on(host, "ip", "link", "set", "lo", "up"))
            self._run(self.on(host, "ip", "address", "add", f"10.77.0.{host + 1}/24", "dev", "eth0"))
            self._run(self.on(host, "ip", "link", "set", "eth0", "up"))

    def cut(self, host: int) -> None:
        """Nothing reaches it any more; its processes live on."""
        self._on_switch("ip", "link", "set", f"port{host}", "down")

    def lose(self, host: int) -> None:
        """As if its power failed: nobody gets a last word from it."""
        self.cut(host)
        self.kill_all(host)

    def kill_all(self, host: int) -> None:
        """Whatever runs there, whoever started it."""
        network = os.readlink(f"/proc/{self.holders[host + 1].pid}/ns/net")
        assert network != os.readlink("/proc/self/ns/net")
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "net") == network and int(process.name) != self.holders[host + 1].pid:
                    os.kill(int(process.name), signal.SIGKILL)
        for rank in self.ranks[host]:
            rank.wait()

    def on(self, host: int, *command: str) -> list[str]:
        return ["nsenter", "--net", "--uts", "--target", str(self.holders[host + 1].pid), *command]

    def end(self) -> None:
        for host in range(len(self.holders) - 1):
            self.kill_all(host)
        end(self.holders)

    def _holder(self, *command: str) -> subprocess.Popen:
        holder = subprocess.Popen(command, start_new_session=True)
        mine = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 20
        while os.readlink(f"/proc/{holder.pid}/ns/net") == mine:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return holder

    def _on_switch(self, *command: str) -> None:
        self._run(["nsenter", "--net", "--target", str(self.holders[0].pid), *command])

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may make networks, and not in every container")
    made = Hosts(3)
    try:
        made.build()
        yield made
    finally:
        made.end()


def start(hosts: Hosts, launcher: str, shape: tuple[int, int], features: Path, out: Path, *options: str) -> None:
    """A run of `shape` = (hosts, ranks on each)."""
    num_hosts, ranks = shape
    options = ("--ds", "zero2", *options, "--training.checkpoint-every-steps", "4")
    script = [TRAIN[1], *small(features, out, *options, "--engine.timeout-minutes", str(LIMIT_SECONDS / 60))]
    shared = {**alone(), "GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{BIN}:{os.environ['PATH']}"}
    hostfile = out.with_suffix(".hosts")
    hostfile.write_text("".join(f"10.77.0.{host + 1} slots={ranks}\n" for host in range(num_hosts)))
    for host in range(num_hosts):
        match launcher:
            case "torchrun":
                where = ["--nnodes", str(num_hosts), "--node-rank", str(host), "--nproc-per-node", str(ranks)]
                meeting = ["--master-addr", "10.77.0.1", "--master-port", str(PORT)]
                commands = [([str(BIN / "torchrun"), *where, *meeting, *script], {})]
            case "deepspeed":
                where = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(host)]
                meeting = ["--master_addr", "10.77.0.1", "--master_port", str(PORT)]
                commands = [([str(BIN / "deepspeed"), *where, *meeting, *script], {})]
            case "srun":  # the variables that it sets, by which ranks find each other
                commands = [
                    (
                        [sys.executable, *script],
                        {
                            "SLURM_PROCID": str(host * ranks + place),
                            "SLURM_LOCALID": str(place),
                            "SLURM_NTASKS": str(num_hosts * ranks),
                            "SLURM_JOB_ID": "4711",
                            "SLURM_STEP_ID": "0",
                            "SLURM_STEP_NODELIST": f"node[0-{num_hosts - 1}]",
                            "MASTER_ADDR": "10.77.0.1",
                            "MASTER_PORT": str(PORT),
                        },
                    )
                    for place in range(ranks)
                ]
        for command, own in commands:
            with (out.parent / f"host{host}.log").open("a") as log:
                process = subprocess.Popen(
                    hosts.on(host, *command), env={**shared, **own}, stdout=log, stderr=log, start_new_session=True
                )
            hosts.ranks[host].append(process)


def logs(folder: Path) -> list[Path]:
    return [folder / f"host{host}.log" for host in range(3)]


CASES = [
    # launcher, (hosts, ranks on each), fault, host that is lost, ranks that name it
    ("srun", (2, 1), "cut", 1),
    ("srun", (2, 1), "lost", 0),
    ("srun", (3, 1), "lost", 2),
    ("torchrun", (2, 2), "cut", 1),
    ("torchrun", (3, 1), "lost", 1),
    ("deepspeed", (2, 1), "lost", 1),
    ("deepspeed", (2, 2), "cut", 1),
    ("deepspeed", (3, 1), "cut", 2),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("launcher", "shape", "fault", "victim"), CASES)
def test_a_host_that_is_lost_is_named_and_the_others_end(launcher, shape, fault, victim, hosts, features, tmp_path):
    out = tmp_path / "run"
    start(hosts, launcher, shape, features, out, "--training.epochs", "100000")
    wait_for(lambda: (out / "checkpoints" / "latest").exists(), 240, *logs(tmp_path))
    (hosts.cut if fault == "cut" else hosts.lose)(victim)
    others = [process for host, of_host in enumerate(hosts.ranks) if host != victim for process in of_host]
    wait_for(lambda: all(process.poll() is not None for process in others), 3 * LIMIT_SECONDS + 60, *logs(tmp_path))
    for host in range(shape[0]):
        said = (tmp_path / f"host{host}.log").read_text()
        if host != victim:
            assert f"(host node{victim}" in said, said
            assert "gave no sign of life" in said or "is gone" in said or "holds up" in said, said
    if launcher == "srun":
        assert all(process.returncode == HUNG for process in others), said
    if fault == "cut":  # the one that is cut off ends too: it must not write to a disk that it may still have
        lost = hosts.ranks[victim]
        wait_for(lambda: all(process.poll() is not None for process in lost), 3 * LIMIT_SECONDS + 60, *logs(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_host_was_lost_goes_on_without_it(hosts, features, tmp_path):
    out = tmp_path / "run"
    start(hosts, "srun", (2, 1), features, out, "--training.epochs", "40")
    wait_for(lambda: (out / "checkpoints" / "latest").exists(), 240, *logs(tmp_path))
    hosts.lose(1)
    wait_for(lambda: hosts.ranks[0][0].poll() is not None, 3 * LIMIT_SECONDS + 60, *logs(tmp_path))
    hosts.ranks = [[] for _ in hosts.ranks]
    start(hosts, "srun", (1, 1), features, out, "--training.epochs", "40", "--resume")
    wait_for(lambda: hosts.ranks[0][0].poll() is not None, 240, *logs(tmp_path))
    assert hosts.ranks[0][0].returncode == 0, logs(tmp_path)[0].read_text()[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 40 * 4  # eight videos, two a step as before
