"""Teachers that all tests of distillation learn from."""

from pathlib import Path

import pytest

from tests.support import run_on_ranks, write_corpus
from tests.trainer.distillation.teachers import train_teachers


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs``, ``exported``, ``documents`` and ``cache``; see ``teachers.train_teachers``."""
    root = tmp_path_factory.mktemp("teachers")
    run_on_ranks(train_teachers, 1, root, write_corpus(root / "documents"))
    return root
