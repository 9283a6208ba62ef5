"""Shardline for Python: runs, their results, and the parts of which a loop of one's own is made; docs/python.md.

Names are imported when they are first used, so that ``import shardline`` is quick and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shardline.own_packages import load_own_packages

load_own_packages()

if TYPE_CHECKING:
    from sharding.build_engine import build_engine
    from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, PrecisionConfig
    from sharding.engine import Batch, Engine, ModelDefinition
    from sharding.mesh import ParallelMesh, build_mesh
    from sharding.part import Part
    from sharding.ranks.errors import RunFailure, UserError
    from sharding.ranks.process_group import Ranks, process_group
    from shardline.run import Run
    from shardline.training import load_config, train
    from trainer.architectures.initialization import initialize_module
    from trainer.architectures.networks import build_network
    from trainer.config import RunConfig
    from trainer.data.facts import SampleFacts
    from trainer.data.samples import FILLER, Samples
    from trainer.deploy.generation import Sampling
    from trainer.ending import TrainingResult
    from trainer.tasks.registry import build_task
    from trainer.tasks.task import Metric, Outputs, Task
    from trainer.trackers.observer import Observer

_PLACES = {
    "shardline.run": ("Run",),
    "shardline.training": ("load_config", "train"),
    "sharding.build_engine": ("build_engine",),
    "sharding.config": ("ActivationCheckpointingConfig", "CompileConfig", "ParallelConfig", "PrecisionConfig"),
    "sharding.engine": ("Batch", "Engine", "ModelDefinition"),
    "sharding.mesh": ("ParallelMesh", "build_mesh"),
    "sharding.part": ("Part",),
    "sharding.ranks.errors": ("RunFailure", "UserError"),
    "sharding.ranks.process_group": ("Ranks", "process_group"),
    "trainer.architectures.initialization": ("initialize_module",),
    "trainer.architectures.networks": ("build_network",),
    "trainer.config": ("RunConfig",),
    "trainer.data.facts": ("SampleFacts",),
    "trainer.data.samples": ("FILLER", "Samples"),
    "trainer.deploy.generation": ("Sampling",),
    "trainer.ending": ("TrainingResult",),
    "trainer.tasks.registry": ("build_task",),
    "trainer.tasks.task": ("Metric", "Outputs", "Task"),
    "trainer.trackers.observer": ("Observer",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "ActivationCheckpointingConfig",
    "Batch",
    "CompileConfig",
    "Engine",
    "FILLER",
    "Metric",
    "ModelDefinition",
    "Observer",
    "Outputs",
    "ParallelConfig",
    "ParallelMesh",
    "Part",
    "PrecisionConfig",
    "Ranks",
    "Run",
    "RunConfig",
    "RunFailure",
    "SampleFacts",
    "Samples",
    "Sampling",
    "Task",
    "TrainingResult",
    "UserError",
    "build_engine",
    "build_mesh",
    "build_network",
    "build_task",
    "initialize_module",
    "load_config",
    "process_group",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'shardline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
