"""`python -m snapengine.cli`."""

import sys

from snapengine.cli import main

sys.exit(main())
