"""Another name of `fastkd.backends.eager`."""

import sys

from fastkd.backends import eager

sys.modules[__name__] = eager
