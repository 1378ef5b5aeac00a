"""BatchNorm over the joined batch of several processes, one collective per pass."""

from __future__ import annotations

from functools import cache

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
    number of images, as all training steps here do: this is not checked.

    The state dict is BatchNorm's. `num_batches_tracked` is kept there but does not change: it has
    no effect at a fixed momentum, and counting would launch a kernel per pass.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running averages.
        affine: whether there are weight and bias.
        synchronised: False: each process uses the statistics of its own images.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        synchronised: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.synchronised = synchronised

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        averages = (self.running_mean, self.running_var)
        if not (self.training and self.synchronised and _has_others()):
            options = (self.training, self.momentum, self.eps)
            return F.batch_norm(x, *averages, self.weight, self.bias, *options)
        if not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        with torch.no_grad():
            joined = _joined_fused if _has_kernels(x) else _joined
            mean, inverse = joined(x, *averages, self.momentum, self.eps)
        return _Normalise.apply(x, mean, inverse, self.weight, self.bias)


def convert(module: nn.Module, *, synchronised: bool = True) -> nn.Module:
    """Replace every BatchNorm inside the module by `BatchNorm`, in place.

    The new layers share parameters and buffers with the old ones, and have their names.

    Args:
        synchronised: as of `BatchNorm`.

    Returns:
        The module; if it is itself a BatchNorm, the layer that replaces it.

    Raises:
        ValueError: for a BatchNorm without running averages or without a fixed momentum.
    """
    if isinstance(module, _BatchNorm):
        if module.momentum is None or not module.track_running_stats:
            raise ValueError(f"{module}: only layers with running averages and a fixed momentum")
        options = (module.eps, module.momentum, module.affine, synchronised)
        layer = BatchNorm(module.num_features, *options)
        layer.weight, layer.bias = module.weight, module.bias
        layer.running_mean, layer.running_var = module.running_mean, module.running_var
        layer.num_batches_tracked = module.num_batches_tracked
        return layer.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert(child, synchronised=synchronised))
    return module


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _has_kernels(x: Tensor) -> bool:
    """Whether to call the CUDA kernels of torch.nn.SyncBatchNorm.

    Compiled code does not: torch.compile makes fewer kernels from the formulas.
    """
    return x.is_cuda and not torch.compiler.is_compiling()


def _gather(own: Tensor) -> Tensor:
    """A vector `[n]` of every process: `[world_size, n]`."""
    everyones = own.new_empty(dist.get_world_size() * len(own))
    _all_gather(everyones, own)
    return everyones.view(-1, len(own))


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """`[C]` in a shape that broadcasts over x `[B, C, …]`."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    """The sum over all dimensions but the channels: `[C]`."""
    return x.sum(dim=[0, *range(2, x.dim())])


# ---------------------------------------------------------------- statistics of the joined batch


def _joined(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) of the joined batch `[C]`; the running averages follow.

    Each process sends mean and variance, not sums of x and x²: where the mean is large, the
    difference of such sums would lose the variance's digits. Of equal shares the joined variance
    is the mean of the variances plus the variance of the means (Chan et al. 1979).
    """
    dims = [0, *range(2, x.dim())]
    own_var, own_mean = torch.var_mean(wide(x), dim=dims, correction=0)
    means, variances = _gather(torch.cat([own_mean, own_var])).chunk(2, dim=1)
    between, mean = torch.var_mean(means, dim=0, correction=0)
    var = variances.mean(dim=0) + between
    count = x.numel() // x.shape[1] * len(means)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, torch.rsqrt(var + eps)


def _joined_fused(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """As `_joined`, by kernels that do the same arithmetic."""
    means, inverses = _gather(torch.cat(torch.batch_norm_stats(x, eps))).chunk(2, dim=1)
    counts = _counts(x.numel() // x.shape[1], len(means), means.dtype, x.device)
    return torch.batch_norm_gather_stats_with_counts(
        x, means, inverses, running_mean, running_var, momentum, eps, counts
    )


@cache
def _counts(count: int, world_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images times pixels of each process, `[world_size]`: made once, as it never changes."""
    return torch.full((world_size,), count, dtype=dtype, device=device)


# ---------------------------------------------------------------- normalisation and its gradient


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
        if _has_kernels(x):
            return torch.batch_norm_elemt(x, weight, bias, mean, inverse, 0.0)
        y = (wide(x) - _per_channel(mean, x)) * _per_channel(inverse, x)
        if weight is not None:
            y = y * _per_channel(weight, x) + _per_channel(bias, x)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        if _has_kernels(x):
            return _backward_fused(dy, x, mean, inverse, weight)
        dy_wide = wide(dy)
        x_hat = (wide(x) - _per_channel(mean, x)) * _per_channel(inverse, x)
        own_bias, own_weight = _sum(dy_wide), _sum(dy_wide * x_hat)
        total = torch.cat([own_bias, own_weight])
        dist.all_reduce(total)
        total = total / (x.numel() // x.shape[1] * dist.get_world_size())
        mean_dy, mean_dy_x_hat = (_per_channel(part, x) for part in total.chunk(2))
        scale = inverse if weight is None else inverse * weight
        dx = (dy_wide - mean_dy - x_hat * mean_dy_x_hat) * _per_channel(scale, x)
        if weight is None:
            own_weight = own_bias = None
        return dx.to(x.dtype), None, None, own_weight, own_bias


def _backward_fused(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of `_Normalise`, by kernels that do the same arithmetic."""
    if not (dy.dim() == 4 and dy.is_contiguous(memory_format=torch.channels_last)):
        dy = dy.contiguous()
    affine = weight is not None
    sum_dy, sum_dy_x, own_weight, own_bias = torch.batch_norm_backward_reduce(
        dy, x, mean, inverse, weight, True, affine, affine
    )
    total = torch.cat([sum_dy, sum_dy_x])
    dist.all_reduce(total)
    world_size = dist.get_world_size()
    counts = _counts(x.numel() // x.shape[1], world_size, torch.int32, x.device)
    dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse, weight, *total.chunk(2), counts)
    return dx, None, None, *((own_weight, own_bias) if affine else (None, None))
