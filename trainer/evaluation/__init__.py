"""Judging finished weights: a run's checkpoint or an exported model, on a split or on files."""
