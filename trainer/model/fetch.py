"""Files of a pretrained model: downloaded by one rank of each node, while the others wait."""

from pathlib import Path

from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks

_PATTERNS = ["*.safetensors", "*.json", "*.py"]


def fetch_pretrained(name: str, ranks: Ranks, setting: str = "model.pretrained") -> str:
    """The folder of a pretrained model on this node; every rank must call it.

    Ranks wait for the slowest node as long as ``launch.init_timeout_s`` says.

    Args:
        name: a folder, or the name of a model of the hub.
        ranks: this rank's place.
        setting: what names it, to speak of.

    Raises:
        UserError: a rank cannot have it; all ranks say so.
    """
    folder = ""
    # First those that download, one on each node, then those that find what is there.
    for takes_part, may_download in ((ranks.local_rank == 0, True), (ranks.local_rank != 0, False)):
        error = None
        if takes_part:
            try:
                folder = _find(name, may_download)
            except Exception as failure:  # noqa: BLE001 - whatever it is must reach the ranks that wait
                lines = str(failure).splitlines()
                error = f"rank {ranks.rank}: {lines[0] if lines else type(failure).__name__}"
        errors = [error for error in gather_objects(error, ranks) if error is not None]
        if errors:
            raise UserError(
                f"{setting}={name} is neither a folder nor to be had ({errors[0]}); check the name, and the way "
                "to the hub of each node, or download it to a folder that all nodes see."
            )
    return folder


def _find(name: str, may_download: bool) -> str:
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=not may_download)
