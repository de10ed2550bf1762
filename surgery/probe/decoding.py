"""Every way of generating gives what one full forward pass gives.

Tokens are never compared with tokens: two candidates may be a rounding apart. What `generate` produced is put through
one full pass instead, and the logits there must say that each token was a rightful choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from .loading import forward
from .outcome import Outcome, bounded, failed, skipped
from .subject import Subject, coded_cache, relative, text_config

NEW_TOKENS = 10


def cached_decode_equals_full_forward(subject: Subject) -> Outcome:
    """Prefill and one step per token give the logits of one pass over all of them."""
    tokens = subject.prompts[0]
    start = tokens.shape[1] // 2
    output = subject.model(input_ids=tokens[:, :start], use_cache=True)
    steps = [output.logits]
    for position in range(start, tokens.shape[1]):
        if output.past_key_values is None:
            return failed("the model returns no cache")
        output = subject.model(
            input_ids=tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
        )
        steps.append(output.logits)
    reference = forward(subject.model, tokens)
    return bounded(
        relative(torch.cat(steps, dim=1) - reference, reference), subject.tolerance, "logits with and without"
    )


def greedy_equals_beam_1(subject: Subject) -> Outcome:
    """With one beam, `generate` takes the most likely token at every step."""
    return _is_greedy(subject, _generate(subject, subject.prompts[0], num_beams=1).sequences, subject.prompts[0])


def beam_4(subject: Subject) -> Outcome:
    """Beam search believes of each of its four sequences what a full pass says of it."""
    prompt = subject.prompts[0]
    output = _generate(subject, prompt, num_beams=4, num_return_sequences=4, length_penalty=0.0, output_scores=True)
    if output.sequences.shape != (4, prompt.shape[1] + NEW_TOKENS):
        return failed(f"sequences of shape {tuple(output.sequences.shape)}")
    logits, new = _forced(subject, output.sequences)
    scores = logits.float().log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
    return bounded(relative(output.sequences_scores - scores, scores), subject.tolerance, "scores of the beams")


def num_return_sequences(subject: Subject) -> Outcome:
    """Two samples of one prompt are each drawn from the logits of their own past."""
    prompt = subject.prompts[0]
    torch.manual_seed(int(subject.job.get("seed", 0)))
    output = _generate(subject, prompt, do_sample=True, num_return_sequences=2, output_logits=True)
    if output.sequences.shape != (2, prompt.shape[1] + NEW_TOKENS):
        return failed(f"sequences of shape {tuple(output.sequences.shape)}")
    reference, _ = _forced(subject, output.sequences)
    return bounded(
        relative(torch.stack(output.logits, 1) - reference, reference), subject.tolerance, "logits of samples"
    )


def assisted_decoding(subject: Subject) -> Outcome:
    """Drafts, by the model itself and by looking up the prompt, do not change what greedy decoding gives."""
    cache = subject.model(input_ids=subject.prompts[1], use_cache=True).past_key_values
    if getattr(cache, "is_croppable", True) is False:
        return skipped(f"{type(cache).__name__} declares that it cannot be cropped")
    drafted = _generate(subject, subject.prompts[0], assistant_model=subject.model)
    first = _is_greedy(subject, drafted.sequences, subject.prompts[0])
    if first.status == "fail":
        return first
    repeated = torch.cat([subject.prompts[1]] * 3, dim=1)  # repetition makes it propose, mostly wrongly: crop is used
    looked_up = _generate(subject, repeated, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    return _is_greedy(subject, looked_up.sequences, repeated)


def left_padded_batch(subject: Subject) -> Outcome:
    """A prompt decodes in a left-padded batch as it does alone."""
    long, short = subject.prompts
    gap = long.shape[1] - short.shape[1]
    tokens, mask = padded(subject)
    output = _generate(subject, tokens, attention_mask=mask, output_logits=True)
    logits = torch.stack(output.logits, 1)
    worst = 0.0
    for row, sequence in enumerate((output.sequences[:1], output.sequences[1:, gap:])):
        reference, _ = _forced(subject, sequence)
        worst = max(worst, relative(logits[row : row + 1] - reference, reference))
    return bounded(worst, subject.tolerance, "logits in the batch and alone")


def static_cache(subject: Subject) -> Outcome:
    """Where it is claimed, a preallocated cache decodes greedily too."""
    if not subject.job.get("static_cache"):
        return skipped("not claimed")
    if not getattr(subject.model, "_supports_static_cache", True):
        return skipped("the model class says that this transformers cannot")
    options: dict[str, Any] = {}
    if hasattr(transformers.GenerationConfig(), "disable_compile"):
        options["disable_compile"] = True
    if coded_cache(subject.model.config):
        options["surgery_cache"] = None  # with it on, a static cache is refused
    output = _generate(subject, subject.prompts[0], cache_implementation="static", **options)
    return _is_greedy(subject, output.sequences, subject.prompts[0])


def padded(subject: Subject) -> tuple[Tensor, Tensor]:
    """Both prompts as one left-padded batch, and its mask."""
    long, short = subject.prompts
    gap = long.shape[1] - short.shape[1]
    filler = short.new_full((1, gap), _unused_token(subject))
    mask = torch.ones(2, long.shape[1], dtype=torch.long, device=long.device)
    mask[1, :gap] = 0
    return torch.cat([long, torch.cat([filler, short], dim=1)]), mask


def _generate(subject: Subject, tokens: Tensor, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False} | options
    if "visual_defense" in (getattr(subject.model.config, "surgery", None) or {}):
        options["defense"] = False  # these prompts follow no chat template
    with _plain_generation(subject):
        return subject.model.generate(
            input_ids=tokens, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, **options
        )


@contextmanager
def _plain_generation(subject: Subject) -> Iterator[None]:
    """No penalty or sampling setting of the checkpoint, for `generate` is compared with the bare model, and no end."""
    own = subject.model.generation_config
    never = text_config(subject.model.config).vocab_size  # assisted decoding wants an end token: one that cannot come
    plain = transformers.GenerationConfig(pad_token_id=_unused_token(subject), eos_token_id=never)
    if hasattr(plain, "return_legacy_cache"):
        plain.return_legacy_cache = False  # without it, 4.x warns about the cache that it hands back
    subject.model.generation_config = plain
    try:
        yield
    finally:
        subject.model.generation_config = own


def _unused_token(subject: Subject) -> int:
    """A token that no prompt has, so that padding is never taken for text."""
    used = {int(token) for prompt in subject.prompts for token in prompt.flatten()}
    return next(token for token in range(len(used) + 1) if token not in used)


def _forced(subject: Subject, sequences: Tensor, count: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
    """What one full pass over `sequences` says at each of the last `count` places, and the tokens that stand there."""
    logits = forward(subject.model, sequences[:, :-1])
    return logits[:, -count:], sequences[:, -count:]


def _is_greedy(subject: Subject, sequences: Tensor, prompt: Tensor) -> Outcome:
    """How far the generated tokens fall behind the best ones, on their own path."""
    count = sequences.shape[1] - prompt.shape[1]
    # Up to 5.13, looking up the prompt may give a token more than was asked for.
    if count < NEW_TOKENS or not torch.equal(sequences[:, : prompt.shape[1]], prompt):
        return failed(f"{count} new tokens where {NEW_TOKENS} were asked for, or another prompt")
    logits, new = _forced(subject, sequences, count)
    behind = logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]
    ties = int((behind != 0).sum())
    note = f" ({ties} of {count} tokens are not the very first)" if ties else ""
    return bounded(relative(behind, logits), subject.tolerance, f"distance of the tokens from the best{note}")
