"""`python -m softlabels` is the command `softlabels`."""

import sys


def main() -> None:
    """What the installed `softlabels` calls: nothing is imported before a Ctrl-C is answered."""
    try:
        from softlabels.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
