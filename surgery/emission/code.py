"""The Python files of a checkpoint: two generated entry files and copies of the runtime files they need.

Equal arguments give equal bytes. No release of transformers is consulted while writing; the files find out for
themselves where they are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import Template
from typing import Literal

from surgery.architectures.family import Architecture

EMISSION = Path(__file__).parent
RUNTIME = EMISSION.parent / "runtime"
COMPATIBILITY = "surgery_compatibility.py"

# Outputs that a native model records by the class of the module in a layer's attribute.
RECORDED = {"self_attn": "attentions"}


@dataclass(frozen=True, slots=True)
class Family:
    """Where transformers keeps the classes of one model family, and which Auto class loads its task model."""

    model_type: str
    modeling_module: str
    configuration_module: str
    config_class: str
    model_class: str
    causal_lm_class: str
    auto_class: str = "AutoModelForCausalLM"
    has_experts: bool = False
    language_model: str = ""  # attribute of the language model, where the model has other parts beside it

    @classmethod
    def of(cls, architecture: Architecture) -> Family:
        """The family that an architecture's data file describes."""
        at = architecture.classes
        classes = at.modeling, at.configuration, at.config, at.model, at.causal_lm
        if architecture.vision is not None:
            return cls(
                architecture.model_type, *classes, auto_class="AutoModelForImageTextToText",
                language_model="language_model",
            )  # fmt: skip
        return cls(architecture.model_type, *classes, has_experts=architecture.experts is not None)

    @classmethod
    def named(cls, model_type: str, prefix: str) -> Family:
        """The family that follows transformers' naming, such as ("qwen3_moe", "Qwen3Moe")."""
        package = f"transformers.models.{model_type}"
        modules = f"{package}.modeling_{model_type}", f"{package}.configuration_{model_type}"
        return cls(model_type, *modules, f"{prefix}Config", f"{prefix}Model", f"{prefix}ForCausalLM")

    @property
    def surgery_type(self) -> str:
        """The checkpoint's own model_type; under the native one transformers 5 would apply native loading rules."""
        return f"surgery_{self.model_type}"

    @property
    def configuration_file(self) -> str:
        """Module name, without `.py`, of the generated configuration."""
        return f"configuration_{self.surgery_type}"

    @property
    def modeling_file(self) -> str:
        """Module name, without `.py`, of the generated models."""
        return f"modeling_{self.surgery_type}"


@dataclass(frozen=True, slots=True)
class RuntimePart:
    """One replacement: `attribute` of every decoder layer (or of the model) becomes what `symbol` of `file` makes.

    A layer's is made by `symbol(config, layer_index, replaced)`, the model's by `symbol(config, replaced)`: a class
    makes new modules, a function changes those that are there. With `of` a `base`, `symbol` is a class that the base
    model (or, with attribute `lm_head`, the language model) inherits from. `what` is a word for it where the attribute
    says too little.
    """

    file: str
    symbol: str
    attribute: str
    of: Literal["layer", "model", "base"] = "layer"
    what: str = ""
    inside: str = ""

    @property
    def new(self) -> bool:
        """Whether modules of the layers are replaced, not changed."""
        return self.of == "layer" and self.symbol[0].isupper()


CAPABILITIES_SUMMARY = "What the replaced modules can do; the flags cover the names that releases have used for it."
CAPABILITIES = (
    "_supports_attention_backend = True",
    "_supports_sdpa = True",
    "_supports_flash_attn = _supports_flash_attn_2 = True",
    "_supports_flex_attn = True",
    "_supports_cache_class = True",
    "_supports_quantized_cache = False",
    "_supports_static_cache = static_cache_holds_any_width()",
    '_can_compile_fullgraph = _supports_static_cache and getattr({model}, "_can_compile_fullgraph", False)',
)

# Before it, models that see images were built otherwise.
NEEDED = "    import transformers.masking_utils  # noqa: F401  (first in 4.53)\n"

