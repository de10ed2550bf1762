"""Narrowing one attention layer in closed form, from calibration activations.

    1. pairs   drop pairs one at a time, by the loss of attention-weighted logits after refitting gains
    2. Q, K    complex least-squares gains, then a layer-local least-squares fit of both projections
    3. V, O    truncated SVD of the stacked maps O_h V_g under the moment of the attention-averaged inputs
    4. O       ridge regression onto the original residual stream, with inputs from the already converted layers

All of it is ours (the published method keeps every s-th channel and trains). Statistics are sums over windows, and
nothing of size T x T per head outlives a chunk. Letters as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.operations.kv_latent.attention import CHUNK, Attention, head_outputs, logits, rotated

RIDGE = 1e-4  # relative to the mean diagonal of the normal matrix
MOMENT_RIDGE = 3e-5
GAIN_RIDGE = 1e-6
WHITENING_RIDGE = 1e-5


@torch.no_grad()
def pair_gram(x: Tensor, queries: Tensor, a: Attention, chunk: int = CHUNK // 2) -> Tensor:
    """Gram matrix of the pairs' contributions to the logits, [H, 2P, 2P] in fp64.

    Pair j adds c_j = Re(q_j conj k_j) to a logit; c_{P+j} is the imaginary part, what a complex gain on q_j could add.
    Gram = mean over queries of sum_n p_n (c - E_p c)(c - E_p c)^T with p the attention itself: the second-order effect
    on the softmax, which does not feel constants.
    """
    heads, pairs = a.w_q.shape[0], a.cos.shape[-1]
    gram = torch.zeros(heads, 2 * pairs, 2 * pairs, dtype=torch.float64, device=x.device)
    for part, asked in zip(x.split(chunk), queries.split(chunk), strict=True):
        attention = logits(part, a, asked).softmax(-1)
        query, key = rotated(part, a, asked)
        for head in range(heads):
            q1, q2 = query[:, head, :, None].chunk(2, -1)
            k1, k2 = key[:, head // a.group, None].chunk(2, -1)
            terms = torch.cat([q1 * k1 + q2 * k2, q1 * k2 - q2 * k1], -1)
            weight = attention[:, head, :, :, None]
            terms = ((terms - (weight * terms).sum(2, keepdim=True)) * weight.sqrt()).reshape(-1, 2 * pairs)
            gram[head] += (terms.T @ terms).double()
    return gram / queries.numel()


def gains(gram: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Least-squares complex gains [2 len(kept)] of one head's pairs (real parts, then imaginary), and their loss."""
    pairs = gram.shape[0] // 2
    total, target = gram[:pairs, :pairs].sum(), gram[:, :pairs].sum(1)
    rows = torch.tensor([*kept, *(pairs + pair for pair in kept)], device=gram.device)
    found = torch.linalg.solve(_damped(gram, GAIN_RIDGE)[rows][:, rows], target[rows])
    return found, total - target[rows] @ found


def select_pairs(orders: list[list[int]], keep: int) -> list[list[int]]:
    """For each KV head the `keep` pairs that go last."""
    return [sorted(order[len(order) - keep :]) for order in orders]


def drop_orders(gram: Tensor, kv_heads: int, *, free: bool) -> list[list[int]]:
    """For each KV head its pairs in the order in which they go: the least loss first, judged together with all others.

    The loss is summed over the heads of the group; with `free` gains it is what is left after refitting them.
    """
    order = _order_refitted if free else _order_as_is
    return [order(heads) for heads in gram.chunk(kv_heads)]


def _order_as_is(gram: Tensor) -> list[int]:
    pairs = gram.shape[-1] // 2
    summed = gram[:, :pairs, :pairs].sum(0)
    loss, kept, order = summed.diagonal().clone(), list(range(pairs)), []
    while kept:
        gone = kept.pop(int(loss[kept].argmin()))
        order.append(gone)
        loss += 2 * summed[gone]  # of dropping each next
    return order


def _order_refitted(gram: Tensor) -> list[int]:
    """Backward elimination in the inverse normal matrix B: dropping rows S costs f_S B_SS^-1 f_S, with f the gains."""
    pairs = gram.shape[-1] // 2
    inverse = torch.linalg.inv(torch.stack([_damped(head, GAIN_RIDGE) for head in gram]))
    found = inverse @ gram[:, :, :pairs].sum(2, keepdim=True)
    kept, order = list(range(pairs)), []
    while kept:
        rows = torch.tensor([[pair, pairs + pair] for pair in kept], device=gram.device)
        fitted = found[:, rows]
        blocks = inverse[:, rows[:, :, None], rows[:, None, :]]
        at = int((fitted * torch.linalg.solve(blocks, fitted)).sum((0, 2, 3)).argmin())
        order.append(kept.pop(at))
        column = inverse[:, :, rows[at]]
        found = found - column @ torch.linalg.solve(blocks[:, at], fitted[:, at])
        inverse = inverse - column @ torch.linalg.solve(blocks[:, at], column.mT)
    return order


