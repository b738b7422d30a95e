"""Commands that cli.py registers, one a module."""
