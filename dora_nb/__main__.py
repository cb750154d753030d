"Run the command: `python -m dora_nb` is `dora-nb`."

import signal
import sys


def main() -> int:
    "Run the command and return its exit status; Ctrl-C is answered in a line, whenever it comes."
    try:
        from dora_nb.command.main import main as command

        status = command()
    except KeyboardInterrupt:
        print("dora-nb: interrupted", file=sys.stderr)
        status = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to be interrupted
    return status


if __name__ == "__main__":
    sys.exit(main())
