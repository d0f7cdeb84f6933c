"""Entry point of `arraytp` and of `python -m arraytp`."""

import importlib
import signal
import sys


def main() -> int:
    """Run the command line and return the exit status; Ctrl-C during imports ends the process silently."""
    answered = signal.getsignal(signal.SIGINT)
    # An ignored SIGINT, as in a process that a shell has put into the background, stays ignored.
    loading = answered if answered is signal.SIG_IGN else signal.SIG_DFL
    signal.signal(signal.SIGINT, loading)
    cli = importlib.import_module("arraytp.cli")
    signal.signal(signal.SIGINT, answered)
    status: int = cli.main()
    signal.signal(signal.SIGINT, loading)
    return status


if __name__ == "__main__":
    sys.exit(main())
