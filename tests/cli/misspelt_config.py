"""A config file of one's own, with a field that there is not."""

from ml_collections import ConfigDict

from configs import synthetic_tiny


def get_config() -> ConfigDict:
  c = synthetic_tiny.get_config()
  c.bach_size = 2
  return c
