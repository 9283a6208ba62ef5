"""The Trainer of transformers, in its own loop."""

from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contestants.contest import Contest, Contestant, StepLog, as_read
from benchmarks.measure.turns import StepEdge


class TransformersTrainer(Contestant):
    """``Trainer.train`` as it is, with the options that its documentation names for speed.

    A callback at the end of each step hands over the turn; what follows it in the loop (logging, the next batch) falls
    into the next step's time. Its DDP offers no gradients as bucket views. Logged losses are means since the last
    log; a logged gradient norm is that of its step.
    """

    name = "transformers"

    def __init__(self, contest: Contest) -> None:
        """Build the Trainer."""
        config = contest.config
        self._every_steps = config.metrics.every_steps
        self.settings: dict[str, Any] = {
            "bf16": contest.uses_bf16,
            "use_cpu": contest.ranks.device.type == "cpu",
            "gradient_accumulation_steps": contest.accumulation_steps,
            "per_device_train_batch_size": config.batch.micro_size,
            "max_grad_norm": config.optimizer.clip_norm,
            "max_steps": contest.num_steps,
            "logging_steps": self._every_steps,
            # The default asks after every micro-batch whether the loss is finite, for which the host must wait.
            "logging_nan_inf_filter": False,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,  # the data set reads into pinned memory
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        }
        arguments = TrainingArguments(output_dir=str(contest.folder / "transformers"), **self.settings)
        model = contest.build_model()
        optimizer = contest.build_optimizer(model)
        self._edge = _StepEdgeCallback()
        self._trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=contest.dataset(with_shift_labels=True),
            data_collator=as_read,
            optimizers=(optimizer, contest.build_schedule(optimizer)),
            callbacks=[self._edge],
        )
        # Others keep their logs in memory or in a file, too.
        self._trainer.remove_callback(PrinterCallback)
        assert self._trainer.accelerator.num_processes == contest.ranks.world_size

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        self._edge.step_edge = step_edge
        self._trainer.train()

    def step_log(self) -> StepLog:
        """See Contestant."""
        entries = [entry for entry in self._trainer.state.log_history if "loss" in entry]
        losses = {entry["step"]: entry["loss"] for entry in entries}
        grad_norms = {entry["step"]: entry["grad_norm"] for entry in entries}
        return StepLog(losses, grad_norms, averaged_over=self._every_steps)


class _StepEdgeCallback(TrainerCallback):
    """Calls ``step_edge`` after each step."""

    step_edge: StepEdge

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_edge()
