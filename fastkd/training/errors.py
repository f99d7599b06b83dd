"""What the command line says when something cannot work."""


class InputError(ValueError):
    """What the user asked for cannot work; raised before any training, and says what would. One
    line."""
