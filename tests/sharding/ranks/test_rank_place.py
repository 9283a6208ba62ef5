"""A rank's place under launchers that do not say it in torch's names, and contradictions between launchers."""

import pytest

from sharding.ranks.errors import UserError
from sharding.ranks.rank_place import note_on_place, place_variables, read_ranks
from sharding.ranks.slurm_step import expand_counts, first_host, job_port

# As Slurm 22.05 sets them in the last of 3 + 1 tasks.
STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
}
# What a batch script and the shell of salloc see of a job of 4 tasks.
BATCH = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}
SALLOC = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
    "GROUP_WORLD_SIZE": "2",
}
AGENT_STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


def test_a_task_of_srun_is_a_rank() -> None:
    assert read_ranks(STEP) == (3, 4, 0, 1)
    assert read_ranks(STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}) == (1, 4, 1, 3)
    place = place_variables(STEP)
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("gpu07", str(job_port(71, 2)))
    own = place_variables(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.0.0.1", "4000")


def test_a_batch_script_a_shell_and_a_step_of_one_task_are_one_process() -> None:
    alone = STEP | {
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    for environment in (BATCH, SALLOC, alone):
        assert place_variables(environment) == {}
        assert read_ranks(environment) == (0, 1, 0, 1)
    for environment in (BATCH, SALLOC):
        assert note_on_place(environment) == (
            "SLURM_NTASKS=4, but srun did not start this process: it trains alone, as one rank."
        )
    for environment in (STEP, BATCH | TORCHRUN, {}, BATCH | {"SLURM_NTASKS": "1"}):
        assert note_on_place(environment) == ""


def test_a_launcher_inside_a_step_or_a_script_decides() -> None:
    assert read_ranks(TORCHRUN | AGENT_STEP) == (5, 8, 1, 4)
    assert read_ranks(TORCHRUN | BATCH) == (5, 8, 1, 4)
    by_deepspeed = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert read_ranks(by_deepspeed | AGENT_STEP) == (5, 8, 1, 4)
    by_hand = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_ranks(STEP | by_hand) == (3, 4, 0, 1)
    # mpirun starts its daemons with srun, so its ranks see the daemons' step.
    assert read_ranks(STEP | OPENMPI) == (1, 2, 1, 2)


def test_a_rank_of_mpirun() -> None:
    place = place_variables(OPENMPI)
    assert read_ranks(OPENMPI) == (1, 2, 1, 2)
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("127.0.0.1", "29500")
    spread = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert read_ranks(spread | {"MASTER_ADDR": "n1", "MASTER_PORT": "4000"}) == (1, 2, 0, 1)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (without(STEP, "SLURM_PROCID"), "SLURM_STEP_ID=2 is set, but SLURM_PROCID is not; let srun"),
        (without(STEP, "SLURM_STEP_NODELIST"), "SLURM_STEP_ID=2 is set, but SLURM_STEP_NODELIST is not; let srun"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x is not a number"),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            "SLURM_STEP_TASKS_PER_NODE=1(x2) does not fit SLURM_STEP_NUM_TASKS=4 and SLURM_NODEID=1",
        ),
        (STEP | {"SLURM_PROCID": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 contradict srun's SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=4",
        ),
        (STEP | {"RANK": "3"}, "RANK=3 is set, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE is not"),
        (
            TORCHRUN | AGENT_STEP | {"GROUP_WORLD_SIZE": "1"},
            "srun started 2 tasks, but torchrun knows of GROUP_WORLD_SIZE=1",
        ),
        (
            without(OPENMPI, "OMPI_COMM_WORLD_SIZE"),
            "OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_LOCAL_RANK=1, OMPI_COMM_WORLD_LOCAL_SIZE=2 is set, but "
            "OMPI_COMM_WORLD_SIZE is not",
        ),
        (
            OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "mpirun started ranks on several nodes, but MASTER_ADDR is not set",
        ),
    ],
)
def test_half_set_and_contradictory_variables_are_named(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        read_ranks(environment)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-a[003-005,9]-ib,login1", "gpu-a003-ib"),
        ("rack[1-2]node[07,09]", "rack1node07"),
        ("login1,n[1-2]", "login1"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "n[1-2", ",n1"])
def test_a_node_list_that_cannot_be_read_is_no_host(node_list: str) -> None:
    with pytest.raises(UserError, match="cannot be read; set MASTER_ADDR"):
        first_host(node_list)


def test_counts_per_node() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="no list of numbers per node"):
        expand_counts("2(x)")


def test_jobs_that_follow_one_another_have_ports_of_their_own() -> None:
    ports = [job_port(job_id, step_id) for job_id in range(1000, 1200) for step_id in range(3)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 12_000
    assert max(job_port(job_id) for job_id in range(100_000)) < 32_000
