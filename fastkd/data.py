"""Another name of `fastkd.training.data`."""

import sys

from fastkd.training import data

sys.modules[__name__] = data
