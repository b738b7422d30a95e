"""`python -m softlabels` is the command `softlabels`."""

from softlabels.cli import main

if __name__ == "__main__":
    main()
