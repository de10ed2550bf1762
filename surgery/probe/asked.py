"""One question about one image: what the model reads of it, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """What a call of `generate` did.

    answer   the tokens it wrote
    read     the prompt [L] that the model read, which may have an instruction in it
    kept     the columns of it that stay, ascending
    defense  what the call tells of a defence; None where there is none, or it is switched off
    """

    answer: list[int]
    read: Tensor
    kept: list[int]
    defense: Mapping[str, Any] | None

    def visual(self, tokens: list[int]) -> tuple[int, tuple[int, ...]]:
        """How many visual tokens the prompt has, and the numbers of those that stay, from 0 in its order."""
        columns = visual_columns(self.read, tokens)
        stay = set(self.kept)
        return len(columns), tuple(number for number, column in enumerate(columns) if column in stay)


def visual_columns(ids: Tensor, tokens: list[int]) -> list[int]:
    """Where a prompt [L] has one of these tokens."""
    found: list[int] = torch.isin(ids, torch.tensor(tokens, device=ids.device)).nonzero()[:, 0].tolist()
    return found


@torch.no_grad()
def ask(model: Any, inputs: Mapping[str, Any], *, count: int, **options: Any) -> Asked:
    """Let the model write at most `count` tokens of an answer to a prompt [1, L], greedily. Raises what it raises.

    What was read is what the model with its language head is called with first: `generate` may add to it before.
    """
    calls: list[tuple[Tensor, Any]] = []

    def listen(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not calls:
            calls.append((kwargs["input_ids"][0], getattr(output, "kept_indices", None)))

    hook = model.register_forward_hook(listen, with_kwargs=True)
    try:
        output = model.generate(
            **inputs, **options, max_new_tokens=count, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
    finally:
        hook.remove()
    (read, kept), given = calls[0], inputs["input_ids"].shape[1]
    columns = list(range(len(read))) if kept is None else [at for at in kept[0].tolist() if at >= 0]
    told = getattr(output, "defense", None)
    return Asked(output.sequences[0, given:].tolist(), read, columns, told[0] if told else None)
