"""A program with two processes, one of which has nothing to do: `python calling.py LOG_FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path

from processes import parallel


def outlast_a_signal(seconds):
    """As a run does, which saves and raises SystemExit."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        time.sleep(seconds)
    finally:
        signal.signal(signal.SIGTERM, before)
    return seconds


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    for _ in parallel(outlast_a_signal, [0, 300], 2, Path(sys.argv[1])):
        os.write(1, b"ready")
