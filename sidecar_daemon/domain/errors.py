"""Whose fault it is: the world's (``Transient``), the message's (``Poison``) or ours (``Fatal``).

The message of every error is safe to log: it never carries document text, a password or a connection string.
"""

from __future__ import annotations


class SidecarError(Exception):
    """An error that this project names. ``code`` is a stable, lower-case reason for logs and metrics."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Transient(SidecarError):  # noqa: N818  the design's word
    """The world's fault: an outage, a lock, a full disk, a revoked grant. Wait and try again; blame no message."""


class Refused(Transient):
    """The database says that this replica must not work on this pipeline now (other model, paused, detached)."""


class Poison(SidecarError):  # noqa: N818  the design's word
    """The message's fault: this document, tried alone, cannot be embedded or stored."""


class Fatal(SidecarError):  # noqa: N818  the design's word
    """Ours, or the operator's, to mend: bad configuration, missing model, wrong schema. Ends with one clear line."""
