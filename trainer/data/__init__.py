"""From a source to micro-batches; knows no model."""
