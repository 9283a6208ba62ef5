"""The table of variables that ranks are started with."""

from pathlib import Path

import pytest

from launcher.environment import applied, launcher_variables, rank_variables
from launcher.topology import Topology
from tests.support import ROOT
from trainer.config import load_config

CPU, GPU = Topology(num_gpus=0, num_cores=4), Topology(num_gpus=8, num_cores=64)


def table(config_file: Path, topology: Topology, environment: dict[str, str], *overrides: str) -> dict[str, str]:
    added, _ = applied(rank_variables(load_config(config_file, overrides), topology, 2, environment), environment)
    return {variable.name: variable.value for variable in added}


def test_golden_tables(config_file: Path) -> None:
    cpu = {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "PYTHONFAULTHANDLER": "1",
    }
    assert table(config_file, CPU, {}, "launch.threads_per_rank=3") == cpu
    assert table(config_file, GPU, {}, "launch.threads_per_rank=3") == cpu | {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_DEBUG": "WARN",
    }


def test_what_a_launcher_needs_beyond_that() -> None:
    def needed(launcher: str, topology: Topology, num_ranks: int) -> dict[str, str]:
        return {v.name: v.value for v in launcher_variables(launcher, topology, num_ranks)}

    assert needed("deepspeed", CPU, 2) == {"DS_ACCELERATOR": "cpu"}
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert needed("accelerate", CPU, 1) == needed("accelerate", GPU, 1) == one_rank
    assert needed("accelerate", CPU, 2) == needed("torchrun", CPU, 1) == needed("deepspeed", GPU, 1) == {}


def test_every_variable_says_why_and_stands_once(config_file: Path) -> None:
    variables = rank_variables(load_config(config_file), GPU, 2, {})
    names = [name for variable in variables for name in (variable.name, *variable.other_names)]
    assert len(set(names)) == len(names)
    assert all(len(variable.why) > 20 for variable in variables)


@pytest.mark.parametrize(
    ("own", "name", "ours"),
    [
        ("NCCL_DEBUG", "NCCL_DEBUG", "WARN"),
        ("TOKENIZERS_PARALLELISM", "TOKENIZERS_PARALLELISM", "false"),
        # The same setting under another name, which would lose against ours.
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE", "2000"),
    ],
)
def test_a_users_own_value_wins_and_is_said(config_file: Path, own: str, name: str, ours: str) -> None:
    environment = {own: "mine"}
    added, kept = applied(rank_variables(load_config(config_file), GPU, 2, environment), environment)
    assert name not in [variable.name for variable in added]
    assert kept == [f"{own}=mine is kept from your environment (Shardline would set {name}={ours})"]


def test_threads_in_the_configuration_outrank_the_environment(config_file: Path) -> None:
    assert table(config_file, CPU, {"OMP_NUM_THREADS": "7"}, "launch.threads_per_rank=3")["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in table(config_file, CPU, {"OMP_NUM_THREADS": "7"})


def test_only_ranks_of_one_machine_are_kept_to_the_loopback_interface(config_file: Path) -> None:
    def interfaces(num_nodes: int) -> set[str]:
        variables = rank_variables(load_config(config_file), GPU, 2, {}, num_nodes)
        return {variable.name for variable in variables if variable.value == "lo"}

    assert interfaces(1) == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert interfaces(2) == set()
