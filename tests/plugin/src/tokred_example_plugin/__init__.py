"""A plug-in for tokred: one method, `every_other`, and one pass, `drop_idle_dropout`.

tokred imports this module because of the entry point in pyproject.toml; the decorators do the rest.
"""

from tokred_example_plugin.drop_idle_dropout import drop_idle_dropout
from tokred_example_plugin.every_other import EveryOther

__all__ = ["EveryOther", "drop_idle_dropout"]
