"""Pruned visual tokens: none at reserve 1.0, and gone from the cache below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .outcome import Outcome, skipped, verdict
from .sampled import loaded_processor, prompt
from .subject import Subject, load_model, relative

SIDE = 96  # pixels of the image that is shown
QUESTION = "What is this?"


def visual_pruning(subject: Subject) -> Outcome:
    """With all visual tokens the logits are the base's; with fewer, every layer caches only what stays."""
    settings = (getattr(subject.model.config, "surgery", None) or {}).get("visual_pruning")
    if settings is None:
        return skipped("it prunes no visual tokens")
    processor, why = loaded_processor(subject)
    if processor is None:
        return skipped(why)
    inputs = _inputs(subject, processor)
    whole = subject.model(**inputs, visual_reserve=1.0, use_cache=False).logits
    problems = []
    base = subject.job.get("against")
    if base is not None:
        native, _ = load_model(Path(base), subject.job, base=True)
        difference = relative(native(**inputs, use_cache=False).logits - whole, whole)
        if not difference <= subject.precision:
            problems.append(f"with all visual tokens it is off by {difference:.3g} of the base's largest logit")
    shown = int(torch.isin(inputs["input_ids"], torch.tensor(settings["token_ids"], device=subject.device)).sum())
    output = subject.model(**inputs, use_cache=True)
    length, kept = inputs["input_ids"].shape[1], output.logits.shape[1]
    subject.measurements["visual_tokens"], subject.measurements["visual_tokens_kept"] = shown, shown - (length - kept)
    if settings["reserve"] < 1 and not kept < length:
        problems.append(f"none of {shown} visual tokens left the prompt")
    last = subject.model.config.get_text_config().num_hidden_layers - 1  # layers before it may hold more
    if output.past_key_values.get_seq_length(last) != kept or not output.logits.isfinite().all():
        problems.append("the cache does not hold what the logits are of, or these are not finite")
    tokens = subject.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    if tokens.shape[1] <= length:
        problems.append("generate gives no token")
    return verdict(problems, f"{shown - (length - kept)} of {shown} visual tokens stay")


def _inputs(subject: Subject, processor: Any) -> dict[str, Any]:
    """A prompt with an image of noise, by the checkpoint's own processor."""
    from PIL import Image

    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return prompt(processor, Image.fromarray(pixels.numpy()), QUESTION, subject.device)
