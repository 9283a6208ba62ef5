"""The check of a run before it is started or queued, in a process of its own: the libraries that it needs are heavy."""

import os
import subprocess

from launcher.import_path import import_variables, module_command
from sharding.ranks.errors import EXIT_BAD_INPUT, UserError
from sharding.ranks.sentences import print_warning
from trainer.attempt import check_continuation
from trainer.config import RunConfig
from trainer.config.rules import World
from trainer.plan.record import Preview
from trainer.run_folder.folder import RunFolder

_ERROR = "error: "


def preview(config: RunConfig, world: World) -> Preview | None:
    """Check all of a run that needs no rank, and describe it: parameters, memory, epochs, where it continues.

    Args:
        config: the run.
        world: the ranks that are to be started, here or elsewhere.

    Returns:
        What is known of it; None, after a warning, where this machine cannot tell.

    Raises:
        UserError: something that the user can mend is wrong.
    """
    # First, for it takes no time.
    check_continuation(RunFolder.of(config), config)
    command = module_command(
        "trainer.plan.preview", f"--num-ranks={world.num_ranks}", *(["--gpus"] if world.has_gpu else [])
    )
    finished = subprocess.run(
        command,
        input=config.model_dump_json(),
        env={**os.environ, **import_variables(os.environ)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in finished.stderr.splitlines() if line.strip()]
    if finished.returncode == EXIT_BAD_INPUT:
        refusals = [line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)]
        raise UserError(refusals[0] if refusals else said[-1])
    if finished.returncode:
        # This machine may lack what the ranks have, memory say.
        reason = said[-1] if said else f"status {finished.returncode}"
        print_warning(f"the model and the corpus could not be looked at here ({reason})")
        return None
    return Preview.model_validate_json(finished.stdout)
