"""`python -m effnet_fast.cli` is `effnet-fast`."""

import sys

from effnet_fast.cli import main

sys.exit(main())
