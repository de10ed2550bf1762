"""What tests of commands that run a result share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("surgery.calibration.loading.causal_lm", loads)
