"""Adds `slim` to `optimum-cli`, which imports this file for each of its commands.

The command's parser is loaded by path, because importing `optimum_slim` imports torch. An exception here would break
every `optimum-cli` command, so whatever is wrong with our package, the list stays empty instead.
"""

import importlib.util
import logging
from pathlib import Path


REGISTER_COMMANDS = []

try:
    _package = importlib.util.find_spec("optimum_slim")
    _file = Path(_package.submodule_search_locations[0]) / "cli.py"
    _spec = importlib.util.spec_from_file_location("optimum_slim_cli", _file)
    _cli = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_cli)
    REGISTER_COMMANDS.append(_cli.optimum_command())
except Exception as error:
    logging.getLogger(__name__).debug("optimum-cli slim is not available: %s", error)
