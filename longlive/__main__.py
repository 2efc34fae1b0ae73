"""`python -m longlive`."""

import sys

from longlive.cli import main

sys.exit(main())
