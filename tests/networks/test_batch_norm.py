"""BatchNorm on two and three gloo processes against torch's BatchNorm of the joined batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.dssl import loss_parts
from common.networks import batch_norm as module
from common.networks.batch_norm import BatchNorm, convert, views_in_batch
from common.runtime.ranks import unwrap
from common.views import Views
from processes import spawn_ranks
from simsiam_cifar10.model import SimSiam

torch.set_num_threads(1)

SHARE, CHANNELS = 6, 5  # images of a process
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LAYOUTS = ("rows", "images", "channels_last")
VIEWS = (1, 2)
# float32 rounds a mean of 400 by up to 2e-5, bfloat16 each value by half a unit in the last place.
ERRORS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-8}


def joined_batches(
    world_size: int, layout: str, dtype: torch.dtype, views: int = 1
) -> tuple[Tensor, Tensor]:
    """A batch of each view, of all processes, and the gradient of its outputs; everywhere the same.

    Channel c has mean 100 c: sums of squares in float32 would lose three digits of the variance.

    Returns:
        `[V, B, C, …]` each.
    """
    generator = torch.Generator().manual_seed(world_size)
    size = (views, SHARE * world_size, CHANNELS) + (() if layout == "rows" else (4, 3))
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x += 100 * torch.arange(CHANNELS).view(1, 1, -1, *[1] * (x.dim() - 3))
    x[:, :SHARE] += 3  # the processes' means differ
    x[1:] *= 2  # and the views' variances
    gradient = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.to(dtype), gradient.to(dtype)


def in_layout(batches: Tensor, layout: str) -> Tensor:
    """Batches `[V, B, C, …]` one after the other."""
    batch = batches.flatten(0, 1)
    return batch.to(memory_format=torch.channels_last) if layout == "channels_last" else batch


def batch_norm(layout: str, affine: bool) -> nn.Module:
    layer = (nn.BatchNorm1d if layout == "rows" else nn.BatchNorm2d)(CHANNELS, affine=affine)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5]))
            layer.bias.copy_(torch.arange(CHANNELS))
    return layer


def passed(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Everything that a forward and backward pass gives."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    result = {"y": y.detach(), "x": x.grad, "mean": layer.running_mean, "var": layer.running_var}
    if layer.affine:
        result |= {"weight": layer.weight.grad, "bias": layer.bias.grad}
    return result


def passed_one_by_one(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The same of views `[V, B, C, …]`; y and the gradient of x are `[V, B, C, …]` too."""
    results = [passed(layer, *view) for view in zip(x, gradient, strict=True)]
    joined = {name: torch.stack([result[name] for result in results]) for name in ("y", "x")}
    return results[-1] | joined


def simsiam() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam("resnet10", 8, 16, 8).double()


def pair_loss(p: Tensor, z: Tensor) -> Tensor:
    return (p - z.detach().cos()).pow(2).mean()


def step(model: nn.Module, mine: slice, s: float) -> dict[str, Any]:
    """One step's gradients and the state after it, and how many passes it took."""
    generator = torch.Generator().manual_seed(3)
    size = (SHARE * 3, 3, 16, 16)
    views = Views(
        *(torch.randn(size, generator=generator, dtype=torch.float64)[mine] for _ in range(4))
    )
    passes: list[int] = []

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        passes.append(len(images))
        return model(images)

    for part in loss_parts(model, forward, views, "dssl", pair_loss, s):
        part.loss.backward()
    network = unwrap(model)
    return {
        "passes": passes,
        **{f"gradient of {name}": p.grad for name, p in network.named_parameters()},
        **network.state_dict(),
    }


