"""``python -m matvlm``: see ``matvlm.cli``."""

import sys

from matvlm.cli import main

sys.exit(main())
