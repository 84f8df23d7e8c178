"""The errors that are this package's own."""

__all__ = ["InputError", "VerificationError", "one_line"]


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line: what was given, what is allowed, what to do."""


class VerificationError(RuntimeError):
    """A model does not apply the ALiBi bias as its config says; the message names the layer."""


def one_line(error: BaseException) -> str:
    """Return an exception's message without its line breaks, or its name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
