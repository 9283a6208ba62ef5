"""DistributedDataParallel with torch's ``ZeroRedundancyOptimizer``, which is stage 1."""

import warnings

import torch
from torch import nn

from benchmarks.contestants.contest import Contest
from benchmarks.contestants.plain_loop import PlainLoop


class ZeroRedundancyLoop(PlainLoop):
    """The plain loop whose optimizer keeps the moments of this rank's parameters alone, and then broadcasts these.

    DDP has summed all gradients up before the step, so that norm and clipping are the plain loop's. Its option
    ``overlap_with_ddp`` cannot take part: it steps each bucket when its gradients arrive, before the norm of the whole
    is known, with an optimizer of one group and without ``fused``.
    """

    name = "zero redundancy"

    def __init__(self, contest: Contest, *, parameters_as_bucket_view: bool = True) -> None:
        """Set up model, optimizer and loader.

        Args:
            contest: what all share.
            parameters_as_bucket_view: whether parameters are views of what is broadcast, which saves copies.
        """
        self._as_bucket_view = parameters_as_bucket_view
        super().__init__(contest)
        self.settings = self.settings | {
            "overlap_with_ddp": False,
            "parameters_as_bucket_view": parameters_as_bucket_view,
        }

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            # The package's other optimizers use what torch itself has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        groups, options = self._contest.optimizer_arguments(model)
        return ZeroRedundancyOptimizer(
            groups, torch.optim.AdamW, parameters_as_bucket_view=self._as_bucket_view, **options
        )
