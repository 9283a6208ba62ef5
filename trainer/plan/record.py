"""What ``trainer.plan.preview`` tells the launcher of a run before it is started. Imports no torch."""

from sharding.strict_model import StrictRecord
from trainer.runtime.byte_sizes import size_text


class Preview(StrictRecord):
    """A run before it is started; None is what nobody knows yet."""

    model: str | None = None
    """Architecture, or what makes a model of the user's own."""

    num_parameters: int | None = None
    """All of its parameters."""

    num_frozen: int = 0
    """Those of them that are not trained."""

    adapters: str = ""
    """Which layers have adapters, for people."""

    rates: str = ""
    """Lowest and highest learning rate by depth, for people."""

    state_bytes: float | None = None
    """Of a rank: parameters, gradients and optimizer state."""

    activation_bytes: float | None = None
    """Of a rank at least, for activations."""

    teacher: str = ""
    """What the run learns from, for people."""

    teacher_bytes: float = 0.0
    """Of a rank: the teacher's parameters, and what of them is gathered while it runs."""

    corpus: str
    """What is trained on, for people; a line for each stage."""

    num_samples: int | None = None
    """Samples of an epoch."""

    num_epochs: float | None = None
    """How often the run reads them."""

    continues: str
    """Where it continues, for people."""

    continues_after: int | None = None
    """Step of its own checkpoint that it continues from."""

    is_complete: bool = False
    """Whether nothing is left to train."""

    def lines(self) -> list[str]:
        """A few lines for people."""
        if self.num_parameters is None:
            model = ["parameters    not known before the rows are prepared: shardline data prepare does it"]
        else:
            trained = f", {self.num_parameters - self.num_frozen:,} of them trained" if self.num_frozen else ""
            teacher = [f"teacher       {self.teacher}; {size_text(self.teacher_bytes)} a rank"] if self.teacher else []
            model = [
                f"parameters    {self.num_parameters:,} of {self.model}{trained}",
                *([f"adapters      {self.adapters}"] if self.adapters else []),
                *([f"rates         {self.rates}"] if self.rates else []),
                f"memory        {self._memory()}",
                *teacher,
            ]
        corpora = [f"corpus        {line}" for line in self.corpus.split("\n")]
        return [*model, *corpora, f"continues     {self.continues}"]

    def _memory(self) -> str:
        state, activations = self.state_bytes or 0.0, self.activation_bytes
        more = f", at least {size_text(activations)} for activations" if activations else ""
        return f"{size_text(state)} a rank for parameters, gradients and optimizer state{more}"
