"""``python -m rftt_lightning`` is ``rftt``."""

import sys

from rftt_lightning.app.cli import main

sys.exit(main())
