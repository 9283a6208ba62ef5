"""What is measured: by each rank of itself and its machine, and by ranks together."""

from sharding.strict_model import StrictRecord


class RankFacts(StrictRecord):
    """A rank's device and machine."""

    rank: int
    """Its number."""

    host: str
    """Its machine."""

    local_rank: int
    """Its number on that machine."""

    local_world_size: int
    """Ranks of that machine."""

    versions: dict[str, str]
    """Of what computes or communicates, by name."""

    device: str
    """Model of the GPU, or `cpu`."""

    num_gpus: int
    """GPUs that this rank can see."""

    gpu_troubles: list[str] = []
    """What the driver complains of on this machine's GPUs."""

    num_cores: int
    """Cores that the ranks of this machine may run on."""

    matmul_flops: float
    """Speed of a product of square matrices, in FLOP/s."""

    copy_bytes_per_s: float
    """Bytes read and written per second by a copy within the device's memory."""

    wall_clock_s: float
    """Seconds since 1970 at a moment that is the same on all ranks, to within a barrier's jitter."""

    sees_run_folder: bool
    """Whether a file that rank 0 wrote into the run folder is there."""

    free_bytes: int
    """Free space where the run folder is."""

    write_bytes_per_s: float | None
    """Speed of a synced write there; None where it could not be written."""

    write_error: str = ""
    """Why not."""

    shm_bytes: int
    """Size of /dev/shm."""

    num_files: int
    """Soft limit of open files."""

    locked_bytes: int | None
    """Soft limit of locked memory; None is unlimited."""

    unresolved: list[str] = []
    """Host names that could not be resolved."""


class Link(StrictRecord):
    """A pair of ranks that sent to one another at the same time."""

    first: int
    """The lower rank."""

    second: int
    """The higher rank."""

    bytes_per_s: float
    """In each direction."""


class Links(StrictRecord):
    """What ranks measured together."""

    all_reduce_bytes_per_s: float | None = None
    """Bus bandwidth of an all-reduce over all ranks, see `links.bus_bandwidth`; None of one rank."""

    all_reduce_bytes: int = 0
    """Size of that all-reduce."""

    pairs: list[Link] = []
    """Pairs of machines, or of ranks where there is one machine."""
