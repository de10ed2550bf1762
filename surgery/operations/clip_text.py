"""What a CLIP model has beside the vision tower that a base took from it: the text tower, projections, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architectures.family import Vision
from surgery.checkpoint.expressions import Tensors, TensorSpec
from surgery.checkpoint.reader import Checkpoint, open_checkpoint
from surgery.errors import UnsupportedModel
from surgery.given import TextFile

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER = "tokenizer"
PARTS, COUNTED = ("text_model.", "text_projection.", "visual_projection."), "position_ids"
# Of the text tower, with what transformers takes where a config does not say it.
TEXT: Mapping[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}  # fmt: skip


@dataclass(frozen=True)
class ClipText:
    """The parts: `size` is what the runtime builds, `specs` are their tensors by CLIP's names, and the tokenizer's."""

    checkpoint: Checkpoint
    size: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    tokenizer: bytes
    identity: str

    def reader(self, name: str, target: str) -> Callable[[Tensors], Tensors]:
        """The function of a rewrite that reads one of them, as `target`."""

        def function(_: Tensors) -> Tensors:
            import torch

            from surgery.checkpoint.evaluate import load

            if name == TOKENIZER:
                return {target: torch.frombuffer(bytearray(self.tokenizer), dtype=torch.uint8)}
            return {target: load(self.checkpoint, self.checkpoint.tensors[name])}

        return function


def read_clip(given: TextFile, base: Path, vision: Vision | None) -> ClipText:
    """Open the CLIP of a base. Raises UnsupportedModel where it is none, or not the one that the base's tower is of."""
    opened = open_checkpoint(given.path, source=given.given)
    kind = opened.config.get("model_type")
    if kind != "clip":
        raise _unlike(given, f"is no CLIP model: its model_type is {kind!r}")
    _compare(given, opened, open_checkpoint(base, trust_remote_code=True), vision)
    specs = {
        name: TensorSpec(info.dtype, info.shape)
        for name, info in opened.tensors.items()
        if name.startswith(PARTS) and not name.endswith(COUNTED)
    }
    tokenizer, ends = _tokenizer(given)
    said = opened.config.get("text_config") or {}
    text = {name: said.get(name, usual) for name, usual in TEXT.items()}
    narrow, wide = specs["visual_projection.weight"].shape
    size = {
        "text": text, "projection_dim": narrow, "vision_width": wide, "tokenizer_bytes": len(tokenizer),
        "start": ends[0], "end": ends[1],
    }  # fmt: skip
    specs[TOKENIZER] = TensorSpec("U8", (len(tokenizer),))
    return ClipText(opened, size, specs, tokenizer, opened.identity())


def _compare(given: TextFile, clip: Checkpoint, base: Checkpoint, vision: Vision | None) -> None:
    """Raise UnsupportedModel unless every tensor of CLIP's vision tower is in the base, in the base's type."""
    import torch

    from surgery.checkpoint.evaluate import load

    for name, info in sorted(clip.tensors.items()):
        if not name.startswith("vision_model.") or name.endswith(COUNTED):
            continue
        stored = next((base.tensors[one] for one in _spellings(name, vision) if one in base.tensors), None)
        if stored is None:
            raise _unlike(given, f"is not the CLIP of this base, which lacks its {name}")
        mine: Tensor = load(base, stored)
        if mine.shape != info.shape or not torch.equal(load(clip, info).to(mine.dtype), mine):
            raise _unlike(given, f"is not the CLIP of this base: {name} differs")


def _spellings(name: str, vision: Vision | None) -> Iterator[str]:
    """How a base may call a tensor of CLIP's vision tower."""
    if vision is not None and vision.tower and vision.short_tower:
        for tower in (vision.tower, vision.short_tower):
            for place in (tower, vision.loaded(tower)):
                yield name.replace("vision_model", place, 1)


def _tokenizer(given: TextFile) -> tuple[bytes, list[int]]:
    """CLIP's tokenizer as one JSON text, and the tokens that a text begins and ends with."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(given.path))
        ends = list(found("")["input_ids"])
        text: str = found.backend_tokenizer.to_str()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _unlike(given, f"has no fast tokenizer that loads ({type(error).__name__}: {error})") from error
    if len(ends) != 2:
        raise _unlike(given, f"has a tokenizer that puts {len(ends)} tokens around a text, not 2")
    return text.encode(), ends


def _unlike(given: TextFile, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"visual_defense: {given.given} {why}", cause="scorer: clip asks the CLIP that the base's vision tower is of",
        remedy="download that one, with its tokenizer and as safetensors, or take scorer: attention",
    )  # fmt: skip
