"""`python -m fastapd`."""

import sys

from fastapd.cli import main

sys.exit(main())
