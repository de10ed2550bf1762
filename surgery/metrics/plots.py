"""Whether pictures can be drawn here."""

from __future__ import annotations

from surgery.errors import MissingPackage


def require_plots(what: str, extra: str = "plots") -> None:
    """Raise MissingPackage before long work where a picture could not be drawn after it; `what` needs it."""
    try:
        import matplotlib  # noqa: F401, ICN001 - only whether it is there
    except ImportError as error:
        raise MissingPackage(
            f"{what} with matplotlib, which is not installed", cause=str(error),
            remedy=f"pip install 'surgery[{extra}]'",
        ) from error  # fmt: skip
