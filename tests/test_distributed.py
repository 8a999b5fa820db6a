"""The world each launcher describes, and what it refuses."""

from __future__ import annotations

import socket

import pytest

from re2tal.distributed import (
    World,
    any_rank,
    first_host,
    gather_objects,
    made_by_main,
    main_process_first,
    resolve_world,
    together,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "4242"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
}
EIGHT = World(rank=5, world_size=8, local_rank=1, master_addr="node7", master_port=4242, device_index=1)


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        pytest.param(TORCHRUN, EIGHT, id="torchrun"),
        pytest.param({**TORCHRUN, "LOCAL_SIZE": "4", "CROSS_RANK": "1"}, EIGHT, id="deepspeed"),
        pytest.param({**SRUN, **TORCHRUN}, EIGHT, id="srun torchrun"),
        pytest.param(
            SRUN,
            World(rank=5, world_size=8, local_rank=1, master_addr="gpu07", master_port=33456, device_index=1),
            id="srun",
        ),
        pytest.param({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "8"}, EIGHT, id="mpirun that was told all"),
        pytest.param(
            {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29999"},
            World(rank=5, world_size=8, local_rank=1, master_addr="10.0.0.1", master_port=29999, device_index=1),
            id="srun with an address from the script",
        ),
        pytest.param(
            {**SRUN, "CUDA_VISIBLE_DEVICES": "3"},
            World(rank=5, world_size=8, local_rank=1, master_addr="gpu07", master_port=33456, device_index=0),
            id="srun --gpus-per-task=1",
        ),
        *(
            pytest.param(
                {**SRUN, name: "3"},
                World(rank=5, world_size=8, local_rank=1, master_addr="gpu07", master_port=33456, device_index=0),
                id=f"srun --gpus-per-task=1, {name}",
            )
            for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
        ),
        pytest.param(
            {**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "ZE_AFFINITY_MASK": "0"},
            World(rank=5, world_size=8, local_rank=1, master_addr="gpu07", master_port=33456, device_index=1),
            id="srun where another vendor's variable is set too",
        ),
        pytest.param(
            {**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_NUM_TASKS": "6"},
            World(rank=5, world_size=6, local_rank=1, master_addr="gpu07", master_port=33456, device_index=1),
            id="srun with fewer tasks than the job",
        ),
        pytest.param(
            {**SRUN, "SLURM_STEP_ID": "2", "PMI_SIZE": "8"},
            World(rank=5, world_size=8, local_rank=1, master_addr="gpu07", master_port=49294, device_index=1),
            id="srun beside other steps of the job",
        ),
    ],
)
def test_each_launcher_gives_its_world(environ, world):
    assert resolve_world(environ) == world


def test_accelerate_is_taken_where_it_names_ranks_and_nothing_else():
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}
    assert resolve_world({**plain, **TORCHRUN}) == EIGHT
    with pytest.raises(ValueError, match="told it no rank"):
        resolve_world(plain)
    for name, value in (("MIXED_PRECISION", "fp16"), ("USE_DEEPSPEED", "true"), ("USE_FSDP", "true")):
        with pytest.raises(ValueError, match=f"ACCELERATE_{name}.*would be ignored"):
            resolve_world({**plain, **TORCHRUN, f"ACCELERATE_{name}": value})


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="plain python"),
        pytest.param({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, id="inside a batch script, without srun"),
        pytest.param({"MASTER_ADDR": "node7", "MASTER_PORT": "1"}, id="an address alone"),
    ],
)
def test_without_a_launcher_there_is_one_process_on_a_free_port(environ):
    world = resolve_world(environ)
    assert (world.rank, world.world_size, world.local_rank, world.is_main) == (0, 1, 0, True)
    with socket.socket() as probe:
        probe.bind((world.master_addr, world.master_port))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"\['LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'\].*start with `deepspeed`"),
        ({**TORCHRUN, "RANK": "two"}, "environment variable RANK is 'two'; it must be an integer"),
        ({**TORCHRUN, "RANK": "8"}, "RANK, WORLD_SIZE.* give the impossible World.rank=8, world_size=8"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "impossible .*70000"),
        (
            {k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"},
            r"not \['SLURM_LOCALID'\]; start the ranks with `srun",
        ),
        ({**SRUN, "SLURM_JOB_NODELIST": "gpu[07-"}, "not of the form"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, r"as one of 4 .* each would run alone"),
        # Open MPI starts its own helpers by srun, and their variables reach the processes.
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "4"}, r"as one of 4 \(OMPI_COMM_WORLD_SIZE\)"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, r"as one of 4 \(PMI_SIZE\)"),
    ],
)
def test_a_partial_or_impossible_environment_is_named(environ, message):
    with pytest.raises(ValueError, match=message):
        resolve_world(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login", "login"),
        ("a,b", "a"),
        ("gpu[08-10,12],login", "gpu08"),
        ("r[1-2]n[01-02]", "r1n01"),
        ("n[3]-ib.cluster", "n3-ib.cluster"),
    ],
)
def test_rank_0_is_on_the_first_host_of_the_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_the_five_variables_name_the_device_to_take():
    world = World(rank=5, world_size=8, local_rank=1, master_addr="a", master_port=7, device_index=0)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert world.variables() == expected


def test_no_free_port_is_said(monkeypatch):
    class Exhausted:
        def __enter__(self):
            raise OSError(98, "Address already in use")

        def __exit__(self, *details):
            return None

    monkeypatch.setattr("re2tal.distributed.world.socket.socket", Exhausted)
    with pytest.raises(ConnectionError, match=r"no free TCP port on 127.0.0.1 .*MASTER_PORT"):
        resolve_world({})


def test_one_process_needs_no_group():
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert any_rank(True)
    assert not any_rank(False)
    with main_process_first():
        ran = True
    assert ran


def test_one_process_makes_alone_what_all_would_and_keeps_its_own_error():
    assert together(lambda: 3) == [3]
    assert made_by_main(lambda: "plan") == "plan"
    with pytest.raises(ZeroDivisionError):
        made_by_main(lambda: 1 / 0)
