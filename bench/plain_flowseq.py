"""FlowSeq's argmax decoding in plain PyTorch, a call for each step as in the authors' code.

Reads the weights of a `pynar.models.FlowSeq`. Sequences are padded and masked; keys and values of
the source are projected anew for every coupling and decoder layer, weights are normalised in every
call, and states are written anew by every actnorm and every matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.models import FlowSeq
from pynar.nn.embedding import sinusoids
from pynar.nn.flows import ActNorm, ActNormLinear, Coupling

__all__ = ["argmax"]


def mask_of(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def places(first: int, x: Tensor) -> Tensor:
    """Position vectors of as many steps as `x: [B, T, C]` has, from `first` on."""
    return sinusoids(x.shape[1] + first, x.shape[2], x.device)[first:]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """`[B, T, C]` to `[B, S, C]`, of which `mask: [B, S]` is live."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    hidden = ~mask.repeat_interleave(heads, 0)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    y = torch.bmm(weights, v).unflatten(0, (-1, heads))
    return y.transpose(1, 2).flatten(2)


def feed_forward(module: Any, x: Tensor) -> Tensor:
    return module.outer(module.activation(module.inner(x)))  # type: ignore[no-any-return]


def layer(
    module: Any, x: Tensor, mask: Tensor, source: Tensor | None = None, sees: Tensor | None = None
) -> Tensor:
    """A post-norm layer of the encoder or the decoder."""
    own = module.self_attention
    y = attend(*own.qkv(x).chunk(3, -1), own.heads, mask)
    x = module.residual[0].norm(x + own.output(y))
    if source is not None and sees is not None:
        cross = module.cross_attention
        k, v = cross.key_value(source).chunk(2, -1)
        y = attend(cross.query(x), k, v, cross.heads, sees)
        x = module.residual[1].norm(x + cross.output(y))
    return module.residual[-1].norm(x + feed_forward(module.feed_forward, x))  # type: ignore[no-any-return]


def by_position(module: Any, x: Tensor, mask: Tensor) -> Tensor:
    positions = places(1, x)
    k, v = module.key_value(x).chunk(2, -1)
    y = attend(module.query(positions).expand_as(x), k, v, module.heads, mask)
    return module.norm(positions + y)  # type: ignore[no-any-return]


def coupling(
    module: Coupling, key_value: tuple[Tensor, Tensor], z: Tensor, mask: Tensor, memory: Any
) -> tuple[Tensor, Tensor]:
    first, second = module._halves(z)
    given, changed = (first, second) if module.up else (second, first)
    if module.split == "steps":
        mask = mask[:, ::2]
    net, (source, sees) = module.net, memory
    if net.positions is not None:
        x = by_position(net.positions, given, mask)
    else:
        x = given + places(1, given)
    x = net.norms[0](x + attend(*net.qkv(x).chunk(3, -1), net.heads, mask))
    k, v = F.linear(source, *key_value).chunk(2, -1)
    x = net.norms[1](x + attend(net.query(x), k, v, net.heads, sees))
    x = net.norms[2](x + feed_forward(net.feed_forward, x))
    shift, raw_scale = net.output(x).chunk(2, -1)
    scale = (raw_scale + 2).sigmoid()
    live = mask[..., None]
    changed = (changed - shift).div(scale + 1e-12) * live
    logdet = -(scale.log() * live).sum((1, 2))
    return module._join(*((given, changed) if module.up else (changed, given))), logdet


def matrix(module: ActNormLinear, inverse: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    width = len(inverse)
    heads = z.shape[2] // width
    if module.layout == "contiguous":
        x = z.unflatten(2, (heads, width)) @ inverse.T
        return x.flatten(2) * mask[..., None]
    x = z.unflatten(2, (width, heads)).transpose(2, 3) @ inverse.T
    return x.transpose(2, 3).flatten(2) * mask[..., None]


def actnorm(module: ActNorm, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    z = (z - module.bias) / (module.log_scale.exp() + 1e-8) * mask[..., None]
    return z, -module.log_scale.sum() * mask.sum(1)


def sample(model: FlowSeq, noise: Tensor, lengths: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
    """z of noise, and the log-determinant."""
    flow, x = model.prior, noise
    inverses = iter(reversed(flow.factors()[1]))  # a buffer there
    weights = flow.key_value_weight.split([2 * w for w in flow._widths])
    biases = flow.key_value_bias.split([2 * w for w in flow._widths])
    kept, left = flow.dim // 2, []
    masks = [mask_of(lengths >> level, x.shape[1] >> level) for level in range(len(flow.levels))]
    for _ in flow.levels[:-1]:
        left.append(x[..., kept:])
        x = x[..., :kept].reshape(len(x), -1, flow.dim)
    total = x.new_zeros(len(x))
    for level, mask in zip(reversed(flow.levels), reversed(masks), strict=True):
        if level is not flow.levels[-1]:
            x = torch.cat([x.reshape(len(x), -1, kept), left.pop()], -1)
        for module in reversed(level):
            if isinstance(module, Coupling):
                key_value = weights[module.number], biases[module.number]
                x, logdet = coupling(module, key_value, x, mask, memory)
            else:
                logdet = x.new_zeros(())
                if isinstance(module, ActNormLinear):
                    inverse = next(inverses)
                    x = matrix(module, inverse, x, mask)
                    heads = flow.dim // len(inverse)
                    logdet = heads * mask.sum(1) * inverse.slogdet()[1]
                x, norm = actnorm(module, x, mask)
                logdet = logdet + norm
            total = total + logdet
    return x, total


def argmax(model: FlowSeq, source: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
    """The most probable tokens `[B, T]` of the mode of z, and log p(z | x) `[B]`."""
    sees = mask_of(source_lengths, source.shape[1])
    embedding = model.source_embedding
    x = embedding.embed(source) + embedding.positions(0, source.shape[1])
    for one in model.encoder.layers:
        x = layer(one, x, sees)
    width = int(lengths.max())
    mask = mask_of(lengths, width)
    noise = x.new_zeros(len(source), width, model.config.dim)
    z, _ = sample(model, noise, lengths, (x, sees))
    y = by_position(model.gather, z, mask)
    for one in model.decoder.layers:
        y = layer(one, y, mask, x, sees)
    return (model.logits(y) + model.exclusion).argmax(-1)
