"""The one exception raised for input that cannot be used."""


class InputError(ValueError):
    """What came, what was expected, and what to do, in one message."""
