"""What a check says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """Verdict of one check; `value` is held against `limit` where the check measures something."""

    status: Literal["pass", "fail", "skip"]
    detail: str = ""
    value: float | None = None
    limit: float | None = None


def passed(detail: str = "") -> Outcome:
    """The check holds."""
    return Outcome("pass", detail)


def failed(detail: str) -> Outcome:
    """The check does not hold."""
    return Outcome("fail", detail)


def skipped(reason: str) -> Outcome:
    """The check says nothing here, and why."""
    return Outcome("skip", reason)


def verdict(problems: list[str], detail: str = "") -> Outcome:
    """Fails with the first few problems, passes where there is none."""
    if not problems:
        return passed(detail)
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return failed("; ".join(problems[:5]) + more)


def bounded(value: float, limit: float, detail: str) -> Outcome:
    """Passes where `value` is at most `limit`; nan is at most nothing."""
    status: Literal["pass", "fail"] = "pass" if value <= limit else "fail"
    shown = value if math.isfinite(value) else None
    return Outcome(status, f"{detail}: {value:.3g}, limit {limit:.3g}", shown, limit)
