"""The directional loss L = L_S(v, v') + L_A(v̂ → v) + L_A(v̂' → v'), section 3 of the paper.

A base method has a network and a loss for one pair of views. The regime decides which views are
compared, and which of the two moves. The terms of the loss come in parts. Call each part's
`backward` before the next part is computed: targets have no gradient, so the gradients are those of
the whole sum, but the activations of two views are in memory at a time instead of four. Where the
direction is softened, s > 0, they are those of three, and of four on several GPUs.

The views are passed in the order v, v', v̂, v̂', as in the authors' scripts: BatchNorm's running
averages depend on it. On several GPUs, where BatchNorm is synchronised, v and v' share a pass, and
so do v̂ and v̂'.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.losses.collapse import spread
from common.networks.batch_norm import can_join_views, views_in_batch
from common.runtime.ranks import no_sync, unwrap
from common.views import Regime, Views


class Part(NamedTuple):
    """Terms of the loss that go backward together: those of one view's pass, or of some passes.

    `loss` is their weighted sum. `log` holds each term unweighted and detached; summed by name over
    the parts of a step, L = symmetric + (1 − s) · asymmetric + s · reverse.
    """

    loss: Tensor
    log: dict[str, Tensor]


def own_projection(view: Tensor, z: Tensor) -> Tensor:
    """The target of methods without a target network: the view's own projection z `[B, d]`."""
    return z


def loss_parts(
    model: nn.Module,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    views: Views,
    regime: Regime,
    pair_loss: Callable[[Tensor, Tensor], Tensor],
    reverse_weight: float = 0.0,
    target: Callable[[Tensor, Tensor | None], Tensor] = own_projection,
    symmetric_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    one_sided: bool = False,
) -> Iterator[Part]:
    """Yield the parts of a step's loss; call `part.loss.backward()` before asking for the next.

    Args:
        model: what `forward` calls; under DDP its gradients are reduced with the last part only.
        forward: a view `[B, 3, H, W]` to prediction p and projection z, each `[B, d]`; on several
            processes two views one after the other, where `model` normalises them apart
            (`common.networks.batch_norm`).
        views: from a `ViewMaker` of the same regime.
        regime: baseline compares the standard views, joint the heavy ones, by L_S; dssl adds to
            the baseline a term L_A for each heavy view, whose target is its standard view.
        pair_loss: ½ of the loss of a prediction (first argument, moves) and a target (second
            argument, no gradient). L_A is one such term, and L_S is the sum of two.
        reverse_weight: s, 0..1, in the dssl regime: the share of each L_A in which the standard
            view moves and the heavy view is the target.
        target: a view and its z to the target of its pairs, `[B, d]`: z itself, or the output of a
            target network. It is called once for each view that is a target, and for no other.
        symmetric_loss: L_S as one term of both views' projections with gradient to both, such as
            NT-Xent; None: each prediction is paired with the other view's target.
        one_sided: L_S moves the first view only, by the whole loss. The second view is then not
            passed through the model, and `target` gets None in place of its z.

    Raises:
        ValueError: for a reverse weight above 0 together with `symmetric_loss` or `one_sided`.
    """
    s = reverse_weight
    if s > 0 and (symmetric_loss is not None or one_sided):
        raise ValueError(
            f"a reverse weight of {s} needs an L_S of two pairs, one for each view; leave it at 0"
        )
    is_directional = regime == "dssl"
    joins_views = can_join_views(unwrap(model))

    def passed(*some: Tensor, is_last: bool) -> list[tuple[Tensor, Tensor]]:
        """p and z of some views; DDP reduces gradients after the passes that are a step's last."""
        if joins_views:
            with _no_sync_if(not is_last, model), views_in_batch(len(some)):
                p, z = forward(torch.cat(some))
            return [*zip(p.chunk(len(some)), z.chunk(len(some)), strict=True)]
        with no_sync(model):
            outputs = [forward(view) for view in some[:-1]]
        with _no_sync_if(not is_last, model):
            return [*outputs, forward(some[-1])]

    first, second = views[2:] if regime == "joint" else views[:2]
    with _GradientSums(model, joins_views) as sums:
        standard = (first,) if one_sided else (first, second)
        (p_1, z_1), *others = passed(*standard, is_last=not is_directional)
        p_2, z_2 = others[0] if others else (None, None)
        if is_directional or not (one_sided or symmetric_loss):
            target_1 = target(first, z_1)
        if is_directional or not symmetric_loss:
            target_2 = target(second, z_2)

        if symmetric_loss is not None:
            symmetric = [symmetric_loss(z_1, z_2)]
        elif one_sided:
            symmetric = [2 * pair_loss(p_1, target_2)]
        else:
            symmetric = [pair_loss(p_1, target_2), pair_loss(p_2, target_1)]
        logs = [{"symmetric": loss.detach()} for loss in symmetric]
        logs[0]["spread"] = spread(z_1)
        waits = is_directional and s > 0  # the standard views' predictions move by both terms
        if not waits:
            yield from sums.over([Part(*both) for both in zip(symmetric, logs, strict=True)])
        if not is_directional:
            return

        for indices in [(0, 1)] if joins_views else [(0,), (1,)]:
            heavy = passed(*(views[2 + index] for index in indices), is_last=1 in indices)
            parts = []
            for index, (p_heavy, z_heavy) in zip(indices, heavy, strict=True):
                asymmetric = pair_loss(p_heavy, (target_1, target_2)[index])
                parts.append(Part((1 - s) * asymmetric, {"asymmetric": asymmetric.detach()}))
                if waits:
                    reverse = pair_loss((p_1, p_2)[index], target(views[2 + index], z_heavy))
                    log = {**logs[index], "reverse": reverse.detach()}
                    parts.append(Part(symmetric[index] + s * reverse, log))
            yield from sums.over(parts)


class _GradientSums:
    """Adds up the gradients of a step's parts for all parameters at once.

    Autograd adds them parameter by parameter, on CUDA by a kernel for each. Under DDP it has to:
    DDP reduces what autograd has added up, and in a single backward pass.

    Args:
        joins_views: views share a pass, and so a backward pass.
    """

    def __init__(self, model: nn.Module, joins_views: bool) -> None:
        self.is_ddp = unwrap(model) is not model
        self.joins_views = joins_views
        self.parameters = [*model.parameters()]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def __enter__(self) -> _GradientSums:
        return self

    def over(self, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts one after the other; their sum under DDP or where views share a pass."""
        for part in [_joined(parts)] if self.is_ddp or self.joins_views else parts:
            yield part
            if not self.is_ddp:
                self._add()

    def _add(self) -> None:
        before, new = [], []
        for index, parameter in enumerate(self.parameters):
            grad = parameter.grad
            if grad is None:
                continue
            if self.sums[index] is None:
                self.sums[index] = grad
            else:
                before.append(self.sums[index])
                new.append(grad)
            parameter.grad = None
        if new:
            torch._foreach_add_(before, new)

    def __exit__(self, *_: object) -> None:
        for parameter, grad in zip(self.parameters, self.sums, strict=True):
            if grad is not None:
                parameter.grad = grad


def _joined(parts: Sequence[Part]) -> Part:
    log: dict[str, Tensor] = {}
    for name, value in itertools.chain.from_iterable(part.log.items() for part in parts):
        log[name] = log[name] + value if name in log else value
    return Part(sum(part.loss for part in parts), log)


def _no_sync_if(condition: bool, model: nn.Module) -> AbstractContextManager[None]:
    return no_sync(model) if condition else nullcontext()
