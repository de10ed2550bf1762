"""Which tensors the experts of each layer are, held against the config: nothing is cut before all of it agrees."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.architectures.family import Experts
from surgery.architectures.model import Model
from surgery.errors import CorruptCheckpoint, UnsupportedModel

_NUMBERED = re.compile(r"experts\\*\.\d")


@dataclass
class ExpertLayer:
    """The routed experts of one layer, by tensor name.

    count    experts there are
    router   tensors with one row per expert: weight, bias, correction of the choice
    experts  tensors of each expert, where every expert has its own
    fused    tensors with the experts on their first axis, where all share them
    """

    layer: int
    count: int = 0
    router: list[str] = field(default_factory=list)
    experts: dict[int, list[str]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """Every tensor of the layer that a cut of experts touches."""
        yield from self.router
        yield from self.fused
        for names in self.experts.values():
            yield from names


def family_experts(model: Model) -> Experts:
    """The family's data on experts. Raises UnsupportedModel for a family without experts."""
    if model.architecture.experts is None:
        raise UnsupportedModel(
            f"{model.architecture.title} has no experts", cause="every token goes through the same MLP",
            remedy="choose a mixture of experts",
        )  # fmt: skip
    return model.architecture.experts


def expert_layers(model: Model) -> tuple[ExpertLayer, ...]:
    """As `find_expert_layers`, which is asked once per model: a large one has a hundred thousand names."""
    known: dict[str, Any] = model.cache
    if "expert_layers" not in known:
        known["expert_layers"] = find_expert_layers(model)
    found: tuple[ExpertLayer, ...] = known["expert_layers"]
    return found


def find_expert_layers(model: Model) -> tuple[ExpertLayer, ...]:
    """The layers that have experts, draft layers (beyond `num_hidden_layers`) last, all in order.

    Raises CorruptCheckpoint, naming the tensor, where a layer is not what the config says, and UnsupportedModel where
    its experts are stored in a way that this family is not known to have.
    """
    at = family_experts(model)
    found: dict[int, ExpertLayer] = {}
    pattern = _pattern(model, at)
    for name in model.shapes:
        match = pattern.match(name)
        if match is None:
            continue
        layer = found.setdefault(int(match["layer"]), ExpertLayer(int(match["layer"])))
        if match["router"]:
            layer.router.append(name)
        elif at.fused and match["shared"]:
            layer.fused.append(name)
        elif not at.fused and match["expert"] and match["projection"] in at.projections:
            layer.experts.setdefault(int(match["expert"]), []).append(name)
        else:
            raise UnsupportedModel(
                f"tensor {name!r} is not how {model.architecture.title} stores experts",
                cause="it may hold several experts in one, and cutting it could tear them",
                remedy="start from a checkpoint in the layout of the Hub's originals",
            )
    layers = tuple(found[number] for number in sorted(found))
    counts = expert_counts(model)
    for layer in layers:
        _check(model, at, layer, counts.get(layer.layer, counts[None]))
    _check_alike(model, layers)
    return layers


def main_layers(model: Model) -> tuple[ExpertLayer, ...]:
    """The layers with experts that every token goes through, without draft layers."""
    return tuple(layer for layer in expert_layers(model) if layer.layer < model.num_hidden_layers)


def expert_counts(model: Model) -> Mapping[int | None, int]:
    """Experts by layer where the config says that they differ, and under None the number that holds elsewhere."""
    at = family_experts(model)
    stated = {key: model.config[key] for key in at.counts if model.config.get(key) is not None}
    if len(set(map(repr, stated.values()))) > 1:
        raise CorruptCheckpoint(
            "config.json states two numbers of experts", cause=", ".join(f"{k} = {v!r}" for k, v in stated.items()),
            remedy="make them equal to the number of experts that are stored",
        )  # fmt: skip
    own = _own(model, "num_experts")
    # Layers beyond those listed are draft layers, which are cut as the last one is.
    elsewhere = model.size(next(iter(stated), at.counts[0]))
    return {None: list(own.values())[-1] if own else elsewhere, **own}


def top_ks(model: Model) -> Mapping[int | None, int]:
    """Experts per token, as `expert_counts`. Raises CorruptCheckpoint where the config has no such number."""
    return {None: model.size(family_experts(model).top_k[0]), **_own(model, "num_experts_per_tok")}


@dataclass(frozen=True)
class Numbers:
    """Experts and experts per token of each layer that has some, by decoder layer."""

    experts: Mapping[int, int]
    top_k: Mapping[int, int]

    @property
    def native(self) -> bool:
        """Whether a stock config can say it."""
        return len(set(self.experts.values())) == 1 == len(set(self.top_k.values()))


def numbers(model: Model) -> Numbers:
    """The numbers of a model as it is."""
    counts, tops = expert_counts(model), top_ks(model)
    layers = [layer.layer for layer in main_layers(model)]
    return Numbers({n: counts.get(n, counts[None]) for n in layers}, {n: tops.get(n, tops[None]) for n in layers})


def groups(model: Model) -> tuple[int, int]:
    """In how many equal groups the router divides the experts, and from how many of them a token takes its experts.

    Raises CorruptCheckpoint where the config's numbers cannot be.
    """
    count = model.config.get("n_group")
    if count is None or model.config.get("topk_method") == "greedy":
        return 1, 1
    return model.size("n_group"), model.size("topk_group", 1 if count == 1 else None)


