"""From a name to a model that an engine holds."""
