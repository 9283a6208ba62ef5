"""From a name to a configuration of `transformers`, initial values, what `transformers` raises."""