def on_a_rank(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    mine = slice(rank * SHARE, (rank + 1) * SHARE)
    results: dict[str, Any] = {}
    for dtype, layout, affine, views in itertools.product(DTYPES, LAYOUTS, (True, False), VIEWS):
        batches = joined_batches(world_size, layout, dtype, views)
        layer = batch_norm(layout, affine)
        layer = convert(layer.double() if dtype == torch.float64 else layer)
        with views_in_batch(views):
            result = passed(layer, *(in_layout(batch[:, mine], layout) for batch in batches))
        results[f"{dtype} {layout} {affine} {views}"] = result

    def ddp(network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, broadcast_buffers=False)

    for s in (0.0, 0.1):
        results[f"step {s}"] = step(ddp(convert(simsiam())), mine, s)
    # Without DDP each process keeps its own part of the gradients.
    results["step without DDP"] = step(convert(simsiam()), mine, 0.1)
    apart = convert(simsiam(), synchronised=False)
    results["passes apart"] = step(ddp(apart), mine, 0.0)["passes"]
    (x,), (gradient,) = joined_batches(world_size, "rows", torch.float32)
    layer = convert(batch_norm("rows", True), synchronised=False)
    results["apart"] = passed(layer, x[mine], gradient[mine])

    if world_size == 2:
        graphs: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(len(graph.graph.nodes))
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = convert(simsiam())
        model = ddp(compiled)
        compiled.compile(backend=backend, fullgraph=True)
        results["compiled"] = step(model, mine, 0.0)
        results["graphs"] = len(graphs)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn_ranks(on_a_rank, request.param, folder, count=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_equals_that_of_the_joined_batch(
    results: list[dict], dtype: torch.dtype, layout: str, affine: bool, views: int
) -> None:
    x, gradient = joined_batches(len(results), layout, dtype, views)
    # torch's own layer, in float64 on the very same values, view by view
    layer = batch_norm(layout, affine).double()
    expected = passed_one_by_one(layer, x.double(), gradient.double())
    ours = [result[f"{dtype} {layout} {affine} {views}"] for result in results]
    assert ours[0].keys() == expected.keys()
    error = ERRORS[dtype]
    for name in ("y", "x"):
        parts = [result[name] for result in ours]
        assert all(part.dtype == dtype for part in parts)
        if layout == "channels_last":
            assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
        joined = torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1)
        # bfloat16: half a unit in the last place of each value
        torch.testing.assert_close(
            joined.double(), expected[name], rtol=error, atol=min(error, 1e-3)
        )
    # Averages and sums are in float32 also where images are bfloat16.
    error = min(error, 1e-5)
    for result in ours:
        assert torch.equal(result["mean"], ours[0]["mean"])
        assert torch.equal(result["var"], ours[0]["var"])
        for name in ("mean", "var"):
            torch.testing.assert_close(result[name].double(), expected[name], rtol=error, atol=0)
    for name in ("weight", "bias") if affine else ():
        total = sum(result[name].double() for result in ours)
        torch.testing.assert_close(total, expected[name], rtol=error, atol=100 * error)


@pytest.mark.parametrize("s", [0.0, 0.1])
def test_a_step_in_ddp_equals_that_of_the_joined_batch_and_joins_views(
    results: list[dict], s: float
) -> None:
    expected = step(simsiam(), slice(SHARE * len(results)), s)
    ours = results[0][f"step {s}"]
    assert ours.keys() == expected.keys()
    assert ours.pop("passes") == [2 * SHARE, 2 * SHARE]
    for name, value in ours.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_without_ddp_the_processes_gradients_have_the_joined_batchs_as_their_mean(
    results: list[dict],
) -> None:
    expected = results[0]["step 0.1"]
    for name in (name for name in expected if name.startswith("gradient of ")):
        parts = [result["step without DDP"][name] for result in results]
        mean = torch.stack(parts).mean(dim=0)
        torch.testing.assert_close(mean, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_views_are_not_joined_where_each_process_is_alone(results: list[dict]) -> None:
    assert results[0]["passes apart"] == [SHARE] * 4


def test_compiled_it_is_one_graph_with_the_same_results(results: list[dict]) -> None:
    if len(results) == 2:
        assert results[0]["graphs"] == 1
        for name, value in results[0]["compiled"].items():
            if name != "passes":
                torch.testing.assert_close(
                    value, results[0]["step 0.0"][name], rtol=1e-10, atol=1e-12, msg=name
                )


def test_where_it_is_not_synchronised_each_process_is_alone(results: list[dict]) -> None:
    (x,), (gradient,) = joined_batches(len(results), "rows", torch.float32)
    for rank, result in enumerate(results):
        mine = slice(rank * SHARE, (rank + 1) * SHARE)
        expected = passed(batch_norm("rows", True), x[mine], gradient[mine])
        assert_equal(result["apart"], expected)


# ---------------------------------------------------------------- one process


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_computes_what_torch_computes(layout: str) -> None:
    x, gradient = (in_layout(b, layout) for b in joined_batches(1, layout, torch.float32))
    theirs, ours = batch_norm(layout, True), convert(batch_norm(layout, True))
    assert_equal(passed(ours, x, gradient), passed(theirs, x, gradient))
    assert_equal({"y": ours.eval()(x)}, {"y": theirs.eval()(x)})


def test_names_parameters_and_state_are_those_of_torchs_layers() -> None:
    network = simsiam()
    before = copy.deepcopy(network.state_dict())
    before["backbone.bn1.num_batches_tracked"] += 7  # as in a checkpoint of torch's layer
    parameters, mode = dict(network.named_parameters()), network.backbone.bn1.training
    assert convert(network) is network
    after = dict(network.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 15
    assert all(type(norm) is BatchNorm and norm.training is mode for norm in norms)
    network.load_state_dict(before, strict=True)
    assert_equal(network.state_dict(), before)
    network(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert network.backbone.bn1.num_batches_tracked == 7
    simsiam().load_state_dict(network.state_dict(), strict=True)  # and back


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, track_running_stats=False)]
)
def test_layers_that_would_need_a_count_or_no_averages_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="running averages and a fixed momentum"):
        convert(nn.Sequential(layer))


