"""What a rank that no launcher of ours has started finds out before a corpus is read."""

from pathlib import Path

from sharding.parallel_dims import parallel_dims
from trainer.checkpoint.reference import check_source
from trainer.checkpoint.token_ids import check_named_tokenizer
from trainer.config import RunConfig
from trainer.config.rules import World
from trainer.config.stages import stages_of, widest_config
from trainer.data.expected_facts import expected_facts
from trainer.data.prepare_rows import check_first_row
from trainer.data.tokenizer import TRAINED
from trainer.model.trial import try_model
from trainer.run_folder.folder import RunFolder
from trainer.tasks.monitor import check_monitor
from trainer.tasks.registry import configured_task


def check_before_reading(config: RunConfig, world: World, run_folder: RunFolder, rank: int) -> None:
    """Check what a run begins from and whether its model can be built, which is found before hours of reading.

    Args:
        config: the run, of which something is yet to be prepared.
        world: its ranks.
        run_folder: where it lives.
        rank: this one. Where something is to be fetched, only rank 0 may be able to.

    Raises:
        UserError: something does not fit.
    """
    if config.data.source == "factory" or (rank and _fetches(config)):
        return
    check_source(config, run_folder)
    config = widest_config(config)
    if config.data.has_rows:
        check_first_row(config.data)
        return
    if config.checkpoint.from_ is None and run_folder.newest_checkpoint() is None:
        check_named_tokenizer(config)
    facts = expected_facts(config.data)
    task = configured_task(config.task, facts)
    check_monitor(config, task)
    try_model(config, task, facts, parallel_dims(config.parallel, world.num_ranks))


def _fetches(config: RunConfig) -> bool:
    data = [stage.config.data for stage in stages_of(config)]
    named = {config.model.pretrained, *(one.tokenizer for one in data)} - {None, TRAINED}
    return any(one.source == "hub" for one in data) or any(not Path(str(name)).is_dir() for name in named)
