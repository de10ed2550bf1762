"""Warnings that loading and running a checkpoint causes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("transformers", "transformers_modules", "compressed_tensors")

# What transformers says about itself, whatever the checkpoint.
ALLOWED = (
    # 5.x: assisted decoding calls generate for the draft with both, on every model.
    r"Passing `generation_config` together with generation-related arguments=\(\{.*min_new_tokens.*\}\)",
    r"Both `(max|min)_new_tokens` \(=\d+\) and `(max|min)_length`\(=\d+\) seem to have been set",
    # 4.48: qwen2_moe takes a cache that is not there yet for a tuple.
    r"We detected that you are passing `past_key_values` as a tuple",
    # 4.48: StaticCache reads its own deprecated attribute.
    r"The 'batch_size' attribute of StaticCache is deprecated",
    # gptqmodel 7.6, of its own source, names and folders, while it is imported and loads any checkpoint.
    r"DeprecationWarning: invalid escape sequence",
    r"Implicitly cleaning up <TemporaryDirectory '[^']*gptqmodel_",
    r"`is_gradient_checkpointing` is deprecated",
    r"`loss_type=None` was set in the config but it is unrecognized",
)


class Noise(logging.Handler):
    """Collects `warnings` of every category and log records from WARNING up, except while muted."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._muted = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one log record."""
        self._keep(f"{record.levelname} {record.name}: {record.getMessage()}")

    def _show(self, message: Warning | str, category: type[Warning], *_: object) -> None:
        self._keep(f"{category.__name__}: {message}")

    def _keep(self, message: str) -> None:
        line = " ".join(message.split())
        allowed = any(re.search(pattern, line) for pattern in ALLOWED)
        if not self._muted and not allowed and line not in self.messages:
            self.messages.append(line)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect inside this block."""
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._show  # type: ignore[assignment]
                yield
        finally:
            for name in LOGGERS:
                logging.getLogger(name).removeHandler(self)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Do not collect inside this block: what the base says is not the output's doing."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False
