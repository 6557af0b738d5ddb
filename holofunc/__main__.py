"""``python -m holofunc`` is ``holofunc``."""

import sys

from holofunc.cli import main

sys.exit(main())
