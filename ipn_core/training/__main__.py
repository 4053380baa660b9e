"""`python -m ipn_core.training CONFIG …`: what `ipn train` does, for launchers of processes.

For instance `accelerate launch -m ipn_core.training CONFIG`, in one process or on many machines.
"""

import sys

from ipn_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
