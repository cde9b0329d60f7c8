"""`python -m wmjax` is the command `wmjax`."""

import sys

from wmjax.cli import main

sys.exit(main())
