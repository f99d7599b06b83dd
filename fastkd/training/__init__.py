"""The command line's settings, data, models, output folder and run."""
