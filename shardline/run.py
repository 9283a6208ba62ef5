"""A run that there is, by its folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config import RunConfig
from trainer.config.expansion import expand_argument
from trainer.deploy.signature import Dtype, Format
from trainer.files.storage import CheckpointPath
from trainer.metrics.file import Metrics, read_metrics
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import list_checkpoints
from trainer.runtime.own_modules import name_own

if TYPE_CHECKING:
    from trainer.deploy.generation import Continuation, Sampling
    from trainer.deploy.loaded import Device, LoadDtype

OwnPart = Callable[..., Any] | str


class Run:
    """A run's folder, ``output_dir/name``, whether it trains, has stopped or has finished.

    Nothing is kept here: each time it is asked, it looks. Where the run has a task, a model or samples of its owner's,
    what reads its weights is given these classes or functions, or their names, as a command is: code runs that the
    caller names, never what a run's folder asks for.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Raises:
            UserError: there is no run in this folder.
        """
        self.path = Path(expand_argument(str(path)))
        self._folder = RunFolder(self.path)
        self._folder.frozen_config()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> RunConfig:
        """The configuration of its latest attempt."""
        return self._folder.newest_config()

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How its latest attempt ended: ``status``, ``exit_code``, ``step``, ``reason`` and ``rank``; else None."""
        return self._folder.read_outcome()

    @property
    def metrics(self) -> list[Metrics]:
        """The lines of metrics.jsonl, one for each logged step; ``pandas.DataFrame`` makes a table of them."""
        return read_metrics(self._folder.metrics_file)

    @property
    def checkpoints(self) -> dict[int, CheckpointPath]:
        """Step and folder of its checkpoints, oldest first; a ``Path`` unless ``checkpoint.storage`` is a URL."""
        return dict(list_checkpoints(self._folder.frozen_checkpoints_dir()))

    def stop(self, reason: str = "by Run.stop") -> None:
        """Ask it to save and stop at the next step's edge; a run that does not train begins anew all the same."""
        self._folder.request_stop(reason)

    def report(self, to: str | Path | None = None) -> Path:
        """Write its page of plots for a browser; returns its file, ``report.html`` in the run's folder if not given."""
        from trainer.report.page import write_report

        file = self._folder.report_file if to is None else Path(to)
        write_report([self.path], file)
        return file

    def evaluate(
        self,
        split: str = "validation",
        *,
        data: Sequence[str | Path] = (),
        step: int | None = None,
        ema: bool = False,
        task: OwnPart | None = None,
        model: OwnPart | None = None,
        samples: OwnPart | None = None,
        trust_remote_code: bool = False,
    ) -> dict[str, Any]:
        """Evaluate a checkpoint on the ranks that the script was started on; every one of them must call it.

        Args:
            split: train, validation or test of the run's data, or one of its ``evaluation.sets``.
            data: files to evaluate on in place of a split.
            step: of the checkpoint; the newest if not given.
            ema: take the moving average of the weights.
            task: the run's own, where it has one.
            model: what makes the run's own model, where it has one.
            samples: what makes the run's own samples, where it has any.
            trust_remote_code: run the model's own Python code.

        Returns:
            ``samples``, their number, ``metrics`` by name, and of a classification ``classes`` and ``confusion``.

        Raises:
            UserError: there is no such checkpoint or split, or code is not allowed.
        """
        from trainer.deploy.allowed_code import AllowedCode
        from trainer.evaluation.on_ranks import evaluate_on_started_ranks
        from trainer.evaluation.subject import Asked

        factories = [_name(model, "model"), _name(samples, "samples")]
        allowed = AllowedCode(_name(task, "task"), trust_remote_code, tuple(filter(None, factories)))
        files = tuple(map(str, data))
        return evaluate_on_started_ranks(Asked(str(self.path), step, ema, split, files, allowed))

    def load(
        self,
        step: int | None = None,
        *,
        ema: bool = False,
        task: OwnPart | None = None,
        trust_remote_code: bool = False,
        device: "Device" = "cpu",
        dtype: "LoadDtype" = "auto",
    ) -> tuple[Any, Any]:
        """Model and tokenizer of a checkpoint as `transformers` has them, in evaluation mode.

        Args:
            step: of the checkpoint; the newest if not given.
            ema: take the moving average of the weights.
            task: the run's own, where it has one.
            trust_remote_code: run the model's own Python code.
            device: where to; ``auto`` takes a GPU where there is one.
            dtype: of the weights; ``auto`` is fp32.

        Raises:
            UserError: there is no such checkpoint, the model does not continue text, there is no such device, or code
                is not allowed.
        """
        from trainer.deploy.allowed_code import AllowedCode
        from trainer.deploy.loaded import load_model

        allowed = AllowedCode(_name(task, "task"), trust_remote_code)
        return load_model(str(self.path), step, averaged=ema, allowed=allowed, device=device, dtype=dtype)

    def generate(
        self,
        prompt: str,
        *,
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
        step: int | None = None,
        ema: bool = False,
        task: OwnPart | None = None,
        trust_remote_code: bool = False,
        device: "Device" = "auto",
        dtype: "LoadDtype" = "auto",
    ) -> str:
        """A text and its continuation by the run's model, or an answer; the model is loaded for it.

        Args:
            prompt: text to continue, or what a user says.
            chat: answer the prompt as the tokenizer's chat template puts it; the answer alone is returned.
            max_new_tokens: tokens to add at most; 120, or what the model's positions leave.
            temperature: 0 takes the likeliest token each time.
            top_k: choose among this many likeliest tokens; 0 means all.
            seed: of the choice.
            step: see ``load``, as for what follows.
            ema: see ``load``.
            task: see ``load``.
            trust_remote_code: see ``load``.
            device: see ``load``.
            dtype: see ``load``.

        Raises:
            UserError: see ``load``; also where prompt and continuation are longer than the model has positions.
        """
        from trainer.deploy.generation import Sampling

        (made,) = self.generate_many(
            [prompt],
            Sampling(max_new_tokens, temperature, top_k, chat),
            seeds=[seed],
            step=step,
            ema=ema,
            task=task,
            trust_remote_code=trust_remote_code,
            device=device,
            dtype=dtype,
        )
        return made.text

    def generate_many(
        self,
        prompts: Sequence[str],
        sampling: "Sampling | None" = None,
        *,
        seeds: Sequence[int] = (0,),
        step: int | None = None,
        ema: bool = False,
        task: OwnPart | None = None,
        trust_remote_code: bool = False,
        device: "Device" = "auto",
        dtype: "LoadDtype" = "auto",
    ) -> "list[Continuation]":
        """What ``generate`` makes of each prompt with each seed; the model is loaded once for all.

        Args:
            prompts: texts to continue, or what users say.
            sampling: how tokens are chosen; as in ``generate`` if not given.
            seeds: of the choice.
            step: see ``load``, as for what follows.
            ema: see ``load``.
            task: see ``load``.
            trust_remote_code: see ``load``.
            device: see ``load``.
            dtype: see ``load``.

        Returns:
            Those of the first prompt by seed, then those of the next; each is what its prompt and seed alone give.

        Raises:
            UserError: see ``generate``.
        """
        from trainer.deploy.generation import Sampling, continue_prompts

        loaded, tokenizer = self.load(
            step, ema=ema, task=task, trust_remote_code=trust_remote_code, device=device, dtype=dtype
        )
        return list(continue_prompts(loaded, tokenizer, prompts, sampling or Sampling(), seeds))

    def export(
        self,
        to: str | Path,
        *,
        format: Format = "hf",
        dtype: Dtype = "fp32",
        step: int | None = None,
        ema: bool = False,
        task: OwnPart | None = None,
        model: OwnPart | None = None,
        samples: OwnPart | None = None,
        trust_remote_code: bool = False,
        form: Literal["adapter", "merged"] | None = None,
        accept_loss: bool = False,
    ) -> Path:
        """Write a checkpoint as a folder that another runtime loads, where it computes what was trained.

        Args:
            to: a new folder.
            format: ``hf`` for `transformers`, ``onnx`` for ONNX Runtime, ``torch-export`` for ``torch.export.load``.
            dtype: format of the weights: ``fp32``, ``bf16`` or ``fp16``.
            step: see ``load``, as for what follows.
            ema: see ``load``.
            task: see ``load``.
            model: what makes the run's own model, where it has one.
            samples: what makes the run's own samples, where it has any.
            trust_remote_code: see ``load``.
            form: of a run with adapters (LoRA) these alone, as peft loads them, or the whole model; None of others.
            accept_loss: write also what is less good than what was trained, or cannot be compared with it.

        Returns:
            The folder; ``deployment.json`` in it says what it holds, and README.md how good it is.

        Raises:
            UserError: see ``load``; also where the folder is not empty or cannot be written, the form or the format is
                not one that the run has, a package is missing, or what was written is another model than was trained.
        """
        from trainer.checkpoint.reader import open_checkpoint
        from trainer.deploy.allowed_code import AllowedCode
        from trainer.deploy.export import ExportOptions, export_run

        folder = Path(to)
        factories = [_name(model, "model"), _name(samples, "samples")]
        options = ExportOptions(
            format=format,
            dtype=dtype,
            averaged=ema,
            allowed=AllowedCode(_name(task, "task"), trust_remote_code, tuple(filter(None, factories))),
            form=form,
            accept_loss=accept_loss,
        )
        export_run(open_checkpoint(str(self.path), step), folder, options)
        return folder


def _name(part: OwnPart | None, argument: str) -> str | None:
    return part if part is None or isinstance(part, str) else name_own(part, argument)[0]
