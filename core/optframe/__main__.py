"""`python -m optframe`."""

import sys

from optframe.cli import main

sys.exit(main())
