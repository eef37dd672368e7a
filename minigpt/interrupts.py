"""Ctrl-C while `minigpt` is still importing, which takes seconds: a sentence. Imported before all that takes long."""

import os
import signal
import sys
from pathlib import Path


def _leave(*_: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


# Nobody else's program is touched; `cli.run` makes an interrupt an exception again.
if sys.argv and Path(sys.argv[0]).stem == "minigpt" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
