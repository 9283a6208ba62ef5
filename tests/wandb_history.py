"""What wandb's own files hold, for tests."""

import json
from typing import Any

from trainer.trackers.wandb_files import metric_name


def history_values(history: Any) -> dict[str, Any]:
    """What a history record logs, by metric name."""
    return {metric_name(item): json.loads(item.value_json) for item in history.item}