# ---------------------------------------------------------------- CUDA's kernels


@pytest.fixture
def alone_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process whose layers call the kernels and collectives of several."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(module, "_has_others", lambda: True)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_on_cuda_a_pass_equals_torchs_and_waits_for_nothing(
    alone_on_cuda: None, dtype: torch.dtype, layout: str, affine: bool, views: int
) -> None:
    batches = joined_batches(1, layout, dtype, views)
    layer = batch_norm(layout, affine).double()
    expected = passed_one_by_one(layer, *(batch.double() for batch in batches))
    layer = convert(batch_norm(layout, affine)).cuda()
    x, gradient = (in_layout(batch, layout).cuda() for batch in batches)
    with views_in_batch(views):
        passed(copy.deepcopy(layer), x, gradient)  # NCCL starts with the first collective
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = passed(layer, x, gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = ERRORS[dtype] if name in ("y", "x") else 1e-4
        result = ours[name].cpu().double().view_as(value)
        torch.testing.assert_close(result, value, rtol=error, atol=5e-3, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_the_statistics_of_two_processes_are_those_of_the_joined_batch(
    alone_on_cuda: None, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x,), _ = joined_batches(2, layout, torch.float32)
    own, other = (in_layout(half[None], layout).cuda() for half in x.split(SHARE))
    others = torch.cat(torch.batch_norm_stats(other, 1e-5))
    monkeypatch.setattr(module, "_gather", lambda vector: torch.stack([vector, others]))
    averages = torch.zeros(CHANNELS, device="cuda"), torch.ones(CHANNELS, device="cuda")
    ((mean, inverse),) = module._joined_fused([own], *averages, 0.1, 1e-5)
    dims = [0, *range(2, x.dim())]
    var, expected = torch.var_mean(x.double(), dims, correction=0)
    torch.testing.assert_close(mean.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse.cpu().double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)
    unbiased = torch.var(x.double(), dims)
    torch.testing.assert_close(averages[0].cpu().double(), 0.1 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(averages[1].cpu().double(), 0.9 + 0.1 * unbiased, rtol=1e-4, atol=0)
