"""Which parameters are trained: groups by their role in the model, found by tensor name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from surgery.architectures import Model
from surgery.architectures.family import layer_pattern
from surgery.errors import UnsupportedModel

Group: TypeAlias = Literal["attention", "mlp", "router", "norms", "embeddings", "head", "all"]
GROUPS: tuple[str, ...] = get_args(Group)
# Groups whose matrices are linear layers in every release: peft's factors fit these.
LoraGroup: TypeAlias = Literal["attention", "mlp", "head", "all"]
_LINEAR = frozenset(get_args(LoraGroup))


@dataclass(frozen=True, slots=True)
class Rank:
    """Low-rank factors B [out, rank] and A [rank, in]: a matrix W becomes W + alpha / rank * B A."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Selection:
    """Tensor names as stored: `full` ones are trained themselves, `lora` ones by factors that are merged at the end."""

    full: tuple[str, ...]
    lora: Mapping[str, Rank] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that training changes."""
        return (*self.full, *self.lora)

    def without(self, part: str) -> Selection:
        """The same without the tensors that have `part` in their names."""
        return self._where(lambda name: part not in name)

    def inside_layers(self, model: Model) -> Selection:
        """The same without what is in no decoder layer."""
        pattern = layer_pattern(model.architecture.layers)
        return self._where(lambda name: pattern.match(name) is not None)

    def _where(self, wanted: Callable[[str], bool]) -> Selection:
        lora = {name: rank for name, rank in self.lora.items() if wanted(name)}
        return Selection(tuple(filter(wanted, self.full)), lora)


def select(model: Model, full: Collection[str], lora: Sequence[tuple[Rank, Collection[str]]] = ()) -> Selection:
    """The tensors of `model` in the groups `full`, and the matrices of each entry of `lora` that are not among them."""
    names = tuple(name for name in model.shapes if _in(model, name, full))
    low: dict[str, Rank] = {}
    for rank, groups in lora:
        found = (n for n in model.shapes if n.endswith(".weight") and len(model.shapes[n]) == 2)
        linear = (name for name in found if group_of(model, name) in _LINEAR)
        low |= {name: rank for name in linear if _in(model, name, groups) and name not in names}
    return Selection(names, low)


def require_parameters(names: Collection[str], there: Collection[str]) -> None:
    """Raise UnsupportedModel where a tensor that is to be trained is no parameter of the loaded model."""
    missing = [name for name in names if name not in there]
    if missing:
        raise UnsupportedModel(
            f"{missing[0]!r} cannot be trained, nor can {len(missing) - 1} more tensors",
            cause="the installed transformers holds them under other names (experts are fused, or weights are tied)",
            remedy="leave their group out of heal.train",
        )  # fmt: skip


def layer_names(model: Model, names: Collection[str], layer: int) -> Iterator[str]:
    """Those of `names` that are inside decoder layer `layer`."""
    prefix = model.architecture.layers.format(layer=layer) + "."
    return (name for name in names if name.startswith(prefix))


def group_of(model: Model, name: str) -> str:
    """The group of one tensor. Biases belong where their projection does; norms inside attention are norms."""
    module = name.rpartition(".")[0]
    last = module.rpartition(".")[2]
    if "norm" in last:
        return "norms"
    inside = layer_pattern(model.architecture.layers).match(name)
    if inside is None:
        return "head" if module == "lm_head" else "embeddings"
    if name.startswith(model.architecture.attention.prefix.format(layer=inside[1]) + "."):
        return "attention"
    return "router" if last in {"gate", "shared_expert_gate", "router"} else "mlp"


def _in(model: Model, name: str, groups: Collection[str]) -> bool:
    return bool(groups) and ("all" in groups or group_of(model, name) in groups)
