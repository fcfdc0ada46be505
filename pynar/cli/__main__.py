"""`python -m pynar.cli`, for processes that `torchrun` starts."""

import sys

from pynar.cli import main

sys.exit(main())
