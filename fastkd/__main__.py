"""`python -m fastkd`: the command line."""

import sys

from fastkd.cli import main

sys.exit(main())
