"""From a name to a model of `transformers`: its configuration, its initial values, what it raises."""
