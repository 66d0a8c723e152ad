"""Run the command line as ``python -m migkit``."""

import sys

from migkit.cli import main

sys.exit(main())
