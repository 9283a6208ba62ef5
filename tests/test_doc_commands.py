"""What a reader of the pages types: each command is read as it stands, with the files of its page; a test runs it."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from launcher.commands import app
from tests.doc_pages import Page
from tests.support import ROOT
from trainer.config import RunConfig, load_config, parse_config
from trainer.config.rules import World, validate
from trainer.config.yaml_files import parse_yaml

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# A list of settings or of releases has no commands.
_LISTS = {"configuration.md", "CHANGELOG.md"}
_LANGUAGES = {"sh", "console", "yaml", "python", "text"}
_NEEDS_GPU = ("gpt2_124m", "llama_1b")

# The first words of a command, and the tests that run it. A verb of shardline is also in the source of one of them.
_RUN_BY = {
    "shardline run": "tests/e2e/test_continuation.py::test_two_continuations_are_bit_for_bit_the_uninterrupted_run",
    "shardline data prepare": "tests/e2e/test_bad_input.py::test_a_truncated_shard",
    "shardline data show": "tests/e2e/test_outputs.py::test_data_show_prints_what_the_step_was_trained_on",
    "shardline parity": "tests/trainer/parity/test_parity.py::test_every_strategy_trains_as_one_plain_process",
    "shardline evaluate": "tests/e2e/test_wheel.py::test_the_example_of_an_own_task_runs_as_it_is_written",
    "shardline prune": "tests/trainer/commands/test_prune.py::test_the_command",
    "shardline export": "tests/e2e/test_outputs.py::test_the_exported_model_has_the_runs_own_evaluation_loss",
    "shardline quantize": "tests/trainer/deploy/test_quantize.py::test_a_graph",
    "shardline generate": "tests/e2e/test_outputs.py::test_generate_continues_a_prompt_the_same_way_for_the_same_seed",
    "shardline serve": "tests/trainer/serving/test_server.py::test_each_request_has_its_own_right_answer",
    "shardline report": "tests/e2e/test_report.py::test_each_run_ends_with_a_report_and_one_that_fails_changes_nothing",
    "shardline list": "tests/trainer/report/test_run_list.py::test_each_run_is_a_line",
    "shardline checkpoint list": "tests/e2e/test_outputs.py::test_checkpoints_are_listed_and_verified",
    "shardline checkpoint verify": "tests/e2e/test_outputs.py::test_checkpoints_are_listed_and_verified",
    "shardline drill": "tests/e2e/test_drills.py::test_drills_of_a_killed_and_a_hanging_rank_and_a_full_disk_pass",
    "shardline bench": "tests/benchmarks/test_data.py::test_a_huge_corpus_takes_no_space_and_its_blocks_are_verified",
    "shardline tune": "tests/benchmarks/test_tune.py::test_a_search_on_two_ranks_goes_on_after_running_out_of_memory",
    "shardline doctor": "tests/trainer/doctor/test_doctor.py::test_the_doctor_looks_at_this_machine",
    "shardline init": "tests/launcher/test_cli.py::test_init_copies_the_examples_and_overwrites_nothing",
    "shardline slurm submit": "tests/slurm/test_submit.py::test_from_submit_to_the_last_step",
    "shardline slurm status": "tests/slurm/test_submit.py::test_from_submit_to_the_last_step",
    "shardline slurm logs": "tests/slurm/test_submit.py::test_from_submit_to_the_last_step",
    "shardline slurm cancel": "tests/slurm/test_interruptions.py::test_a_person_who_stops_or_cancels_a_job_is_obeyed",
    "shardline slurm resubmit": "tests/slurm/test_submit.py::test_from_submit_to_the_last_step",
    "shardline tracking sync": "tests/e2e/test_tracking.py::test_sync_joins_all_parts_into_one_run_and_nothing_twice",
    "shardline tracking dashboard": "tests/e2e/test_tracking.py::test_the_dashboard_plots_what_training_logs",
    "python": "tests/shardline/test_docs_python.py::test_a_run_of_own_parts_and_what_has_become_of_it",
    "curl": "tests/trainer/serving/test_language_model.py::test_curl",
    "torchrun": "tests/e2e/test_launchers.py::test_a_bare_command_gives_the_same_losses",
    "deepspeed": "tests/e2e/test_launchers.py::test_a_bare_command_gives_the_same_losses",
    "accelerate": "tests/e2e/test_launchers.py::test_a_bare_command_gives_the_same_losses",
    "sbatch": "tests/slurm/test_scripts.py::test_two_nodes_under_each_script_train_as_one_process_does",
    "scontrol": "tests/slurm/test_interruptions.py::test_a_requeued_job_and_one_whose_ranks_are_warned_go_on",
    "scancel": "tests/slurm/test_interruptions.py::test_a_person_who_stops_or_cancels_a_job_is_obeyed",
    "touch": "tests/e2e/test_interruptions.py::test_the_stop_file_stops_a_run",
}
# What no test runs, and why; docs/promises.md says so too.
_RUN_BY_NONE = {
    "vllm": "another program",
    "git": "fetches",
    "pip": "fetches",
    "hf": "fetches",
    "lm_eval": "another program",
    "tensorboard": "another program",
    "make": "a target of the Makefile",
}
# What a shell does itself.
_BUILTINS = {"cd", "export", "cat"}


def _verbs(command: Any, name: str = "shardline") -> dict[str, Any]:
    """Every verb below a command, by its words."""
    if not hasattr(command, "commands"):
        return {name: command}
    below = (_verbs(inner, f"{name} {word}") for word, inner in command.commands.items())
    return {verb: found for verbs in below for verb, found in verbs.items()}


VERBS = _verbs(typer.main.get_command(app))
READ = [pytest.param(Page.read(path), id=path.stem) for path in PAGES if path.name not in _LISTS]


def _typed(page: Page) -> list[list[str]]:
    return page.commands() + page.commands("console")


def _verb(words: list[str]) -> str:
    """The first words of a command that say what it does."""
    for length in (3, 2):
        if " ".join(words[:length]) in VERBS:
            return " ".join(words[:length])
    return words[0]


def _num_ranks(parameters: dict[str, Any], config: RunConfig) -> int:
    """Ranks that a command starts where there is no GPU, or on the nodes that it asks Slurm for."""
    if "nodes" in parameters:
        gpus = str(parameters["gpus_per_node"] or 1).rpartition(":")[2]
        return int(parameters["nodes"]) * int(gpus)
    return parameters.get("nproc_per_node") or (1 if config.parallel.strategy == "none" else 2)


def _read(words: list[str]) -> dict[str, Any]:
    """Arguments and options as the command declares them, whatever it does with them."""
    verb = _verb(words)
    arguments = words[len(verb.split()) :]
    if verb == "sbatch":
        (at,) = (index for index, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file()
        takes_config = words[at] != "slurm/scaling.sbatch"
        return {"config": words[at + 1], "overrides": words[at + 2 :], "gpus_per_node": 1} if takes_config else {}
    # Its options are read by itself; test_docs looks for them.
    if verb == "shardline tune":
        return {"config": arguments[0], "overrides": [word for word in arguments if "=" in word]}
    with VERBS[verb].make_context(verb, arguments) as context:
        return context.params


def _loads(words: list[str], configurations: dict[str, Path]) -> set[str]:
    """Read a command and its configuration, with all rules; names of the runs that it makes."""
    parameters = _read(words)
    if _verb(words) == "shardline prune":
        return {parameters["to"].name}
    if (name := parameters.get("config")) is None:
        return set()
    made = set()
    # Of an array, as its first tasks have them.
    for task in "123":
        overrides = [text.replace("{task}", task) for text in parameters.get("overrides") or []]
        config = load_config(configurations[name], overrides)
        has_gpu = any(part in name for part in _NEEDS_GPU) or bool(parameters.get("gpus_per_node"))
        validate(config, World(_num_ranks(parameters, config), has_gpu))
        made.add(config.name)
    return made


def _runs_named(words: list[str]) -> set[str]:
    """Names of the runs that a command looks for; those of a later command's argument are not there before."""
    values = [word.partition("=")[2] if word.startswith("checkpoint.from=") else word for word in words[1:]]
    return {value.removeprefix("runs/").partition("/")[0] for value in values if value.startswith("runs/")}


