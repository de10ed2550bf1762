"""Tiny random vision-language checkpoints of six families, and inputs for them; made by the installed transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

COMPOSITES = ("llava", "llava_next", "llava_onevision")
FAMILIES = (*COMPOSITES, "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, START, END = 5, 6, 7, 8  # tokens

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "projection_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
GRIDS = [[16, 16], [16, 32], [32, 16]]
QWEN_TOWER: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48, "patch_size": 4,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    },
}  # fmt: skip


def config_of(family: str) -> Any:
    """The configuration of a tiny model."""
    import transformers as t

    if family == "llava":
        return t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**TOWER), text_config=t.LlamaConfig(**TEXT, head_dim=16),
            image_token_index=IMAGE, image_seq_length=16,
        )  # fmt: skip
    if family == "llava_next":
        return t.LlavaNextConfig(
            vision_config=t.CLIPVisionConfig(**TOWER), text_config=t.MistralConfig(**TEXT, head_dim=16),
            image_token_index=IMAGE, image_grid_pinpoints=GRIDS, image_seq_length=16,
        )  # fmt: skip
    if family == "llava_onevision":
        tower = {name: value for name, value in TOWER.items() if name not in {"projection_dim", "initializer_range"}}
        return t.LlavaOnevisionConfig(
            vision_config=t.SiglipVisionConfig(**tower, vision_use_head=False), text_config=t.Qwen2Config(**TEXT),
            image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=GRIDS,
        )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    classes = {"qwen2_vl": t.Qwen2VLConfig, "qwen2_5_vl": t.Qwen2_5_VLConfig, "qwen3_vl": t.Qwen3VLConfig}
    more = (
        {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        if family == "qwen3_vl"
        else {"rope_parameters": rope}
    )
    return classes[family](
        text_config=TEXT | more, vision_config=QWEN_TOWER[family], image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip


def write_tiny_vision(folder: Path, family: str, *, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a checkpoint with random weights in float32."""
    import transformers

    torch.manual_seed(seed)
    config = config_of(family)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = tie_word_embeddings
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "newline" in name:
                parameter.normal_(0, 1)
    model.save_pretrained(folder)
    return folder


def picture(family: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], int]:
    """What the model takes for one image, without ids, and how many tokens it becomes."""
    draw = torch.Generator().manual_seed(seed)
    if family == "llava":
        return {"pixel_values": torch.randn(1, 3, 16, 16, generator=draw)}, 16
    if family in COMPOSITES:  # a base view of 16 patches, two tiles, and a newline after each of 4 rows
        pixels = torch.randn(1, 3, 3, 16, 16, generator=draw)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]])}, 16 + 32 + 4
    pixels = torch.randn(48, 3 * 2 * 16, generator=draw)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 6]])}, 12


def inputs_of(family: str, images: tuple[int, ...] = (1,), *, seed: int = 0, texts: int = 6) -> dict[str, torch.Tensor]:
    """A batch for the model, padded on the left: each row has some text and, in it, so many images."""
    draw = torch.Generator().manual_seed(100 + seed)
    rows, pictures = [], []
    for number, count in enumerate(images):
        ids = [1, *torch.randint(10, 128, (3 + number,), generator=draw).tolist()]
        for _ in range(count):
            shown, tokens = picture(family, seed=seed + 10 * len(pictures))
            pictures.append(shown)
            ids += [START, *[IMAGE] * tokens, END]
        rows.append([*ids, *torch.randint(10, 128, (texts,), generator=draw).tolist()])
    return batch_of(family, rows, pictures)


def batch_of(
    family: str, rows: Sequence[list[int]], pictures: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What the model takes for rows of ids, padded on the left, and the pictures that stand in them."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    for name in pictures[0] if pictures else ():
        batch[name] = torch.cat([shown[name] for shown in pictures])
    return batch


VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def clip_of(family: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one clip of two frames, in which a frame becomes 4 tokens."""
    draw = torch.Generator().manual_seed(seed)
    shown = [START, *[VIDEO] * 8, END]
    if family == "llava_onevision":  # a newline at the end
        shown = [START, *[VIDEO] * 9, END]
    elif family == "qwen3_vl":  # its processor puts the time before each frame
        shown = [20, START, *[VIDEO] * 4, END, 21, START, *[VIDEO] * 4, END]
    ids = torch.tensor([[1, *torch.randint(10, 128, (3,), generator=draw).tolist(), *shown, 30, 31, 32]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava_onevision":
        return batch | {"pixel_values_videos": torch.randn(1, 2, 3, 16, 16, generator=draw)}
    return batch | {
        "mm_token_type_ids": 2 * (ids == VIDEO).long(), "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "pixel_values_videos": torch.randn(32, 3 * 2 * 16, generator=draw),
    }  # fmt: skip
