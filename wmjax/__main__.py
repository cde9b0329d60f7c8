"""`python -m wmjax` is the command `wmjax`."""

import signal
import sys


def main() -> int:
    """The command. An interrupt while its code is being read ends the process without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from wmjax.cli import main as command

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    return command()


if __name__ == "__main__":
    sys.exit(main())
