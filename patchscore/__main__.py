"""python -m patchscore: the command line."""

import sys

from patchscore.cli import main

sys.exit(main())
