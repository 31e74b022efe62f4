"""`python -m snapengine.guest`."""

import sys

from snapengine.guest.main import main

sys.exit(main())
