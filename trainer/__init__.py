"""One rank's work: configuration, data, model, step loop, metrics, checkpoints."""
