"""From a corpus to batches: preparation, packed shards, sample order, loader."""
