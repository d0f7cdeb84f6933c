"""Reading, checking and writing configs.

`load_config` and `load_one` read files, `parse_config` takes maps, `dump_config` writes a config with every default
filled in.
"""

from arraytp.config.load import config_schema, dump_config, load_config, load_one, parse_config
from arraytp.config.resolve import ConfigFile
from arraytp.config.schema import Compare, Config, Data, Loss, Normalize, Study, Train

__all__ = [
    "Compare",
    "Config",
    "ConfigFile",
    "Data",
    "Loss",
    "Normalize",
    "Study",
    "Train",
    "config_schema",
    "dump_config",
    "load_config",
    "load_one",
    "parse_config",
]