@pytest.mark.parametrize("page", READ)
def test_blocks_say_what_they_are(page: Page) -> None:
    assert [text for language, text in page.blocks if language not in _LANGUAGES] == []
    outside = re.sub(r"^```.*?^```$", "", page.path.read_text(), flags=re.DOTALL | re.MULTILINE)
    programs = "|".join(sorted({name.split()[0] for name in _RUN_BY} | set(_RUN_BY_NONE)))
    assert re.findall(rf"^ {{4,}}(?:\$ )?(?:{programs}) .*$", outside, re.MULTILINE) == []


@pytest.mark.parametrize("page", READ)
def test_commands_are_read_and_find_their_files(page: Page, tmp_path: Path) -> None:
    configurations = page.configurations(tmp_path)
    made = {load_config(path).name for path in configurations.values()}
    for words in page.commands():
        if words[0] in ("shardline", "sbatch"):
            made |= _loads(words, configurations)
        assert _runs_named(words) - made == set(), shlex.join(words)
    for words in page.commands("console"):
        if words[0] == "shardline":
            _read(words)


@pytest.mark.parametrize("page", READ)
def test_settings_that_are_shown_are_known(page: Page) -> None:
    for language, text in page.blocks:
        if language == "yaml" and text not in page.files.values():
            # What a fragment leaves out must be in any configuration.
            written = parse_yaml(text)
            # Stages have lengths of their own.
            budget = {} if "stages" in written else {"steps": 1}
            values = {**budget, "model": {"architecture": "llama"}} | written
            parse_config(values, page.path.name, has_rules=False)


@pytest.mark.parametrize("page", READ)
def test_a_test_runs_each_command(page: Page) -> None:
    unknown = {_verb(words) for words in _typed(page)} - _RUN_BY.keys() - _RUN_BY_NONE.keys() - _BUILTINS
    assert unknown == set()


def test_what_runs_each_command_is_there_and_names_it() -> None:
    for command, held_by in _RUN_BY.items():
        file, _, test = held_by.partition("::")
        source = (ROOT / file).read_text()
        assert test in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}, held_by
        assert re.search(rf"\b{command.split()[-1].partition('/')[0]}", source), held_by
    assert _RUN_BY.keys() - {_verb(words) for parameter in READ for words in _typed(parameter.values[0])} == set()
