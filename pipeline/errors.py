"""The one exception that means "you can mend this"."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and how to mend it.

    Jobs turn it into exit status 2, with nothing written. Everything else that goes wrong is status 1.
    """
