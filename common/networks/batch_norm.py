"""BatchNorm over the joined batch of several processes, one collective per pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from common.runtime.precision import wide

# torch 2.14 gives the function a new name and warns at the old one.
if dist.is_available():
    _all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class BatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of all processes' images together.

    Input float `[B, C]` or `[B, C, H, W]`, float32, bfloat16 or float64, contiguous or
    channels_last; the output has the same dtype. Statistics, sums and running averages are
    computed in float32 (float64 for float64). Outputs, gradients of the input and running averages
    equal those of BatchNorm over the joined batch; gradients of weight and bias are each process's
    part of the sum, which DDP averages. In eval mode, and where there is one process, it is
    `torch.nn.functional.batch_norm`.

    Unlike `torch.nn.SyncBatchNorm` it never waits for the device, works on CPUs (gloo), and
    torch.compile traces it without a graph break. In exchange every process must have the same
    number of images, as all training steps here do: this is not checked. Several views can share
    a pass (`views_in_batch`).

    The state dict is BatchNorm's. `num_batches_tracked` is kept there but does not change: it has
    no effect at a fixed momentum, and counting would launch a kernel per pass.
    """

    synchronised = True  # False: each process uses the statistics of its own images

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        averages = (self.running_mean, self.running_var)
        if not (self.training and self.synchronised and _has_others()):
            options = (self.training, self.momentum, self.eps)
            return F.batch_norm(x, *averages, self.weight, self.bias, *options)
        x = _dense(x)
        if x.is_cuda and not torch.compiler.is_compiling():  # compiled formulas are fewer kernels
            options = (self.momentum, self.eps, _views)
            return _Fused.apply(x, self.weight, self.bias, *averages, *options)
        with torch.no_grad():
            mean, inverse = _joined(x, _views, *averages, self.momentum, self.eps)
        return _Normalise.apply(x, mean, inverse, self.weight, self.bias)


_views = 1


@contextmanager
def views_in_batch(count: int) -> Iterator[None]:
    """Within it, every batch holds `count` views of the same images, one after the other.

    Each view is normalised by statistics of its own, as if it were passed alone, and the running
    averages follow view by view. For networks of which `can_join_views` is true.
    """
    global _views
    _views = count
    try:
        yield
    finally:
        _views = 1


def can_join_views(network: nn.Module) -> bool:
    """Whether views can share a training pass of the network (`views_in_batch`), and gain by it.

    True on several processes if every BatchNorm is this module's and synchronised: the views then
    share collectives and launches. On one process they do not gain: the copies that bring two
    views' gradients together cost a GPU more than the launches cost the host.
    """
    if not _has_others():
        return False
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    ours = [isinstance(layer, BatchNorm) and layer.synchronised for layer in layers]
    return bool(ours) and all(ours)


def convert(module: nn.Module, *, synchronised: bool = True) -> nn.Module:
    """Replace every BatchNorm inside the module by `BatchNorm`, in place.

    The new layers share parameters and buffers with the old ones, and have their names.

    Args:
        synchronised: False: each process uses the statistics of its own images.

    Returns:
        The module; if it is itself a BatchNorm, the layer that replaces it.

    Raises:
        ValueError: for a BatchNorm without running averages or without a fixed momentum.
    """
    if isinstance(module, _BatchNorm):
        if module.momentum is None or not module.track_running_stats:
            raise ValueError(f"{module}: only layers with running averages and a fixed momentum")
        layer = BatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        layer.synchronised = synchronised
        layer.weight, layer.bias = module.weight, module.bias
        layer.running_mean, layer.running_var = module.running_mean, module.running_var
        layer.num_batches_tracked = module.num_batches_tracked
        return layer.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert(child, synchronised=synchronised))
    return module


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _dense(x: Tensor) -> Tensor:
    """Contiguous, or channels_last as it is."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()


def _gather(own: Tensor) -> Tensor:
    """A vector `[n]` of every process: `[world_size, n]`."""
    everyones = own.new_empty(dist.get_world_size() * len(own))
    _all_gather(everyones, own, group=dist.group.WORLD)  # torch.compile of 2.6 needs the group
    return everyones.view(-1, len(own))


# ---------------------------------------------------------------- formulas


def _sum(x: Tensor, views: int) -> Tensor:
    """The sums over each view's images and pixels, `[V · B, C, …]` to `[V, C]`."""
    return x.unflatten(0, (views, -1)).sum(dim=[1, *range(3, x.dim() + 1)])


