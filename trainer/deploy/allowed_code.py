"""Which Python code a caller lets a run's own files bring along."""

from dataclasses import dataclass

from sharding.ranks.errors import UserError
from trainer.config import RunConfig


@dataclass(frozen=True)
class AllowedCode:
    """Python code that whoever calls a command lets it run; what a run's own files ask for is no permission.

    Attributes:
        task: ``module:Class`` of a task that may be imported.
        trust_remote_code: whether a model's own code may run.
        factories: ``module:function`` of models and samples that may be called.
    """

    task: str | None = None
    trust_remote_code: bool = False
    factories: tuple[str, ...] = ()

    def check(self, config: RunConfig, source: object) -> None:
        """Refuse a run whose configuration asks for code that is not allowed.

        Args:
            config: the run's configuration, as its files have it.
            source: the run or checkpoint, to speak of.

        Raises:
            UserError: it asks for a task's or a model's own code.
        """
        if ":" in config.task.name and self.task != config.task.name:
            place = "" if config.task.folder is None else f" in task.folder={config.task.folder}"
            other = "" if self.task is None else f", not {self.task}"
            raise UserError(
                f"{source} asks for Python code by task.name={config.task.name}{place}{other}; read that code, and "
                f"give --task {config.task.name} to run it."
            )
        if config.model.factory is not None and config.model.factory not in self.factories:
            raise UserError(
                f"{source} asks for Python code by model.factory={config.model.factory}; read that code, and give "
                f"--factory {config.model.factory} to run it."
            )
        if config.model.trust_remote_code and not self.trust_remote_code:
            raise UserError(
                f"{source} asks for Python code of model.pretrained={config.model.pretrained} by "
                "model.trust_remote_code=true; read that code, and give --trust-remote-code to run it."
            )

    def check_samples(self, config: RunConfig, source: object) -> None:
        """Refuse a run whose samples are made by code that is not allowed; see ``check``.

        Raises:
            UserError: it is not.
        """
        if config.data.factory is not None and config.data.factory not in self.factories:
            raise UserError(
                f"{source} asks for Python code by data.factory={config.data.factory}; read that code, and give "
                f"--factory {config.data.factory} to run it."
            )
