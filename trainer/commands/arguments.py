"""Arguments that several commands have, each declared once for ``shardline`` and ``python -m``. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.config.expansion import expand_argument

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
"""Settings of a command of typer's by which either names what asks for help; those below it have them too."""


def expanded(value: Any) -> Any:
    """A path, several, or none, as typer read them, with ``~`` and ``$VARIABLE`` replaced.

    A shell does it too, but not within quotes, and not behind ``--option=``.

    Raises:
        UserError: a variable is not set.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if isinstance(value, Path):
        return Path(expand_argument(str(value)))
    return value if value is None else expand_argument(value)


def complete_setting(incomplete: str) -> list[str]:
    """The settings whose names begin so, for a shell."""
    from trainer.config.reference import section_of, sections
    from trainer.config.schema import RunConfig

    keys = [
        f"{key}.{field.alias or name}" if key else name
        for key, model in sections(RunConfig)
        for name, field in model.model_fields.items()
        # Of a section its settings, and of a list no element's.
        if section_of(field) is None and "[]" not in key
    ]
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


Config = Annotated[str, typer.Argument(help="YAML file of the run.", metavar="CONFIG", callback=expanded)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, such as optimizer.lr=1e-3.", metavar="key=value", autocompletion=complete_setting),
]
NprocPerNode = Annotated[int | None, typer.Option(min=1, help="Ranks on this machine.")]
Run = Annotated[str, typer.Argument(help="Folder of a run, output_dir/name.", metavar="RUN", callback=expanded)]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: one JSON document.")]
Average = Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")]
OwnTask = Annotated[
    str | None, typer.Option("--task", metavar="module:Class", help="Import the run's own task: Python code.")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]
OwnFactories = Annotated[
    list[str] | None,
    typer.Option(
        "--factory",
        metavar="module:function",
        help="Call the run's own maker of models or samples: Python code.",
    ),
]