def _broadcast(vectors: Tensor, x: Tensor) -> Tensor:
    """`[V, C]`, or `[C]` for all views, in a shape that broadcasts over x `[V · B, C, …]`."""
    if vectors.dim() == 2 and len(vectors) > 1:
        vectors = vectors.repeat_interleave(len(x) // len(vectors), dim=0)
    return vectors.view(-1, x.shape[1], *[1] * (x.dim() - 2))


def _count(x: Tensor, views: int) -> int:
    """Images times pixels of a view on this process."""
    return x.numel() // (x.shape[1] * views)


def _joined(
    x: Tensor, views: int, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) over all processes, `[V, C]`; the running averages follow.

    Each process sends mean and variance, not sums of x and x²: where the mean is large, the
    difference of such sums would lose the variance's digits. Of equal shares the joined variance
    is the mean of the variances plus the variance of the means (Chan et al. 1979).
    """
    by_view = wide(x).unflatten(0, (views, -1))
    dims = [1, *range(3, by_view.dim())]
    own = torch.stack(torch.var_mean(by_view, dim=dims, correction=0))  # [2, V, C]
    variances, means = _gather(own.flatten()).view(-1, *own.shape).unbind(1)  # [world_size, V, C]
    between, mean = torch.var_mean(means, dim=0, correction=0)
    var = variances.mean(dim=0) + between
    count = _count(x, views) * len(means)
    unbiased = var * (count / (count - 1))
    for view in range(views):
        running_mean.lerp_(mean[view].to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased[view].to(running_var.dtype), momentum)
    return mean, torch.rsqrt(var + eps)


class _Normalise(torch.autograd.Function):
    """(x − mean) · inverse · weight + bias; backward takes mean and inverse as functions of x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, inverse, weight)
        y = (wide(x) - _broadcast(mean, x)) * _broadcast(inverse, x)
        if weight is not None:
            y = y * _broadcast(weight, x) + _broadcast(bias, x)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        views = len(mean)
        dy_wide = wide(dy)
        x_hat = (wide(x) - _broadcast(mean, x)) * _broadcast(inverse, x)
        own = torch.stack([_sum(dy_wide, views), _sum(dy_wide * x_hat, views)])  # [2, V, C]
        total = own.clone()
        dist.all_reduce(total)
        total = total / (_count(x, views) * dist.get_world_size())
        mean_dy, mean_dy_x_hat = (_broadcast(part, x) for part in total)
        scale = inverse if weight is None else inverse * weight
        dx = (dy_wide - mean_dy - x_hat * mean_dy_x_hat) * _broadcast(scale, x)
        own_bias, own_weight = (None, None) if weight is None else own.sum(dim=1)
        return dx.to(x.dtype), None, None, own_weight, own_bias


# ---------------------------------------------------------------- the same by CUDA's kernels


def _joined_fused(
    views: Sequence[Tensor], running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> list[tuple[Tensor, Tensor]]:
    """As `_joined`: mean and inverse `[C]` of each view `[B, C, …]`."""
    own = torch.cat([part for view in views for part in torch.batch_norm_stats(view, eps)])
    everyones = _gather(own).chunk(2 * len(views), dim=1)  # of each view means and inverses
    counts = _counts(_count(views[0], 1), len(everyones[0]), own.dtype, own.device)
    options = (running_mean, running_var, momentum, eps, counts)
    return [
        torch.batch_norm_gather_stats_with_counts(view, means, inverses, *options)
        for view, means, inverses in zip(views, everyones[::2], everyones[1::2], strict=True)
    ]


@cache
def _counts(count: int, world_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images times pixels of each process, `[world_size]`: made once, as it never changes."""
    return torch.full((world_size,), count, dtype=dtype, device=device)


class _Fused(torch.autograd.Function):
    """Statistics and normalisation by the kernels of torch.nn.SyncBatchNorm, view by view."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        views: int,
    ) -> Tensor:
        parts = x.chunk(views)
        joined = _joined_fused(parts, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, *sum(joined, ()))
        y = torch.empty_like(x)
        for part, out, mean_and_inverse in zip(parts, y.chunk(views), joined, strict=True):
            torch.batch_norm_elemt(part, weight, bias, *mean_and_inverse, eps, out=out)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *joined = ctx.saved_tensors
        dy = _dense(dy)
        affine = weight is not None
        views = len(joined) // 2
        passes = [*zip(dy.chunk(views), x.chunk(views), joined[::2], joined[1::2], strict=True)]
        own = [
            torch.batch_norm_backward_reduce(*one, weight, True, affine, affine) for one in passes
        ]
        total = torch.cat([part for one in own for part in one[:2]])
        dist.all_reduce(total)
        counts = _counts(_count(x, views), dist.get_world_size(), torch.int32, x.device)
        sums = total.chunk(2 * views)
        dx = [
            torch.batch_norm_backward_elemt(*one, weight, sum_dy, sum_dy_x, counts)
            for one, sum_dy, sum_dy_x in zip(passes, sums[::2], sums[1::2], strict=True)
        ]
        own_weight, own_bias = (
            reduce(torch.add, parts) if affine else None
            for parts in zip(*(one[2:] for one in own), strict=True)
        )
        return (dx[0] if views == 1 else torch.cat(dx)), own_weight, own_bias, *[None] * 5