# Where the config of a language model inside has settings too, both have all: 4.57 reads some outer fields from there,
# and flat files have no place for them.
SETTINGS = "        self.surgery = {} if surgery is None else surgery"
SHARED_SETTINGS = """
        inner = self.get_text_config()
        self.surgery = inner.surgery = {**getattr(inner, "surgery", {}), **(surgery or {})}
""".strip("\n")

# transformers 5 looks for a decorator in the file of the class, which is another one here.
EXPERTS = """
    @classmethod
    def _can_set_experts_implementation(cls):
        return {model}._can_set_experts_implementation()
"""

# Parts that bring another one along.
COMPANIONS = {
    "LatentAttention": (RuntimePart("surgery_latent_attention.py", "latent_rotary", "rotary_emb", of="model"),),
    "codebook_attention": (
        RuntimePart("surgery_codebook_model.py", "CodebookModel", "model", "base", "its cache", "codebook_model"),
        RuntimePart("surgery_codebook_model.py", "CodebookGeneration", "lm_head", of="base", what="its cache"),
    ),
    "VisualPruning": (
        RuntimePart("surgery_visual_pruning.py", "VisualPruningGeneration", "lm_head", of="base", what="visual tokens"),
    ),
}


def auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` of config.json; without AutoModel, vLLM and SGLang refuse the checkpoint."""
    return {
        "AutoConfig": f"{family.configuration_file}.{_own(family.config_class)}",
        "AutoModel": f"{family.modeling_file}.{_own(family.model_class)}",
        family.auto_class: f"{family.modeling_file}.{_own(family.causal_lm_class)}",
    }


def emit_code(family: Family, parts: Sequence[RuntimePart], version: str) -> dict[str, bytes]:
    """Every `.py` file of a checkpoint of `family` with `parts` in it, by file name; `version` is this package's."""
    parts = _with_companions(family, parts)
    runtime = _closure([COMPATIBILITY, *(part.file for part in parts)])
    names = {
        "version": version,
        "model_type": family.model_type,
        "surgery_type": family.surgery_type,
        "modeling_module": family.modeling_module,
        "configuration_module": family.configuration_module,
        "needed": NEEDED if family.language_model else "",
        "settings": SHARED_SETTINGS if family.language_model else SETTINGS,
        "configuration_file": family.configuration_file,
        "native_config": family.config_class,
        "native_model": family.model_class,
        "native_causal_lm": family.causal_lm_class,
        "config": _own(family.config_class),
        "model": _own(family.model_class),
        "causal_lm": _own(family.causal_lm_class),
        "auto_class": family.auto_class,
        "summary": ", ".join(dict.fromkeys(part.what or part.attribute for part in parts)) or "none",
        "replaced_attributes": repr([part.attribute for part in parts if part.of == "layer"]).replace("'", '"'),
        "imports": "\n".join(_imports(family, parts, runtime)),
        "keep_conversion": _keep_conversion(family, parts),
        "capabilities_summary": CAPABILITIES_SUMMARY if _attends(parts) else "What both classes share.",
        "capabilities": _capabilities(family, parts),
        "experts": EXPERTS.format(model=family.model_class) if family.has_experts else "",
        "recorded": ", ".join([family.model_class, *_recorded(parts)]),
        "swaps": "\n".join(_swaps(family, parts)),
        "model_bases": _bases(parts, "model"),
        "causal_lm_bases": _bases(parts, "lm_head"),
    }
    generated = {
        f"{family.configuration_file}.py": _fill("configuration.txt", names),
        f"{family.modeling_file}.py": _fill("modeling.txt", names),
    }
    return generated | {file: (RUNTIME / file).read_bytes() for file in runtime}


def _own(native_class: str) -> str:
    return f"Surgery{native_class}"


def _fill(template: str, names: dict[str, str]) -> bytes:
    return Template((EMISSION / template).read_text(encoding="utf-8")).substitute(names).encode()


def _with_companions(family: Family, parts: Sequence[RuntimePart]) -> list[RuntimePart]:
    companions = (companion for part in parts for companion in COMPANIONS.get(part.symbol, ()))
    wanted = list(dict.fromkeys([*parts, *companions]))
    if not family.language_model:
        return wanted
    return [replace(p, symbol=p.inside, of="model", attribute="") if p.inside else p for p in wanted]


def _closure(files: Sequence[str]) -> list[str]:
    """`files` and every runtime file they import, sorted."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += neighbours(file)
    return sorted(found)


@cache
def neighbours(file: str) -> dict[str, str]:
    """The runtime files that a runtime file imports, each with one of the names imported."""
    tree = ast.parse((RUNTIME / file).read_bytes())
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1)
    return {f"{node.module}.py": node.names[0].name for node in imports}


def _imports(family: Family, parts: Sequence[RuntimePart], runtime: Sequence[str]) -> Iterator[str]:
    """One import for every runtime file: older releases copy only what the entry file itself imports."""
    keeps = ["keep_weight_conversion"] if _keep_conversion(family, parts) else []
    attends = ["static_cache_holds_any_width"] if _attends(parts) else []
    inside = ["record_inside"] if family.language_model and [*_recorded(parts)] else []
    used = {COMPATIBILITY: {*keeps, *attends, *inside, "recorded_outputs", "tied_weights"}}
    for part in parts:
        used.setdefault(part.file, set()).add(part.symbol)
    imported = {helper: name for file in runtime for helper, name in neighbours(file).items()}
    for file in runtime:
        symbols = ", ".join(sorted(used.get(file, ()), key=_classes_first)) or f"{imported[file]}  # noqa: F401"
        yield f"from .{file.removesuffix('.py')} import {symbols}"


def _classes_first(name: str) -> tuple[bool, str]:
    return not name[0].isupper(), name


def _keep_conversion(family: Family, parts: Sequence[RuntimePart]) -> str:
    """The native loading rules stay unless the module they write into is gone."""
    if any(part.attribute == "mlp" for part in parts):
        return ""
    pairs = [(family.model_type, family.surgery_type)]
    if family.language_model:  # their rules go by classes too
        pairs += [(name, _own(name)) for name in (family.model_class, family.causal_lm_class)]
    calls = "\n".join(f'keep_weight_conversion("{native}", "{own}")' for native, own in pairs)
    return f"\n{calls}\n"


def _attends(parts: Sequence[RuntimePart]) -> bool:
    """Whether attention is replaced, so that what the native classes say of theirs does not hold."""
    return any(part.attribute == "self_attn" and part.new for part in parts)


def _capabilities(family: Family, parts: Sequence[RuntimePart]) -> str:
    """What our attention can do; where it is the native one, the native flags are inherited."""
    flags = CAPABILITIES if _attends(parts) else ()
    skipped = '_skip_keys_device_placement = ["past_key_values", "past_key_value"]'
    return "\n".join(f"    {flag}" for flag in (*(flag.format(model=family.model_class) for flag in flags), skipped))


def _recorded(parts: Sequence[RuntimePart]) -> Iterator[str]:
    for part in parts:
        if part.new and part.attribute in RECORDED:
            yield f"{RECORDED[part.attribute]}={part.symbol}"


def _bases(parts: Sequence[RuntimePart], attribute: str) -> str:
    """What a generated class inherits from before the native class."""
    return "".join(f"{part.symbol}, " for part in parts if part.of == "base" and part.attribute == attribute)


def _swaps(family: Family, parts: Sequence[RuntimePart]) -> Iterator[str]:
    """Statements that put modules in: into the model, or into the language model that is a part of it."""
    inner = f"self.{family.language_model}" if family.language_model else "self"
    config = f"{inner}.config" if family.language_model else "config"  # in 4.53 a copy of config.get_text_config()
    in_layers = [part for part in parts if part.of == "layer"]
    if in_layers:
        yield f"        for index, layer in enumerate({inner}.layers):"
    for part in in_layers:
        yield f"            layer.{part.attribute} = {part.symbol}({config}, index, layer.{part.attribute})"
    for part in parts:
        if part.of == "model":
            target = f"{inner}.{part.attribute}".rstrip(".")
            yield f"        {target} = {part.symbol}({config}, {target})"
    if family.language_model and (recorded := ", ".join(_recorded(parts))):
        yield f"        record_inside({inner}, {recorded})"
