"""What torchrun starts for processes.runs_on_two_ranks: several jobs, one after the other, in the same ranks."""

from __future__ import annotations

import sys

from tunery.api import train

if __name__ == "__main__":
    for job in sys.argv[1:]:
        train(job)
