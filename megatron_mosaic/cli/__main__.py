"""`python -m megatron_mosaic.cli` is `mosaic`."""

import sys

from megatron_mosaic.cli import main

sys.exit(main())
