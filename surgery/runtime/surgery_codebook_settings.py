# SPDX-License-Identifier: Apache-2.0
"""What a codebook cache may be told, by the checkpoint's config, by a generation config, or by a call."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CacheSettings:
    """How much a cache keeps, and how; `window`, `sinks`, `residual` and `min_prompt` count tokens.

    method         `solved`: per layer, what of eviction, sharing and rounding hurts the prompt's own attention least
                   within the budget; `paper`: SpindleKV's line over layers and its thresholds
    reserve_ratio  share of the stock cache's bytes that a prompt may take; `paper`: of its tokens, before they share
    theta_k        cosine above which keys share a code; None solves it, 1 shares nothing; theta_v for values
    bits           of stored numbers: 2 to 6, 8, or 16 (the model's own type); None chooses by measured error
    beta           `paper`: least share of the context's tokens in the last layer
    window         newest tokens of a prompt, whose queries say what matters; none is evicted; `paper`: they stay as
                   they are
    sinks          first tokens, which stay as they are
    residual       newest tokens that stay as they are; as many can be taken back
    min_prompt     shorter prompts stay as they are
    heads          of query heads that share keys: `union` keeps for all what one of them wants, `mask` hides from each
                   what it did not want (the paper's unfolding, stored once), `mean` decides for all together
    pool           tokens over which scores are smoothed (odd; 1 does not)
    divisor        of summed scores: `window`, or `paper`: the printed distance to the end
    greedy         search for codes one by one, as the paper does, in place of many at once
    """

    method: str = "solved"
    reserve_ratio: float = 0.3
    theta_k: float | None = None
    theta_v: float | None = None
    bits: int | None = None
    beta: float = 0.05
    window: int = 32
    sinks: int = 4
    residual: int = 32
    min_prompt: int = 128
    heads: str = "union"
    pool: int = 7
    divisor: str = "window"
    greedy: bool = False

    @classmethod
    def of(cls, base: Mapping[str, Any], changes: Any = None) -> "CacheSettings":
        """`base` with `changes` over it. Raises ValueError for what does not exist or does not fit."""
        if changes is not None and not isinstance(changes, Mapping):
            raise ValueError(f"surgery_cache takes a dictionary of settings or None, not {type(changes).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = sorted({*base, *(changes or {})} - known)
        if unknown:
            raise ValueError(f"surgery_cache has no setting {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        method = (changes or {}).get("method", base.get("method"))
        preset = PAPER if method == "paper" and base.get("method") != "paper" else {}
        if method != "paper" and base.get("method") == "paper":  # its presets are of no use to another method
            base = {name: value for name, value in base.items() if name not in PAPER}
        settings = replace(cls(), **{**base, **preset, **(changes or {})})
        settings.check()
        return settings

    def check(self) -> None:
        """Raise ValueError for values that mean nothing."""
        choices = {"method": ("solved", "paper"), "heads": ("union", "mask", "mean"), "divisor": ("window", "paper")}
        for name, words in choices.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(words)}")
        for name in ("reserve_ratio", "beta", "theta_k", "theta_v"):
            value = getattr(self, name)
            if value is None and name.startswith("theta"):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
                raise ValueError(f"{name} is {value!r}; it must be a number above 0 and at most 1")
        if self.bits is not None and (type(self.bits) is not int or self.bits not in (2, 3, 4, 5, 6, 8, 16)):
            raise ValueError(f"bits is {self.bits!r}; it must be 2, 3, 4, 5, 6, 8, 16 or None")
        least = {"window": 1, "sinks": 0, "residual": 1, "min_prompt": 0, "pool": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if self.greedy not in (True, False) or not isinstance(self.greedy, bool):
            raise ValueError(f"greedy is {self.greedy!r}; it must be True or False")
        if self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}; it must be odd")
        if self.method == "paper" and self.beta > self.reserve_ratio:
            raise ValueError(f"beta {self.beta} is more than reserve_ratio {self.reserve_ratio}")
        if self.method == "paper" and (self.theta_k is None or self.theta_v is None):
            raise ValueError("method: paper needs theta_k and theta_v")


# What SpindleKV gives (its table 3) and says; its window is not given, and 32 is common practice.
PAPER = {
    "method": "paper", "theta_k": 0.98, "theta_v": 0.95, "beta": 0.05, "bits": 16, "heads": "mask", "pool": 1,
    "greedy": True,
}  # fmt: skip
