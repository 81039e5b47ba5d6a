"""`kvstrata bench select`, as a file of this folder.

Not called select.py: a script's folder comes first in the search for modules, and Python has a module `select` of its own.
"""

import sys

from kvstrata.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "select", *sys.argv[1:]]))
