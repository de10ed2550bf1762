"""The losses of healing, as pure functions of tensors. Logits are in any float type and are computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits whose distributions are held at once; larger ones are computed again in the backward pass.
CHUNK_ELEMENTS = 1 << 27


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over positions of KL(teacher || student) in nats, for logits [..., V], times the temperature squared.

    The square keeps gradients at the size that they have at temperature 1 (Hinton et al. 2015, section 2.1).
    """
    return _summed(_divergence, (teacher, student), temperature) * (temperature**2 / teacher[..., 0].numel())


def paper_kl(teacher: Tensor, student: Tensor, temperature: float = 10.0) -> Tensor:
    """As KV-Latent's code has it: summed over positions, divided by the sequences, without the temperature's square."""
    return _summed(_divergence, (teacher, student), temperature) / len(teacher)


def stored_kl(log_probabilities: Tensor, tokens: Tensor, student: Tensor) -> Tensor:
    """As `kl` at temperature 1, against the teacher's k most likely tokens [..., k] and one bucket for all the others.

    Merging outcomes can only lower a divergence, so this is a lower bound of `kl`.
    """
    return _summed(_bucketed, (log_probabilities, tokens, student), 1.0) / tokens[..., 0].numel()


def next_token(student: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, T, V] on the tokens [B, T] that follow."""
    return functional.cross_entropy(student[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def hidden_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared error over tokens and channels of hidden states [B, T, D]."""
    return functional.mse_loss(student.float(), teacher.float())


def relative_errors(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the squared error of hidden states [B, T, D], each over the variance of the teacher's."""
    pairs = zip(teacher, student, strict=True)
    errors = [hidden_mse(wanted, found) / wanted.float().var().clamp_min(1e-12) for wanted, found in pairs]
    return torch.stack(errors).mean()


def top_log_probabilities(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of logits [..., V] and their log-probabilities, each [..., count]."""
    found = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return found.values, found.indices


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    expected = (teacher.float() / temperature).log_softmax(-1)
    found = (student.float() / temperature).log_softmax(-1)
    return functional.kl_div(found, expected, reduction="sum", log_target=True)


def _bucketed(log_probabilities: Tensor, tokens: Tensor, student: Tensor, temperature: float) -> Tensor:
    found = (student.float() / temperature).log_softmax(-1).gather(-1, tokens.long())
    expected = log_probabilities.float()
    inside = (expected.exp() * (expected - found)).sum()
    rest, left = _rest(expected), _rest(found)
    return inside + (rest * (rest.log() - left.log())).sum()


def _rest(log_probabilities: Tensor) -> Tensor:
    """The probability that is left for all other tokens, kept above zero for its logarithm."""
    return (-torch.expm1(log_probabilities.logsumexp(-1))).clamp_min(1e-7)


def _summed(compute: Callable[..., Tensor], parts: tuple[Tensor, ...], temperature: float) -> Tensor:
    """Sum of `compute` over positions, in chunks that are recomputed where the whole would be large."""
    flat = [part.flatten(0, -2) for part in parts]
    size = max(1, CHUNK_ELEMENTS // flat[-1].shape[-1])
    if len(flat[-1]) <= size:
        return compute(*flat, temperature)
    chunks = zip(*(part.split(size) for part in flat), strict=True)
    sums = [checkpoint(compute, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()
