"""The one error of this package."""

from __future__ import annotations


class ProfileError(ValueError):
    """A board or fleet profile does not exist or is wrong; the text is one line."""