def reduce_qk(a: Attention, pairs: list[list[int]], gram: Tensor | None) -> Attention:
    """Keep `pairs` of every KV head; with a Gram matrix, the gains fitted to it go into the rows of the queries."""
    width, device = a.qk_dim, a.w_q.device
    kept = torch.tensor(pairs, device=device)
    channels = torch.cat([kept, kept + width // 2], -1)
    cos = a.cos.gather(-1, kept[:, None, :].expand(-1, a.cos.shape[1], -1))
    sin = a.sin.gather(-1, kept[:, None, :].expand(-1, a.sin.shape[1], -1))
    if a.norm_query is not None:
        # A norm over all channels comes first, so rows stay and channels are taken after it.
        return replace(a, channels=channels, cos=cos, sin=sin)
    real, imaginary = a.w_q.new_ones(len(a.w_q), kept.shape[-1]), a.w_q.new_zeros(len(a.w_q), kept.shape[-1])
    if gram is not None:
        found = torch.stack([gains(gram[h], pairs[h // a.group])[0] for h in range(len(a.w_q))])
        real, imaginary = found.to(a.w_q.dtype).chunk(2, -1)

    def query_rows(full: Tensor) -> Tensor:
        flat = full.reshape(*full.shape[:2], -1)
        at = channels.repeat_interleave(a.group, 0)[..., None].expand(-1, -1, flat.shape[-1])
        one, two = flat.gather(1, at).chunk(2, 1)
        re, im = real[..., None], imaginary[..., None]
        return torch.cat([re * one - im * two, re * two + im * one], 1).reshape(len(full), -1, *full.shape[2:])

    def key_rows(full: Tensor) -> Tensor:
        return torch.stack([head[rows] for head, rows in zip(full, channels, strict=True)])

    return replace(
        a, w_q=query_rows(a.w_q), w_k=key_rows(a.w_k), cos=cos, sin=sin,
        b_q=None if a.b_q is None else query_rows(a.b_q), b_k=None if a.b_k is None else key_rows(a.b_k),
    )  # fmt: skip


def refit_qk(
    x: Tensor, original_x: Tensor, queries: Tensor, original: Attention, a: Attention, steps: int
) -> Attention:
    """Fit both projections of every KV head to the original logits, by L-BFGS on a bilinear least-squares problem.

    Minimizes the mean over queries of sum_n p_n e_n^2 - (sum_n p_n e_n)^2, where e is the logit error (`a` on `x`
    against `original` on `original_x`) and p the original attention. A row at a kept frequency may become any linear
    function of the input, since rotation commutes with what is done before it. Inputs are whitened so that few steps
    suffice. A KV head that this does not improve keeps what it had.
    """
    flat = x.flatten(0, 1)
    factor = torch.linalg.cholesky(_damped((flat.T @ flat).double() / len(flat), WHITENING_RIDGE))
    inverse, factor = torch.linalg.inv(factor).to(x.dtype), factor.to(x.dtype)
    fitted = [
        _fit_group(x, original_x, queries, _group(original, g), _group(a, g), factor, inverse, steps)
        for g in range(len(a.w_k))
    ]
    joined: dict[str, Any] = {name: torch.cat([one[name] for one in fitted]) for name in fitted[0]}
    return replace(a, **joined)


def _fit_group(
    x: Tensor, original_x: Tensor, queries: Tensor, original: Attention, a: Attention,
    factor: Tensor, inverse: Tensor, steps: int,
) -> dict[str, Tensor]:  # fmt: skip
    asked = queries.split(CHUNK)
    with torch.no_grad():
        targets = [logits(part, original, q) for part, q in zip(original_x.split(CHUNK), asked, strict=True)]
    given = {name: found for name in ("w_q", "w_k", "b_q", "b_k") if (found := getattr(a, name)) is not None}
    whitened = {"w_q": a.w_q @ factor, "w_k": a.w_k @ factor}
    free = {name: tensor.detach().clone().requires_grad_() for name, tensor in (given | whitened).items()}

    def pieces(x: Tensor, tensors: dict[str, Any]) -> Iterator[Tensor]:
        for part, q, target in zip(x.split(CHUNK), asked, targets, strict=True):
            weight = target.softmax(-1)
            error = (logits(part, replace(a, **tensors), q) - target).masked_fill(weight == 0, 0.0)
            yield ((weight * error**2).sum(-1) - (weight * error).sum(-1) ** 2).sum() / queries.numel()

    white = x @ inverse.T

    def loss() -> float:
        total = 0.0
        for piece in pieces(white, free):
            piece.backward()
            total += piece.item()
        return total

    _lbfgs(list(free.values()), loss, steps)
    found = {name: tensor.detach() for name, tensor in free.items()}
    found |= {"w_q": found["w_q"] @ inverse, "w_k": found["w_k"] @ inverse}
    with torch.no_grad():
        before, after = (float(sum(pieces(x, tensors))) for tensors in (given, found))
    return found if after < before else given


def _lbfgs(parameters: list[Tensor], loss: Callable[[], float], steps: int) -> None:
    """Minimize `loss`, which back-propagates in pieces and returns its value."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=steps + steps // 4 + 2, history_size=10, line_search_fn="strong_wolfe"
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            return torch.tensor(loss())

    optimizer.step(evaluate)


def _group(a: Attention, g: int) -> Attention:
    """Queries and keys of KV head `g` alone; the logits of KV heads do not depend on each other."""
    heads, one = slice(g * a.group, (g + 1) * a.group), slice(g, g + 1)
    return replace(
        a, w_q=a.w_q[heads], w_k=a.w_k[one], cos=a.cos[one], sin=a.sin[one],
        b_q=None if a.b_q is None else a.b_q[heads], b_k=None if a.b_k is None else a.b_k[one],
    )  # fmt: skip


@torch.no_grad()
def averaged_moment(x: Tensor, queries: Tensor, a: Attention) -> Tensor:
    """C_g = mean of z z^T over queries and the group's heads, with z = sum_n p_n x_n. [G, D, D] in fp64."""
    kv_heads, width = len(a.w_k), x.shape[-1]
    moment = torch.zeros(kv_heads, width, width, dtype=torch.float64, device=x.device)
    for part, asked in zip(x.split(CHUNK), queries.split(CHUNK), strict=True):
        for g, weights in enumerate(logits(part, a, asked).softmax(-1).chunk(kv_heads, 1)):
            averaged = (weights.flatten(1, 2) @ part).flatten(0, 1).double()
            moment[g] += averaged.T @ averaged
    return moment / (queries.numel() * a.group)


def reduce_vo(a: Attention, moment: Tensor, width: int) -> Attention:
    """The best replacement of rank `width` of each group's stacked map S = [O_h V_g]_h, under E ||(S - S') z||^2.

    With C = L L^T and S L = U Sigma W^T: V' = W_r^T L^-1, O' = U_r Sigma_r; the error is the sum of the dropped
    sigma^2. The SVD is of a core of the head's width, after a QR of both sides. KV-Latent's authors rule a basis change
    out, because rotation comes between queries and keys; values are not rotated.
    """
    values, outputs = [], []
    for g, (value, second) in enumerate(zip(a.w_v, moment, strict=True)):
        factor = torch.linalg.cholesky(_damped(second, MOMENT_RIDGE))
        stacked = a.w_o[:, g * a.group : (g + 1) * a.group].transpose(0, 1).flatten(0, 1).double()
        q_out, r_out = torch.linalg.qr(stacked)
        q_in, r_in = torch.linalg.qr((value.double() @ factor).T)
        left, sigma, right = torch.linalg.svd(r_out @ r_in.T)
        rows = (q_in @ right[:width].T).T
        values.append(torch.linalg.solve_triangular(factor, rows, upper=False, left=False))
        outputs.append(((q_out @ left[:, :width]) * sigma[:width]).unflatten(0, (a.group, -1)))
    w_o = torch.cat(outputs).transpose(0, 1).to(a.w_o.dtype).contiguous()
    return replace(a, w_v=torch.stack(values).to(a.w_v.dtype), w_o=w_o)


@torch.no_grad()
def refit_o(x: Tensor, a: Attention, target: Tensor, ridge: float = RIDGE) -> Attention:
    """Ridge regression of the output projection onto `target` [N, T, D], centred on the present one.

    W = W0 + (A^T A + lambda I)^-1 A^T (Y - A W0), A the head outputs. An output bias is fitted along.
    """
    size = a.w_o.shape[1] * a.w_o.shape[2] + (a.b_o is not None)
    normal = torch.zeros(size, size, dtype=torch.float64, device=x.device)
    cross = torch.zeros(size, target.shape[-1], dtype=torch.float64, device=x.device)
    weight = a.w_o.flatten(1).T.double()
    if a.b_o is not None:
        weight = torch.cat([weight, a.b_o[None].double()])
    for part, wanted in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        out = head_outputs(part, a).flatten(2).flatten(0, 1).double()
        if a.b_o is not None:
            out = torch.cat([out, torch.ones_like(out[:, :1])], 1)
        normal += out.T @ out
        cross += out.T @ wanted.flatten(0, 1).double()
    weight = weight + torch.linalg.solve(_damped(normal, ridge), cross - normal @ weight)
    if a.b_o is not None:
        weight, bias = weight[:-1], weight[-1].to(a.b_o.dtype)
        a = replace(a, b_o=bias)
    return replace(a, w_o=weight.T.reshape(a.w_o.shape).to(a.w_o.dtype).contiguous())


def _damped(matrix: Tensor, ridge: float) -> Tensor:
    size = matrix.shape[-1]
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(size, dtype=matrix.dtype, device=matrix.device)
