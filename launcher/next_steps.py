"""What to look at and to do once a run has ended well."""

import shlex

from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED
from trainer.config import RunConfig
from trainer.config.stages import stages_of
from trainer.run_folder.folder import RunFolder

_LANGUAGE_MODELS = ("causal-lm",)


def next_steps(config: RunConfig, run_folder: RunFolder, exit_code: int) -> list[str]:
    """Lines for a person: the report, and after a finished run commands that fit what it has learnt.

    What stopped has said by itself how it goes on; after a failure its sentence is the last line.
    """
    if exit_code not in (EXIT_FINISHED, EXIT_STOPPED):
        return []
    lines = [f"report    {run_folder.report_file}"] if run_folder.report_file.is_file() else []
    commands = _commands(config, run_folder) if exit_code == EXIT_FINISHED else []
    return [*lines, *(f"{'next' if index == 0 else '':<10}{command}" for index, command in enumerate(commands))]


def _commands(config: RunConfig, run_folder: RunFolder) -> list[str]:
    run = shlex.quote(str(run_folder.path))
    own = [("--task", config.task.name)] if ":" in config.task.name else []
    own += [("--factory", name) for name in (config.model.factory, config.data.factory) if name is not None]
    code = "".join(f" {option} {name}" for option, name in own)
    trust = " --trust-remote-code" if config.model.trust_remote_code else ""
    is_of_transformers = (config.model.architecture or config.model.pretrained) is not None
    form = " --adapter" if config.model.lora.rank else ""
    export = [f"shardline export {run}{form} --to DIR{trust}"] if is_of_transformers and not own else []
    if export and config.task.name in _LANGUAGE_MODELS:
        chat = " --chat" if any(stage.config.data.has_messages for stage in stages_of(config)) else ""
        return [f"shardline generate {run}{chat} --prompt TEXT{trust}", *export]
    return [f"shardline evaluate {run}{code}{trust}", *export]
