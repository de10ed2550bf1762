# SPDX-License-Identifier: Apache-2.0
"""How near tiles of a picture are to a request, by CLIP: the model's own tower, and the text tower it was trained with.

The text tower and both projections ride in the checkpoint under CLIP's names, the vision tower is the one that is there
anyway. Relevance as a cosine of tile and request is AMIA's (arXiv 2505.24519), CLIP in place of its retriever is ours.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, normalize, scaled_dot_product_attention
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from .surgery_defense_tiles import View

OLD_END = 2  # in configs from before transformers knew CLIP's last token, which has the highest number


class Affine(nn.Module):
    """A matrix and a bias; no `nn.Linear`, so whatever quantizes linear layers passes it by."""

    def __init__(self, wide: int, narrow: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(narrow, wide))
        self.bias = nn.Parameter(torch.empty(narrow)) if bias else None

    def forward(self, states: Tensor) -> Tensor:
        """[..., wide] -> [..., narrow]."""
        return linear(states, self.weight, self.bias)


class Block(nn.Module):
    """A causal transformer layer of CLIP's text tower."""

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        width, eps = size["hidden_size"], size["layer_norm_eps"]
        self.heads, self.activation = size["num_attention_heads"], ACT2FN[size["hidden_act"]]
        self.self_attn = nn.ModuleDict({f"{name}_proj": Affine(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        inside = size["intermediate_size"]
        self.mlp = nn.ModuleDict({"fc1": Affine(width, inside), "fc2": Affine(inside, width)})

    def forward(self, states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        normal = self.layer_norm1(states)
        query, key, value = (
            self.self_attn[f"{name}_proj"](normal).unflatten(-1, (self.heads, -1)).transpose(0, 1) for name in "qkv"
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1).flatten(1)
        states = states + self.self_attn["out_proj"](mixed)
        widened: Tensor = self.activation(self.mlp["fc1"](self.layer_norm2(states)))
        result: Tensor = states + self.mlp["fc2"](widened)
        return result


class Layers(nn.Module):
    """The layers of CLIP's text tower, under the name that they have there."""

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(size) for _ in range(size["num_hidden_layers"]))


class Tower(nn.Module):
    """CLIP's text tower."""

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        width = size["hidden_size"]
        self.end = size["eos_token_id"]
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(size["vocab_size"], width),
            "position_embedding": nn.Embedding(size["max_position_embeddings"], width),
        })  # fmt: skip
        self.encoder = Layers(size)
        self.final_layer_norm = nn.LayerNorm(width, eps=size["layer_norm_eps"])

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of one text [T], with its first and last token -> the state of the last [D]."""
        places = torch.arange(len(ids), device=ids.device)
        states = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)
        for layer in self.encoder.layers:
            states = layer(states)
        last = ids.argmax() if self.end == OLD_END else (ids == self.end).int().argmax()
        found: Tensor = self.final_layer_norm(states)[last]
        return found


class ClipRelevance(nn.Module):
    """What of CLIP is not in the model already, and how a request becomes an embedding.

    `size` is `config.surgery["visual_defense"]["clip"]`. The tokenizer, in the form of the `tokenizers` library, is a
    tensor of bytes.
    """

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        self.size = size
        self.text_model = Tower(size["text"])
        self.text_projection = Affine(size["text"]["hidden_size"], size["projection_dim"], bias=False)
        self.visual_projection = Affine(size["vision_width"], size["projection_dim"], bias=False)
        self.tokenizer: Tensor
        self.register_buffer("tokenizer", torch.zeros(size["tokenizer_bytes"], dtype=torch.uint8))
        self._tokenizers: tuple[Any, Any] | None = None

    def windows(self, text: Sequence[int], config: Any) -> list[list[int]]:
        """Ids of a request in the model's tokens -> as many texts of CLIP's as it takes, each with both ends."""
        if self._tokenizers is None:
            self._tokenizers = self._made(config)
        own, of_clip = self._tokenizers
        ids = of_clip.encode(own.decode(text, skip_special_tokens=True).strip(), add_special_tokens=False).ids
        room = self.size["text"]["max_position_embeddings"] - 2
        parts = [ids[at : at + room] for at in range(0, max(len(ids), 1), room)]
        return [[self.size["start"], *part, self.size["end"]] for part in parts]

    def _made(self, config: Any) -> tuple[Any, Any]:
        """The model's tokenizer, from where the model came from, and CLIP's."""
        place = getattr(config, "_name_or_path", "")
        try:
            own = AutoTokenizer.from_pretrained(
                place, trust_remote_code=True, revision=getattr(config, "_commit_hash", None)
            )
            of_clip = type(own.backend_tokenizer).from_str(bytes(self.tokenizer.tolist()).decode())
        except (OSError, ValueError, AttributeError) as error:
            raise RuntimeError(
                f"no fast tokenizer of this model at {place!r}, from where it was loaded ({type(error).__name__}): put "
                "it there again, or pass masked_tiles"
            ) from error
        return own, of_clip

    def embedded(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Of a request, a direction [P]: the mean of those of its windows."""
        device = self.text_projection.weight.device
        found = [self.text_projection(self.text_model(torch.tensor(ids, device=device))) for ids in windows]
        return normalize(torch.stack(found).float(), dim=-1).mean(0)

    def forward(self, tower: Any, view: View, side: int, asked: Tensor) -> Tensor:
        """Cosine of each tile of a view to a request [P]: [frames, side, side], float32; of crops, the whole picture's.

        Each tile is resized to what the tower takes, squeezed where it is no square.
        """
        pixels = view.pixels if view.pixels.ndim == 4 else view.pixels[None]
        pixels = pixels[:1] if view.kind == "image" else pixels
        rows, columns = ([size * at // side for at in range(side + 1)] for size in view.sizes)
        edge = tower.config.image_size
        tiles = torch.cat([
            interpolate(pixels[..., top:bottom, left:right].float(), (edge, edge), mode="bicubic", align_corners=False)
            for top, bottom in pairwise(rows)
            for left, right in pairwise(columns)
        ])  # fmt: skip
        seen = tower(tiles.to(tower.dtype), return_dict=True).pooler_output
        found = normalize(self.visual_projection(seen.to(self.visual_projection.weight.device)).float(), dim=-1)
        scores = found @ normalize(asked, dim=-1)
        frames: Tensor = scores.unflatten(0, (side, side, len(pixels))).permute(2, 0, 1)
        return frames
