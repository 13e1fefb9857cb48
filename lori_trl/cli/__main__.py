"""`python -m lori_trl.cli`, as accelerate starts it on several processes."""

import sys

from . import main

sys.exit(main())
