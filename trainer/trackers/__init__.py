"""Where metrics go besides metrics.jsonl; a tracker that fails never stops training."""
