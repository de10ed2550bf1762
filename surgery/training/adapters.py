"""Low-rank factors by peft: put into a module, and merged into the matrices that they adapt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from surgery.errors import MissingPackage
from surgery.training.groups import Rank


def attach(module: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Give every matrix of `ranks` (names relative to `module`, ending in .weight) factors whose product is zero.

    Raises MissingPackage without peft.
    """
    if not ranks:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackage(
            "`lora` needs peft, which is not installed", cause=str(error), remedy="pip install 'surgery[heal]'"
        ) from error
    by_module = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    config = LoraConfig(
        target_modules=list(by_module),
        rank_pattern={name: rank.rank for name, rank in by_module.items()},
        alpha_pattern={name: rank.alpha for name, rank in by_module.items()},
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, module)


def stored_name(parameter: str) -> str:
    """The tensor name of a parameter: what peft wraps keeps its old name on disk."""
    return parameter.replace(".base_layer.", ".")


def is_factor(parameter: str) -> bool:
    """Whether a parameter is one of peft's factors."""
    return ".lora_A." in parameter or ".lora_B." in parameter


def merged(parameters: Mapping[str, Tensor], ranks: Mapping[str, Rank]) -> Iterator[tuple[str, Tensor]]:
    """For every matrix of `ranks`, its name and W + alpha / rank * B A in float32, from a module's parameters."""
    for name, rank in ranks.items():
        module = name.removesuffix(".weight")
        down, up = (_factor(parameters, f"{module}.lora_{side}.") for side in "AB")
        weight = parameters[f"{module}.base_layer.weight"].float()
        yield name, weight + (rank.alpha / rank.rank) * (up.float() @ down.float())


def _factor(parameters: Mapping[str, Tensor], prefix: str) -> Tensor:
    return next(tensor for name, tensor in parameters.items() if name.startswith(prefix))
