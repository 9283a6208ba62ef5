"""Bytes that a rank holds of a model's state when it holds most; pure arithmetic, imports no torch.

Stages as in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section
5, for fp32 masters, gradients and optimizer state, to which the whole parameters that a stage gathers for computing and
what is on its way between ranks are added. docs/benchmarks.md has the same as a table.
"""

from dataclasses import dataclass

from sharding.config import Strategy

_FP32_BYTES = 4

BUCKET_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Size of the bucketed engine's buckets by device: a network of GPUs needs larger pieces for its full rate."""

_RANKS_OF_A_BUCKET, _LARGEST_GROWTH = 8, 4

MAX_BUCKETS_IN_FLIGHT = 4
"""Sums of buckets that may be under way at a time; each holds one or two times a bucket's size."""


def bucket_elements(device_type: str, num_shards: int) -> int:
    """Size of the bucketed engine's buckets.

    What goes from one rank to another is a bucket's slice, so buckets grow with the ranks beyond a node's; up to four
    times, since memory for what is under way grows with them.

    Args:
        device_type: of ``BUCKET_ELEMENTS``.
        num_shards: ranks that divide each bucket.
    """
    growth = min(max(num_shards // _RANKS_OF_A_BUCKET, 1), _LARGEST_GROWTH)
    return BUCKET_ELEMENTS[device_type] * growth


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of elements: of what is trained, unless an attribute says that it is of what is frozen too.

    Attributes:
        num_parameters: all, shared ones once.
        num_outside_blocks: those in no block: embeddings, last norm, head.
        largest_block: those of the block that has most.
        largest_parameter: those of the largest single parameter.
        largest_shared: those of the largest parameter that several modules use, as an embedding tied to the head.
        num_frozen: frozen ones, which have neither gradients nor optimizer state.
        num_frozen_outside_blocks: frozen ones in no block.
        largest_gathered_block: all of the largest block, frozen or not; 0 where it is ``largest_block``.
        num_embedding: those of an embedding, frozen or not, that is not the output projection too, and which
            ``fully_shard`` so gathers by itself; 0 where there is none.
        num_trained_embedding: those of it that are trained.
    """

    num_parameters: int
    num_outside_blocks: int
    largest_block: int
    largest_parameter: int
    largest_shared: int = 0
    num_frozen: int = 0
    num_frozen_outside_blocks: int = 0
    largest_gathered_block: int = 0
    num_embedding: int = 0
    num_trained_embedding: int = 0

    @property
    def num_held(self) -> int:
        """All parameters, trained or not."""
        return self.num_parameters + self.num_frozen

    @property
    def num_gathered_by_block(self) -> int:
        """What is in no block but an embedding by itself, a block, and the next one to come."""
        outside = self.num_outside_blocks + self.num_frozen_outside_blocks - self.num_embedding
        return outside + 2 * max(self.largest_block, self.largest_gathered_block)


@dataclass(frozen=True)
class Layout:
    """How a state lies on ranks.

    Attributes:
        strategy: data-parallel method.
        num_shards: ranks that divide the state; all ranks, or those of one replica under hsdp.
        is_bucketed: whether ``parallel.backend`` is ``bucketed``.
        accumulation_steps: micro-batches of one rank in one step.
        compute_bytes: bytes of an element in matrix products: 4 in fp32, 2 in 16 bits.
        moment_bytes: bytes of optimizer state per parameter: 8 for AdamW.
        bucket_elements: see ``bucket_elements``; read under ``is_bucketed`` alone.
    """

    strategy: Strategy
    num_shards: int
    is_bucketed: bool = False
    accumulation_steps: int = 2
    compute_bytes: int = 4
    moment_bytes: float = 8.0
    bucket_elements: int = BUCKET_ELEMENTS["cpu"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank at the moment of a step at which their sum is largest.

    Attributes:
        masters: this rank's fp32 parameters, frozen ones among them.
        gathered: whole parameters as they are used in computing, where they are not the masters themselves.
        gradients: fp32 gradients that are kept for the step.
        moments: optimizer state.
        in_flight: whole gradients of what backward has just come to, and what is sent of them.
    """

    masters: float
    gathered: float
    gradients: float
    moments: float
    in_flight: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.masters + self.gathered + self.gradients + self.moments + self.in_flight


@dataclass(frozen=True)
class FrozenBytes:
    """Bytes of one rank for a model that is only run, beside the one that is trained.

    Attributes:
        held: this rank's fp32 parameters.
        gathered: whole parameters as they are used in computing, where they are not those; only while it runs.
    """

    held: float
    gathered: float


def frozen_bytes(sizes: ModelSizes, layout: Layout) -> FrozenBytes:
    """Bytes of a model that ``sharding.frozen_model`` builds, without activations.

    Args:
        sizes: of that model.
        layout: of the model that is trained beside it.
    """
    if layout.strategy in ("none", "ddp"):
        return FrozenBytes(_FP32_BYTES * sizes.num_held, _copies(sizes, layout))
    held = _FP32_BYTES * sizes.num_held / layout.num_shards
    return FrozenBytes(held, layout.compute_bytes * sizes.num_gathered_by_block)


def state_bytes(sizes: ModelSizes, layout: Layout) -> StateBytes:
    """Bytes of a rank's state at their peak, without activations."""
    if layout.strategy in ("none", "ddp"):
        return _whole(sizes, layout)
    if layout.is_bucketed:
        return _bucketed(sizes, layout)
    if layout.strategy in ("zero1", "zero2"):
        return _gathered_once(sizes, layout)
    return _gathered_by_block(sizes, layout)


def _whole(sizes: ModelSizes, layout: Layout) -> StateBytes:
    """Everything on every rank."""
    fp32 = _FP32_BYTES * sizes.num_parameters
    moments = layout.moment_bytes * sizes.num_parameters
    # Autograd adds the gradients of a shared parameter's uses into a third tensor.
    in_flight = layout.compute_bytes * (_new_gradients(sizes) + sizes.largest_shared)
    if layout.compute_bytes != _FP32_BYTES:
        # It is converted before it is added to what is accumulated.
        in_flight += _FP32_BYTES * sizes.largest_parameter
    return StateBytes(_FP32_BYTES * sizes.num_held, _copies(sizes, layout), fp32, moments, in_flight)


def _bucketed(sizes: ModelSizes, layout: Layout) -> StateBytes:
    """Buckets of parameters in the format of computation, beside this rank's slices in fp32."""
    frees_blocks = layout.strategy in ("zero3", "hsdp")
    masters = _FP32_BYTES * sizes.num_held / layout.num_shards
    outside = sizes.num_outside_blocks + sizes.num_frozen_outside_blocks
    block = max(sizes.largest_block, sizes.largest_gathered_block)
    # In stage 3 the first block stays as well, beside the one that computes and the next one to come.
    staying = outside + block if frees_blocks else sizes.num_held
    whole = min(staying + 2 * block, sizes.num_held) if frees_blocks else staying
    gathered = float(layout.compute_bytes * whole)
    if layout.compute_bytes == _FP32_BYTES:
        # Of what stays the masters are a slice.
        gathered -= _FP32_BYTES * staying / layout.num_shards
    own = _FP32_BYTES * sizes.num_parameters / layout.num_shards
    new_gradients = layout.compute_bytes * _new_gradients(sizes)
    bucket = layout.bucket_elements
    # Under way are a bucket and where slices of other ranks arrive; stage 1 sends the gradients themselves. A parameter
    # that is larger than a bucket travels by itself; memory of other buckets is kept for the next ones meanwhile.
    copies = 1 if layout.strategy == "zero1" else 2
    num_buckets = _num_buckets(sizes, layout)
    in_flight = copies * min(MAX_BUCKETS_IN_FLIGHT, num_buckets) * bucket
    if sizes.largest_parameter > bucket:
        in_flight += copies * sizes.largest_parameter
    if layout.strategy != "zero1":
        # Buckets of the block that backward is in, at whose ends are parameters of its neighbours in stage 2.
        num_shared = 2 if layout.strategy == "zero2" else 0
        in_flight += min(-(-sizes.largest_block // bucket) + num_shared, num_buckets) * bucket
    return StateBytes(
        masters=masters,
        gathered=gathered,
        gradients=_FP32_BYTES * sizes.num_parameters if layout.strategy == "zero1" else own,
        moments=layout.moment_bytes * sizes.num_parameters / layout.num_shards,
        in_flight=_FP32_BYTES * in_flight + new_gradients,
    )


def _num_buckets(sizes: ModelSizes, layout: Layout) -> int:
    """How many buckets there are of what is trained; each takes memory of a whole bucket on its way, however small."""
    bucket = layout.bucket_elements
    if layout.strategy in ("zero1", "zero2"):
        return -(-sizes.num_parameters // bucket)
    # Each block has buckets of its own.
    in_blocks = sizes.num_parameters - sizes.num_outside_blocks
    of_block = max(min(bucket, sizes.largest_block), 1)
    return -(-in_blocks // of_block) - (-sizes.num_outside_blocks // bucket)


def _gathered_once(sizes: ModelSizes, layout: Layout) -> StateBytes:
    """``fully_shard`` as stages 1 and 2: all is gathered from the first forward pass to the last backward pass."""
    shards, width = layout.num_shards, layout.compute_bytes
    own, masters = _FP32_BYTES * sizes.num_parameters / shards, _FP32_BYTES * sizes.num_held / shards
    gathered = width * sizes.num_held
    if layout.accumulation_steps == 1:
        # Backward frees parameters as gradients arrive: most is held when it begins.
        gradients, in_flight = 0.0, _in_block(sizes, layout)
    elif layout.strategy == "zero1":
        gradients, in_flight = _FP32_BYTES * sizes.num_parameters, width * _new_gradients(sizes)
    else:
        gradients, in_flight = own, max(_in_block(sizes, layout), _outside_blocks(sizes, layout))
    return StateBytes(masters, gathered, gradients, layout.moment_bytes * sizes.num_parameters / shards, in_flight)


def _gathered_by_block(sizes: ModelSizes, layout: Layout) -> StateBytes:
    """``fully_shard`` as stage 3 and hsdp: gathered are what is in no block, a block, and the next one to come.

    An embedding by itself is gone once tokens are looked up.
    """
    own, masters = (
        _FP32_BYTES * sizes.num_parameters / layout.num_shards,
        _FP32_BYTES * sizes.num_held / layout.num_shards,
    )
    moments = layout.moment_bytes * sizes.num_parameters / layout.num_shards
    gathered = layout.compute_bytes * sizes.num_gathered_by_block
    # Where a block is mostly frozen, less is held of gradients than while one more block arrives.
    arriving = layout.compute_bytes * (_head(sizes) + max(sizes.largest_block, sizes.largest_gathered_block))
    in_flight = max(_in_block(sizes, layout), float(arriving))
    in_block = StateBytes(masters, gathered, own, moments, in_flight)
    at_end = StateBytes(masters, 0.0, own, moments, _outside_blocks(sizes, layout))
    return max(in_block, at_end, key=lambda state: state.total)


def _copies(sizes: ModelSizes, layout: Layout) -> float:
    """What a model computes with in place of whole fp32 parameters: copies of all, frozen ones too, in 16 bits."""
    return 0.0 if layout.compute_bytes == _FP32_BYTES else float(layout.compute_bytes * sizes.num_held)


def _new_gradients(sizes: ModelSizes) -> int:
    """Elements of a gradient before it is added to the old one; of a shared parameter the first one waits for it."""
    return sizes.largest_parameter + sizes.largest_shared


def _in_block(sizes: ModelSizes, layout: Layout) -> float:
    """Inside a block's backward pass: its gradients, those of the block before on their way, and the head's.

    The head's have left by then where it is not the embedding too.
    """
    return layout.compute_bytes * (_head(sizes) + sizes.largest_block) + _FP32_BYTES * sizes.largest_block


def _head(sizes: ModelSizes) -> int:
    return 0 if sizes.num_embedding else min(sizes.num_outside_blocks, sizes.largest_parameter)


def _outside_blocks(sizes: ModelSizes, layout: Layout) -> float:
    """Where what is in no block is reduced: its gradients, their copy on its way, and its sum.

    At the end of a backward pass; of a head by itself at the beginning, and of its embedding at the end.
    """
    largest = max(sizes.num_trained_embedding, sizes.num_outside_blocks - sizes.num_trained_embedding)
    return (layout.compute_bytes + _FP32_BYTES + _FP32_BYTES / layout.num_shards) * largest
