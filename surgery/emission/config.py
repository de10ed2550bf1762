"""`config.json` and `tokenizer_config.json` in the form that every supported transformers release reads.

transformers 4 ignores what only 5 writes, without a word: a `rope_parameters` that it does not see costs accuracy and
raises nothing. transformers 5 still reads the older keys, so the older keys are written.
"""

from __future__ import annotations

import copy
from typing import Any

from surgery.emission.code import Family, auto_map
from surgery.errors import UnsupportedModel

Json = dict[str, Any]

# Keys of `rope_parameters` that releases 4.x keep beside `rope_scaling`, not in it.
TOP_LEVEL_ROPE = ("rope_theta", "partial_rotary_factor")
# Different names for the same number, each read by some release.
EXPERT_COUNTS = {"qwen3_moe": ("num_experts", "num_local_experts")}


def down_level(config: Json) -> Json:
    """A copy of `config` with rope and dtype in the spelling that 4.48 to 5.x read; all else is kept.

    Raises UnsupportedModel where rope differs per layer type, which 4.x has no general spelling for.
    """
    config = copy.deepcopy(config)
    config.pop("_name_or_path", None)
    _rope(config)
    _dtype(config)
    _expert_counts(config)
    _placeholders(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = down_level(config["text_config"])
    return config


def native_config(config: Json) -> Json:
    """The config of an output that a stock class holds: `config`, down-levelled, without traces of other code."""
    config = down_level(config)
    for key in ("auto_map", "surgery"):
        config.pop(key, None)
    return config


def custom_config(config: Json, family: Family, surgery: Json) -> Json:
    """The config of an output with code: own model_type, `auto_map`, and all runtime settings under `surgery`."""
    mapping = auto_map(family)
    own = {
        "architectures": [mapping[family.auto_class].split(".")[1]],
        "model_type": family.surgery_type,
        "auto_map": mapping,
        "surgery": copy.deepcopy(surgery),
    }
    return own | {key: value for key, value in down_level(config).items() if key not in own}


def down_level_tokenizer(tokenizer_config: Json) -> Json:
    """A copy of a `tokenizer_config.json` that 4.x can read: a class it has, and special tokens where it looks."""
    config = copy.deepcopy(tokenizer_config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.x has a list of this meaning under another name, and wants a mapping under this one
        del config["extra_special_tokens"]
        older = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = older + [token for token in extra if token not in older]
    return config


def _rope(config: Json) -> None:
    """rope_parameters -> rope_theta, partial_rotary_factor and rope_scaling."""
    parameters = config.pop("rope_parameters", None)
    scaling = config.get("rope_scaling")
    for rope in (parameters, scaling):
        if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
            raise UnsupportedModel(
                "config.json gives each layer type its own rotary positions",
                cause="releases of transformers before 5.0 have no spelling for that",
                remedy="choose a base with one rope setting for all layers",
            )
    if not parameters:
        return
    parameters = dict(parameters)
    for key in TOP_LEVEL_ROPE:
        if key in parameters:
            config.setdefault(key, parameters.pop(key))
    if scaling:  # where a config has both, 5.x follows the older one
        return
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    if kind == "longrope" and "original_max_position_embeddings" in parameters:
        config["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    if kind == "default" and not parameters:
        config["rope_scaling"] = None
    elif config.get("model_type") == "phi3":
        config["rope_scaling"] = _phi3_scaling(kind, parameters)
    else:
        config["rope_scaling"] = {"rope_type": kind, **parameters}


def _phi3_scaling(kind: str, parameters: Json) -> Json:
    """Phi-3 before 5.0 takes exactly these three keys, and the original context beside them."""
    scaling = {"type": kind} | {key: parameters.pop(key, None) for key in ("short_factor", "long_factor")}
    parameters.pop("original_max_position_embeddings", None)
    if kind != "longrope" or parameters:
        raise UnsupportedModel(
            f"Phi-3 with rope {kind!r} and {sorted(parameters)} cannot be written for transformers 4",
            cause="its configuration there takes a longrope of short_factor and long_factor, nothing else",
            remedy="choose a base whose rope_scaling has these two",
        )
    return scaling


def _dtype(config: Json) -> None:
    """The same dtype under the older and the newer key."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["torch_dtype"] = config["dtype"] = dtype


def _placeholders(config: Json) -> None:
    """Tokens that stand for images and frames, under both names that releases have read."""
    for kind in ("image", "video"):
        names = f"{kind}_token_id", f"{kind}_token_index"
        known = [config[name] for name in names if config.get(name) is not None]
        if known and str(config.get("model_type")).startswith(("llava", "surgery_llava")):
            config |= dict.fromkeys(names, known[0])


def _expert_counts(config: Json) -> None:
    names = EXPERT_COUNTS.get(str(config.get("model_type")), ())
    known = [config[name] for name in names if name in config]
    if known:
        config |= dict.fromkeys(names, known[0])