def unfit_groups(model: Model) -> str | None:
    """Why no router can choose from the groups that the config names, or None."""
    count, (divided, taken) = main_layers(model)[0].count, groups(model)
    if count % divided or (divided > 1 and count // divided < 2):
        return f"its {count} experts do not form {divided} groups of at least two (n_group)"
    if divided < taken:
        return f"tokens would take experts from {taken} of {divided} groups (topk_group)"
    return None


def mass_depends(model: Model) -> bool:
    """Whether the weights of a token's experts sum to less or more as experts or slots go."""
    mass = family_experts(model).mass
    return mass == "kept" or (mass != "whole" and not model.config.get(mass))


def _own(model: Model, key: str) -> dict[int | None, int]:
    """The per-layer numbers of a result that has some."""
    ours = (model.config.get("surgery") or {}).get("experts") or {}
    return {layer: count for layer, count in enumerate(ours.get(key) or ()) if count is not None}


def _pattern(model: Model, at: Experts) -> re.Pattern[str]:
    """One pattern for every tensor of routers and experts; shared experts, beside them, do not match."""
    layer = re.escape(model.architecture.layers).replace(r"\{layer\}", r"(?P<layer>\d+)")
    shared = "|".join(map(re.escape, at.projections))
    inside = re.escape(at.experts + "." if at.experts else "")
    expert = r"(?P<expert>\d+)\.(?P<projection>\w+)\..+"
    stored = rf"{inside}(?:(?P<shared>(?:{shared})(?:[._].*)?)|{expert}" + (r"|.+)" if inside else ")")
    return re.compile(rf"{layer}\.{re.escape(at.block)}\.(?:(?P<router>{re.escape(at.router)}\..+)|{stored})$")


def _check_alike(model: Model, layers: tuple[ExpertLayer, ...]) -> None:
    """Every layer has the router's and the shared tensors that the others have: a bias in one is a bias in all."""
    prefixes = {layer.layer: model.architecture.layers.format(layer=layer.layer) for layer in layers}
    parts = {at.layer: {n.removeprefix(prefixes[at.layer]) for n in (*at.router, *at.fused)} for at in layers}
    wanted = set().union(*parts.values())
    for layer, there in parts.items():
        if wanted - there:
            raise _missing(prefixes[layer] + min(wanted - there))


def _check(model: Model, at: Experts, layer: ExpertLayer, count: int) -> None:
    block = f"{model.architecture.layers.format(layer=layer.layer)}.{at.block}"
    needed = [f"{block}.{at.router}.weight"]
    if at.correction:
        needed.append(f"{block}.{at.router}.{at.correction}")
    if at.fused:
        inside = f"{block}.{at.experts}.".replace("..", ".")
        endings = {name.removeprefix(inside + p) for p in at.projections for name in layer.fused if inside + p in name}
        ways = (("_blocks", "_scales"), (".weight",))
        wanted = next((way for way in ways if endings & {*way}), ("",))
        needed += [f"{inside}{p}{ending}" for p in at.projections for ending in wanted]  # a bias alone is none
    else:
        _check_separate(layer, f"{block}.{at.experts}", at.projections)
    for name in needed:
        if not model.has(name):
            raise _missing(name)
    layer.count = model.shapes[needed[0]][0] if model.shapes[needed[0]] else 0
    stored = len(layer.experts) if not at.fused else layer.count
    wrong = [n for n in (*layer.router, *layer.fused) if model.shapes[n][:1] != (layer.count,)]
    if wrong or layer.count != count or stored != count:
        name = wrong[0] if wrong else needed[0]
        raise CorruptCheckpoint(
            f"layer {layer.layer} has {stored} experts and {name!r} of shape {list(model.shapes[name])}",
            cause=f"config.json says {count} experts", remedy=f"check {at.counts[0]} in config.json",
        )  # fmt: skip


def _check_separate(layer: ExpertLayer, prefix: str, projections: tuple[str, ...]) -> None:
    """Every expert from the first to the last is there, and has the tensors that the others have."""
    parts = {
        expert: {name.removeprefix(f"{prefix}.{expert}.") for name in names} for expert, names in layer.experts.items()
    }
    wanted = set().union(*parts.values())
    wanted |= {f"{p}.weight" for p in projections if not any(part.startswith(f"{p}.") for part in wanted)}
    for expert in range(max(parts, default=0) + 1):
        lacking = sorted(wanted - parts.get(expert, set()))
        if lacking:
            raise _missing(f"{prefix}.{expert}.{lacking[0]}")


def _missing(name: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"tensor {name!r} is missing", cause="the other experts and the config say that it should be there",
        remedy="check that the checkpoint is complete",
    )  # fmt: skip


def renumbered(config: Mapping[str, Any], names: Mapping[str, str], gone: frozenset[str]) -> Any:
    """A quantization config in which names of modules follow experts that were renumbered (old -> new) or dropped.

    Raises UnsupportedModel where a pattern names experts by number: it would mean others afterwards.
    """

    def named(word: Any) -> Any:
        if isinstance(word, str) and not word.startswith("model.") and _NUMBERED.search(word):
            raise UnsupportedModel(
                f"quantization_config names experts by the pattern {word!r}", cause="their numbers change",
                remedy="name them one by one, in full",
            )  # fmt: skip
        return names.get(word, word) if isinstance(word, str) else word

    def follow(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {named(key): follow(item) for key, item in value.items() if key not in gone}
        if isinstance(value, list):
            return [follow(item) for item in value if not (isinstance(item, str) and item in gone)]
        return named(value)

    return follow(config)
