"""What a user may write: sections, the rules that span them, and loading. Imports no torch and no other room."""

from trainer.config.load import OwnNames, config_to_yaml, load_config, load_frozen_config, parse_config
from trainer.config.schema import RunConfig

__all__ = ["OwnNames", "RunConfig", "config_to_yaml", "load_config", "load_frozen_config", "parse_config"]
