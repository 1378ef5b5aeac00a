"""BatchNorm on two and three gloo processes against torch's BatchNorm of the joined batch."""

from __future__ import annotations

import copy
import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.networks import batch_norm as module
from common.networks.batch_norm import BatchNorm, convert
from simsiam_cifar10.model import SimSiam

torch.set_num_threads(1)

SHARE, CHANNELS = 6, 5  # images of a process
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LAYOUTS = ("rows", "images", "channels_last")
# float32 rounds a mean of 400 by up to 2e-5, bfloat16 each value by half a unit in the last place.
ERRORS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-8}


def joined_batch(world_size: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of all processes and the gradient of their outputs, the same on every process.

    Channel c has mean 100 c: sums of squares in float32 would lose three digits of the variance.
    """
    generator = torch.Generator().manual_seed(world_size)
    size = (SHARE * world_size, CHANNELS) + (() if layout == "rows" else (4, 3))
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x += 100 * torch.arange(CHANNELS).view(1, -1, *[1] * (x.dim() - 2))
    x[:SHARE] += 3  # the processes' means differ
    gradient = torch.randn(size, generator=generator, dtype=torch.float64)
    x, gradient = x.to(dtype), gradient.to(dtype)
    if layout == "channels_last":
        return (tensor.to(memory_format=torch.channels_last) for tensor in (x, gradient))
    return x, gradient


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


def simsiam() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam("resnet10", 8, 16, 8).double()


def trained(model: nn.Module, images: Tensor) -> None:
    """One step on p and z, whose loss is a mean over images."""
    p, z = model(images)
    (p * z.cos()).sum(dim=1).mean().backward()


def on_a_rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    mine = slice(rank * SHARE, (rank + 1) * SHARE)
    calls = {"all_gather": 0, "all_reduce": 0}
    results: dict[str, Any] = {"calls": calls}
    for dtype, layout, affine in itertools.product(DTYPES, LAYOUTS, (True, False)):
        x, gradient = joined_batch(world_size, layout, dtype)
        layer = batch_norm(layout, affine)
        layer = convert(layer.double() if dtype == torch.float64 else layer)
        result = passed(layer, x[mine], gradient[mine])
        results[f"{dtype} {layout} {affine}"] = result

    network = convert(simsiam())
    model = DistributedDataParallel(network, broadcast_buffers=False)
    images = network_images(world_size)[mine]
    trained(model, images)
    results["network"] = {
        **{f"gradient of {name}": p.grad for name, p in network.named_parameters()},
        **network.state_dict(),
    }
    apart = convert(batch_norm("rows", True), synchronised=False)
    x, gradient = joined_batch(world_size, "rows", torch.float32)
    results["apart"] = passed(apart, x[mine], gradient[mine])

    if world_size == 2:
        graphs: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(len(graph.graph.nodes))
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = convert(simsiam())
        model = DistributedDataParallel(compiled, broadcast_buffers=False)
        compiled.compile(backend=backend, fullgraph=True)
        trained(model, images)
        results["graphs"] = len(graphs)
        results["compiled"] = {
            **{f"gradient of {name}": p.grad for name, p in compiled.named_parameters()},
            **compiled.state_dict(),
        }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def network_images(world_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHARE * world_size, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(on_a_rank, (request.param, port, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_equals_that_of_the_joined_batch(
    results: list[dict], dtype: torch.dtype, layout: str, affine: bool
) -> None:
    x, gradient = joined_batch(len(results), layout, dtype)
    # torch's own layer, in float64 on the very same values
    expected = passed(batch_norm(layout, affine).double(), x.double(), gradient.double())
    ours = [result[f"{dtype} {layout} {affine}"] for result in results]
    assert ours[0].keys() == expected.keys()
    error = ERRORS[dtype]
    for name in ("y", "x"):
        parts = [result[name] for result in ours]
        assert all(part.dtype == dtype for part in parts)
        if layout == "channels_last":
            assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
        # bfloat16: half a unit in the last place of each value
        torch.testing.assert_close(
            torch.cat(parts).double(), expected[name], rtol=error, atol=min(error, 1e-3)
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


def test_a_network_in_ddp_equals_that_of_the_joined_batch(results: list[dict]) -> None:
    network = simsiam()
    trained(network, network_images(len(results)))
    expected = {
        **{f"gradient of {name}": p.grad for name, p in network.named_parameters()},
        **network.state_dict(),
    }
    ours = results[0]["network"]
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_compiled_it_is_one_graph_with_the_same_results(results: list[dict]) -> None:
    if len(results) == 2:
        assert results[0]["graphs"] == 1
        for name, value in results[0]["network"].items():
            torch.testing.assert_close(
                results[0]["compiled"][name], value, rtol=1e-10, atol=1e-12, msg=name
            )


def test_where_it_is_not_synchronised_each_process_is_alone(results: list[dict]) -> None:
    x, gradient = joined_batch(len(results), "rows", torch.float32)
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
    x, gradient = joined_batch(1, layout, torch.float32)
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


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_on_cuda_a_pass_equals_torchs_and_waits_for_nothing(
    alone_on_cuda: None, dtype: torch.dtype, layout: str, affine: bool
) -> None:
    x, gradient = joined_batch(1, layout, dtype)
    expected = passed(batch_norm(layout, affine).double(), x.double(), gradient.double())
    layer = convert(batch_norm(layout, affine)).cuda()
    x, gradient = x.cuda(), gradient.cuda()
    passed(copy.deepcopy(layer), x, gradient)  # NCCL starts with the first collective
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = passed(layer, x, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = ERRORS[dtype] if name in ("y", "x") else 1e-4
        result = ours[name].cpu().double()
        torch.testing.assert_close(result, value, rtol=error, atol=5e-3, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_the_statistics_of_two_processes_are_those_of_the_joined_batch(
    alone_on_cuda: None, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = joined_batch(2, layout, torch.float32)
    own, other = (half.cuda() for half in x.split(SHARE))
    others = torch.cat(torch.batch_norm_stats(other, 1e-5))
    monkeypatch.setattr(module, "_gather", lambda vector: torch.stack([vector, others]))
    averages = torch.zeros(CHANNELS, device="cuda"), torch.ones(CHANNELS, device="cuda")
    mean, inverse = module._joined_fused(own, *averages, 0.1, 1e-5)
    dims = [0, *range(2, x.dim())]
    var, expected = torch.var_mean(x.double(), dims, correction=0)
    torch.testing.assert_close(mean.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse.cpu().double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)
    unbiased = torch.var(x.double(), dims)
    torch.testing.assert_close(averages[0].cpu().double(), 0.1 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(averages[1].cpu().double(), 0.9 + 0.1 * unbiased, rtol=1e-4, atol=0)
