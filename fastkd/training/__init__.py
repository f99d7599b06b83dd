"""The command line's trainer."""
