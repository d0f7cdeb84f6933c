"""The program `arraytp`, also as `python -m arraytp`."""

import importlib
import signal
import sys


def main() -> int:
    """Run the command line and return the exit status; Ctrl-C while the rest is loading ends the process silently."""
    answered = signal.getsignal(signal.SIGINT)
    # Not where it is ignored, as for a process that a shell has put into the background.
    loading = answered if answered is signal.SIG_IGN else signal.SIG_DFL
    signal.signal(signal.SIGINT, loading)
    cli = importlib.import_module("arraytp.cli")
    signal.signal(signal.SIGINT, answered)
    status: int = cli.main()
    signal.signal(signal.SIGINT, loading)
    return status


if __name__ == "__main__":
    sys.exit(main())
