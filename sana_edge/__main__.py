"""``python -m sana_edge`` and the ``sana-edge`` command, which Ctrl-C ends from the first moment on."""

from __future__ import annotations

import signal
import sys
import threading


def main() -> int:
    """Import and run `sana_edge.cli.main.main`; returns its exit code."""
    mine = threading.current_thread() is threading.main_thread()
    # unless the shell has it ignored, as in the background
    early = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if early:
        # in the middle of an import a KeyboardInterrupt would be a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sana_edge.cli.main import main

    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    sys.exit(main())
