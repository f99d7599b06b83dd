"""Another name of `fastkd.backends.eager_topk`."""

import sys

from fastkd.backends import eager_topk

sys.modules[__name__] = eager_topk
