"""ZeRO stages 1 to 3 and HSDP of our own: flat buckets, gradients that travel in backward, a step on the own slices.

Stages as in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020); buckets
that leave from backward's hooks as in Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training" (2020).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.bucketed.gradient_buckets import GradientBuckets
from sharding.bucketed.model_buckets import ModelBuckets
from sharding.bucketed.parameter_gathers import ParameterGathers
from sharding.config import Strategy
from sharding.engine import Batch, ModelDefinition, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.part import Part, part_of_run
from sharding.reached import ReachedParameters
from sharding.state import MODEL_PREFIX
from sharding.torch_engine import TorchEngine

_ROW = 256
"""Elements that are squared and added up in fp32; the sums of rows are added up in fp64."""


class BucketedEngine(TorchEngine):
    """A model each of whose parameters is a view of a flat bucket, in the format in which it computes.

    A rank's slices of the buckets are the fp32 masters that it optimizes. What stays whole is gathered after the step,
    which the next forward pass waits for block by block: in stages 1 and 2 all buckets, in stage 3 those of the first
    block and of what is in no block. Each other block is gathered when it is used. HSDP is stage 3 inside groups of
    ranks, with a sum over the groups at the end of a step's last micro-batch.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        strategy: Strategy,
        buckets: ModelBuckets,
        bucket_elements: int,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """See TorchEngine; the process group must be up.

        Args:
            definition: the model and its functions.
            mesh: the ranks.
            device: where this rank computes.
            strategy: zero1, zero2, zero3 or hsdp.
            buckets: the model's parameters, all of them.
            bucket_elements: size of all buckets but those of one parameter.
            build_optimizer: called once, with this rank's runs of the parameters: with an elementwise optimizer.
            loss_scaler: for fp16; None elsewhere.
        """
        group = mesh.shard_group
        self._gathers = ParameterGathers(definition.model, buckets, group)
        self._is_whole_between_steps = strategy in ("zero1", "zero2")
        # Where blocks are gathered during a pass, gradients that not every rank has leave at other moments between the
        # gathers on each rank: each of both kinds is in order, but not the two together.
        self._gradients = GradientBuckets(
            buckets.groups,
            group if self._is_whole_between_steps else _same_ranks(group),
            mesh,
            bucket_elements,
            keeps_whole=strategy == "zero1",
            filled=self._gathers.leave,
            before_sending=self._gathers.come_to,
        )
        # By id: this rank's run of a parameter as the optimizer gets it, and the run's start in the parameter.
        self._runs: dict[int, tuple[nn.Parameter, int]] = {}
        no_gradients = [None] * len(buckets.frozen)
        for bucket, gradient in zip(
            [*buckets.trained, *buckets.frozen], [*self._gradients.own, *no_gradients], strict=True
        ):
            for member in bucket.members:
                offset, size, start = bucket.run(member)
                run = nn.Parameter(bucket.masters[offset : offset + size], requires_grad=gradient is not None)
                run.grad = None if gradient is None else gradient[offset : offset + size]
                self._runs[id(member.parameter)] = run, start
        self._has_gradients = False
        super().__init__(definition, mesh, device, None, build_optimizer, loss_scaler)
        self._reached = ReachedParameters([entry.parameter for entry in self._trainable], mesh.reduction_group)

    def step(self, learning_rate: float) -> torch.Tensor:
        """See Engine."""
        self._gathers.wait()
        stepped = super().step(learning_rate)
        self._gathers.start()
        return stepped

    def settle(self) -> None:
        """See Engine; the gathering after a step, and the exchange of what was reached before it."""
        self._gathers.wait()
        super().settle()

    def drop_gradients(self) -> None:
        """See Engine."""
        self._gradients.forget()
        self._has_gradients = False

    def state(self, *, with_optimizer: bool) -> list[Part]:
        """See Engine."""
        self.settle()
        return super().state(with_optimizer=with_optimizer)

    def load_state(self, read: Callable[[Part], None], *, with_optimizer: bool) -> None:
        """See Engine; every rank must call it."""
        self._gathers.wait()
        super().load_state(read, with_optimizer=with_optimizer)
        self._gathers.start(with_frozen=True)

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """See Engine; a flat run of the parameter's elements."""
        return {name: self._runs[id(parameter)][0].detach() for name, parameter in self._named()}

    def named_local_gradients(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        self._divide_gradients()
        return {entry.name: entry.local.grad for entry in self._trainable if entry.local.grad is not None}

    def replicas(self) -> list[Part]:
        """See Engine; in stages 1 and 2 every rank computes with all parameters, gathered after each step."""
        named = self.named_parameters()
        if self._is_whole_between_steps:
            return [self._part(name, parameter) for name, parameter in named]
        copies = self._mesh.shard_holder.degree > 1
        return [self._run_part(parameter, name) for name, parameter in named] if copies else []

    def named_parameters(self) -> list[tuple[str, Any]]:
        """See Engine; in the format in which it computes, in stage 3 without values where they are not gathered."""
        self._gathers.wait()
        return self._named()

    def _evaluate_batch(self, batch: Batch) -> torch.Tensor:
        self._gathers.begin_pass(has_gradients=False)
        sums = super()._evaluate_batch(batch)
        self._gathers.end_pass()
        return sums

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._model.named_parameters())

    @contextmanager
    def _accumulation_context(self, *, is_last: bool) -> Iterator[None]:
        self._gathers.begin_pass(has_gradients=True)
        self._gradients.begin_micro_batch(is_first=not self._has_gradients, is_last=is_last)
        yield
        # Not where the pass failed: other ranks may not come to these collectives.
        self._gradients.end_micro_batch(is_last=is_last)
        self._gathers.end_pass()
        self._has_gradients = True

    def _backward(self, loss: torch.Tensor) -> None:
        if not self._is_whole_between_steps:
            # A rank that waited for gradients that do not come would keep the others from what they wait for.
            self._gathers.end_forward()
            loss.register_hook(lambda _: self._gradients.expect_reached())
        super()._backward(loss)

    def _local_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._runs[id(parameter)][0]

    def _give_gradients_to_optimizer(self) -> None:
        """Nothing: the runs' gradients are the buckets' memory."""

    def _gradient_pieces(self) -> list[tuple[Part, torch.Tensor]]:
        """See TorchEngine; in rows."""
        pairs = zip(self._optimized, self._trainable, strict=True)
        return [(part, piece) for part, entry in pairs for piece in _rows(entry.local.grad) if piece.numel()]

    def _model_parts(self) -> list[Part]:
        persistent = set(self._model.state_dict().keys())
        buffers = [(name, buffer) for name, buffer in self._model.named_buffers() if name in persistent]
        runs = [self._run_part(parameter, f"{MODEL_PREFIX}{name}") for name, parameter in self._named()]
        return runs + [
            self._part(f"{MODEL_PREFIX}{name}", buffer, index) for index, (name, buffer) in enumerate(buffers)
        ]

    def _optimized_parts(self) -> list[Part]:
        return [replace(self._run_part(entry.parameter, entry.name), tensor=entry.local) for entry in self._trainable]

    def _run_part(self, parameter: nn.Parameter, name: str) -> Part:
        run, start = self._runs[id(parameter)]
        part = part_of_run(name, run.detach(), tuple(parameter.shape), start, self._mesh.shard_group)
        return replace(part, holders=self._mesh.shard_holder)


def _same_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Another group of the same ranks; those of other groups have no part in it."""
    if group is None:
        return None
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)


def _rows(run: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """A flat run as rows that are short enough for sums in fp32, and what is left at its end."""
    if run is None:
        return ()
    whole = run.numel() // _ROW * _ROW
    return run[:whole].view(-1, _ROW), run[whole:]
