"""python -m kvstrata.cli"""

import sys

from kvstrata.cli import main

sys.exit(main())
