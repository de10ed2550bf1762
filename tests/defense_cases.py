"""Tiny random vision-language checkpoints with a tokenizer and a chat template, for tests of `visual_defense`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import surgery
from tests.tiny_vision import END, IMAGE, START, TOWER, VIDEO, batch_of, config_of, picture

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<image>", "<video>", "<|vs|>", "<|ve|>", "<|im_end|>"]
MEAN, STD = [0.4, 0.45, 0.5], [0.2, 0.25, 0.3]
# Two kinds of template: one with tokens of its own for turns, one that writes them as words.
TOKENS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vs|><image><|ve|>{% elif c['type'] == 'video' %}<|vs|><video><|ve|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Written after LLaVA-OneVision's, where text has a line of its own, and LLaVA-NeXT's, whose turns share a piece.
LINES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ '\n' + c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% else %} {{ m['content'][0]['text'] }}</s> {% endif %}{% endfor %}"
)
WRITTEN = [
    "**[ **[ **[ ]** ]** ]**\n ]**\n Where is the cat? What is shown here? How many are there. ]: ]:\n .[ ]\n\n ]: ]\n\n .[ .[ ]: [FINAL [FINAL",
    "The answer is seven, and nothing else.\n\n[FINAL RESPONSE] [INTENTION ANALYSIS] REQUEST:\n",
]


def tokenizer() -> Any:
    """Byte pairs learned from the templates and a few sentences, so that tokens join across the edges of tags."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from surgery.operations.visual_defense import TEMPLATES

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TEMPLATES.values(), *WRITTEN], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_base(folder: Path, family: str, *, template: str = TOKENS, **text: Any) -> Path:
    """A random checkpoint of a family, in float32, with everything that its processor would have."""
    import transformers

    torch.manual_seed(0)
    config = config_of(family)
    for name, value in {"vocab_size": 640, "max_position_embeddings": 4096, **text}.items():
        setattr(config.get_text_config(), name, value)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "newline" in name:
                parameter.normal_(0, 1)
    model.save_pretrained(folder)
    made = tokenizer()
    made.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def write_clip(folder: Path, base: Path, *, end: int = 2) -> Path:
    """A random CLIP model whose vision tower is that of `base`, with the tokenizer above; its texts end in `end`."""
    import transformers
    from safetensors.torch import load_file
    from tokenizers import processors

    torch.manual_seed(1)
    text = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 640,
        "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": end, "layer_norm_eps": 1e-3,
    }  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    stored = load_file(base / "model.safetensors")
    tower = {name.partition("vision_tower.")[2]: tensor for name, tensor in stored.items() if "vision_tower." in name}
    model.vision_model.load_state_dict({name.removeprefix("vision_model."): part for name, part in tower.items()})
    model.save_pretrained(folder)
    made, last = tokenizer(), SPECIAL[end]
    ends = processors.TemplateProcessing(single=f"<s> $A {last}", special_tokens=[("<s>", 1), (last, end)])
    made.backend_tokenizer.post_processor = ends
    made.save_pretrained(folder)
    return folder


def convert(base: Path, out: Path, *operations: dict[str, Any], **settings: Any) -> Path:
    data = {"surgery": 1, "operations": [*operations, {"visual_defense": settings}], "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).out


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


def chat(text: str | Sequence[str], images: int = 1) -> list[dict[str, Any]]:
    """A conversation whose first turn shows `images`; several texts alternate between user and assistant."""
    turns = [text] if isinstance(text, str) else list(text)
    roles = ["user", "assistant"] * len(turns)
    shown = [{"type": "image"}] * images
    return [
        {"role": role, "content": [*(shown if number == 0 else []), {"type": "text", "text": turn}]}
        for number, (role, turn) in enumerate(zip(roles, turns, strict=False))
    ]


def ids_of(made: Any, template: str, conversation: Any, tokens: int) -> list[int]:
    """The ids of a conversation, with as many tokens for each image as it becomes."""
    text = made.apply_chat_template(conversation, chat_template=template, tokenize=False, add_generation_prompt=True)
    ids = made(text, add_special_tokens=False)["input_ids"]
    return [one for token in ids for one in ([token] * tokens if token == IMAGE else [token])]


def batch(
    family: str, conversations: Sequence[Any], counts: Sequence[int], *, template: str = TOKENS, seed: int = 0
) -> dict[str, Tensor]:
    """What a processor makes of conversations with so many images each, padded on the left."""
    made = tokenizer()
    pictures = [picture(family, seed=seed + 10 * number)[0] for number in range(sum(counts))]
    rows = [ids_of(made, template, conversation, picture(family)[1]) for conversation in conversations]
    return batch_of(family, rows, pictures)


__all__ = ["END", "IMAGE", "MEAN", "START", "STD", "TOKENS", "VIDEO", "WORDS", "batch", "chat", "convert", "load"]
