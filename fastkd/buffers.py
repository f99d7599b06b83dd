"""Another name of `fastkd.backends.buffers`."""

import sys

from fastkd.backends import buffers

sys.modules[__name__] = buffers
