"""Optimizers: their settings (`trainer.optimizers.config` loads no torch), groups, and those that torch has not."""
