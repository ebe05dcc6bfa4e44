"""`python -m ppo_dist` is `ppo-dist`."""

import sys

from ppo_dist.cli import main

sys.exit(main())
