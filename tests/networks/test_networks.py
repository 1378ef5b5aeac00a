"""simsiam_cifar10's network and pair loss, ResNets and the collapse gauge."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import byol_cifar10.model
import byol_harder_aug_imagenet.model
from common.losses.collapse import spread
from common.networks.resnet import CifarResNet, imagenet_resnet
from common.runtime.errors import UserError
from simclr_cifar10.model import SimCLR
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam
from simsiam_imagenet.model import SimSiam as ImageNetSimSiam

torch.set_num_threads(1)


def paper_network() -> SimSiam:
    return SimSiam("resnet18", 64, 2048, 512)


def small_network() -> SimSiam:
    return SimSiam("resnet18", 8, 24, 16)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------- structure


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        network = paper_network()
    assert parameter_count(network) == 18_520_640
    assert parameter_count(network.backbone) == 11_168_832
    # Linear, BatchNorm, Linear; the last BatchNorm has no parameters.
    assert parameter_count(network.projector) == 513 * 2048 + 2 * 2048 + 2049 * 2048
    assert parameter_count(network.predictor) == 2049 * 512 + 2 * 512 + 513 * 2048
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(
    ("architecture", "blocks", "expansion", "depths"),
    [
        ("resnet18", BasicBlock, 1, (2, 2, 2, 2)),
        ("resnet34", BasicBlock, 1, (3, 4, 6, 3)),
        ("resnet50", Bottleneck, 4, (3, 4, 6, 3)),
    ],
)
def test_shapes(
    architecture: str, blocks: type, expansion: int, depths: tuple[int, ...], width: int
) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = CifarResNet(architecture, width)
        images = torch.empty(2, 3, 32, 32)
    shapes = []
    for layer in (
        backbone.relu,
        backbone.layer1,
        backbone.layer2,
        backbone.layer3,
        backbone.layer4,
    ):
        layer.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape))
    features = backbone(images)
    assert features.shape == (2, 8 * width * expansion)
    assert backbone.feature_dim == 8 * width * expansion
    # The stem keeps all 32 pixels, and only the last three stages halve them.
    stages = [(2, width * 2**k * expansion, 32 // 2**k, 32 // 2**k) for k in range(4)]
    assert shapes == [(2, width, 32, 32), *stages]
    for layer, depth in zip(
        (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4), depths, strict=True
    ):
        assert [type(block) for block in layer] == [blocks] * depth


def test_a_stem_of_stride_2_and_a_block_a_stage() -> None:
    backbone = CifarResNet("resnet10", 8, stem_stride=2)
    sizes = []
    for layer in (backbone.relu, backbone.layer1, backbone.layer4):
        layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert sizes == [(2, 8, 16, 16), (2, 8, 16, 16), (2, 64, 2, 2)]
    assert [len(getattr(backbone, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 1, 1, 1]
    with pytest.raises(UserError, match="--stem-stride is 1 or 2, not 3"):
        CifarResNet("resnet10", 8, stem_stride=3)


@pytest.mark.parametrize("width", [-8, 0, 4, 12, 63])
def test_widths_that_convolutions_cannot_take_are_refused(width: int) -> None:
    with pytest.raises(UserError, match=f"--width is a multiple of 8, not {width}"):
        CifarResNet("resnet18", width)


def test_state_is_named_as_torchvisions() -> None:
    with torch.device("meta"):
        ours = CifarResNet("resnet18", 64).state_dict()
        theirs = torchvision.models.resnet18().state_dict()
    expected = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert expected["conv1.weight"] == (64, 3, 7, 7)
    expected["conv1.weight"] = torch.Size((64, 3, 3, 3))
    assert {name: value.shape for name, value in ours.items()} == expected


def test_features_are_those_of_torchvisions_resnet_with_a_small_stem() -> None:
    torch.manual_seed(0)
    ours = CifarResNet("resnet18", 64)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_backbones_state_loads_into_a_fresh_one() -> None:
    torch.manual_seed(0)
    network = small_network()
    network(torch.randn(4, 3, 8, 8))  # moves the running averages away from their start
    fresh = CifarResNet("resnet18", 8)
    fresh.load_state_dict(network.backbone.state_dict(), strict=True)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), network.backbone.eval()(images))


def test_heads_have_biases_everywhere_and_no_affine_at_the_projectors_end() -> None:
    network = small_network()
    kinds = [type(layer) for layer in network.projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    kinds = [type(layer) for layer in network.predictor]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    heads = (*network.projector, *network.predictor)
    linears = [layer for layer in heads if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [
        (64, 24),
        (24, 24),
        (24, 16),
        (16, 24),
    ]
    assert all(layer.bias is not None for layer in linears)
    affine = [layer.affine for layer in heads if isinstance(layer, nn.BatchNorm1d)]
    assert affine == [True, False, True]
    norms = [
        layer for layer in network.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    assert all(norm.track_running_stats and norm.momentum == 0.1 for norm in norms)


# ---------------------------------------------------------------- initialisation


def layers_as_built(network: SimSiam) -> list[nn.Module]:
    """Convolutions and Linears in the order in which they draw their weights."""
    layers: list[nn.Module] = [network.backbone.conv1]
    backbone = network.backbone
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            if block.downsample is not None:  # is handed to the block, so it comes first
                layers.append(block.downsample[0])
            layers += [block.conv1, block.conv2]
    heads = (*network.projector, *network.predictor)
    return layers + [layer for layer in heads if isinstance(layer, nn.Linear)]


def test_weights_start_from_pytorchs_defaults() -> None:
    """Uniform in ±1/√fan for weights and biases, redrawn here from the same seed by hand."""
    torch.manual_seed(5)
    network = small_network()
    torch.manual_seed(5)
    drawn = 0
    for layer in layers_as_built(network):
        weight = layer.weight.detach()
        bound = 1 / math.sqrt(weight[0].numel())
        expected = (2 * torch.rand(weight.shape) - 1) * bound
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
        drawn += weight.numel()
        if layer.bias is not None:
            expected = (2 * torch.rand(layer.bias.shape) - 1) * bound
            torch.testing.assert_close(layer.bias.detach(), expected, rtol=1e-5, atol=1e-7)
            drawn += layer.bias.numel()
    norms = [
        layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    affine = [norm for norm in norms if norm.affine]
    assert drawn + sum(2 * norm.num_features for norm in affine) == parameter_count(network)


def test_no_residual_branch_starts_from_zero() -> None:
    network = small_network()
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and norm.affine:
            assert torch.equal(norm.weight, torch.ones(norm.num_features))
            assert torch.equal(norm.bias, torch.zeros(norm.num_features))


# ---------------------------------------------------------------- forward pass


def test_forward_returns_prediction_first() -> None:
    torch.manual_seed(0)
    network = small_network()
    images = torch.randn(6, 3, 8, 8)
    p, z = network(images)
    assert p.shape == z.shape == (6, 24)

    def by_hand(linear: nn.Linear, x: numpy.ndarray) -> numpy.ndarray:
        return x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()

    def standardised(x: numpy.ndarray) -> numpy.ndarray:
        return (x - x.mean(0)) / numpy.sqrt(x.var(0) + 1e-5)  # batch statistics, biased variance

    with torch.no_grad():  # a second pass in train mode: the batch's statistics are the same
        features = network.backbone(images).double().numpy()
    hidden = numpy.maximum(standardised(by_hand(network.projector[0], features)), 0)
    z_by_hand = standardised(by_hand(network.projector[3], hidden))
    hidden = numpy.maximum(standardised(by_hand(network.predictor[0], z_by_hand)), 0)
    p_by_hand = by_hand(network.predictor[3], hidden)
    numpy.testing.assert_allclose(z.detach().numpy(), z_by_hand, rtol=0, atol=2e-4)
    numpy.testing.assert_allclose(p.detach().numpy(), p_by_hand, rtol=0, atol=2e-4)


def test_outputs_are_float32_under_autocast() -> None:
    """Losses, and sums of their gradients, need the digits."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p, z = small_network()(torch.randn(6, 3, 8, 8))
    assert p.dtype == z.dtype == torch.float32


def test_the_prediction_reaches_every_parameter() -> None:
    """The stop-gradient is in the loss; the network has none."""
    torch.manual_seed(0)
    network = small_network()
    p, _ = network(torch.randn(6, 3, 8, 8))
    p.square().sum().backward()
    still = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert still == []
    assert network.backbone.conv1.weight.grad.abs().min() > 0


# ---------------------------------------------------------------- pair loss


def test_pull_by_hand() -> None:
    # cos((3, 4), (4, 3)) = 24/25, cos((1, 0), (−2, 0)) = −1, cos((0, 2), (5, 0)) = 0
    p = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    z = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [5.0, 0.0]])
    assert pair_loss(p, z).item() == pytest.approx(-0.5 * (24 / 25 - 1 + 0) / 3, rel=1e-6)
    assert pair_loss(p, 7 * p).item() == pytest.approx(-0.5, rel=1e-6)
    assert pair_loss(p, -p).item() == pytest.approx(0.5, rel=1e-6)


def test_pulls_gradient_by_hand_and_none_reaches_the_target() -> None:
    p = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    z = torch.tensor([[4.0, 3.0], [0.0, 2.0]], requires_grad=True)
    pair_loss(p, z).backward()
    assert z.grad is None
    # −½ · (ẑ − cos · p̂)/‖p‖ over a batch of 2; hats are unit vectors
    first = -0.25 * (numpy.array([0.8, 0.6]) - 0.96 * numpy.array([0.6, 0.8])) / 5
    second = -0.25 * numpy.array([0.0, 1.0])
    numpy.testing.assert_allclose(p.grad.numpy(), [first, second], rtol=1e-5, atol=1e-8)


def test_pull_computes_in_fp32() -> None:
    torch.manual_seed(0)
    p, z = torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    wide_p, wide_z = p.double().numpy(), z.double().numpy()
    norms = numpy.linalg.norm(wide_p, axis=1) * numpy.linalg.norm(wide_z, axis=1)
    loss = pair_loss(p, z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-0.5 * ((wide_p * wide_z).sum(1) / norms).mean(), rel=1e-4)


# ---------------------------------------------------------------- collapse gauge


def test_spread_by_hand() -> None:
    # Directions (0.6, 0.8) and (0.8, 0.6): deviation 0.1 in both dimensions, times √2.
    z = torch.tensor([[3.0, 4.0], [8.0, 6.0]])
    assert spread(z).item() == pytest.approx(0.1 * math.sqrt(2), rel=1e-5)
    # (±1, 0): deviation 1 and 0, mean ½.
    z = torch.tensor([[1.0, 0.0], [-9.0, 0.0]])
    assert spread(z).item() == pytest.approx(0.5 * math.sqrt(2), rel=1e-6)
    # All four axes, both ways: each dimension has two of eight at ±1, deviation ½, times √4.
    z = torch.cat([torch.eye(4), -torch.eye(4)])
    assert spread(z).item() == pytest.approx(1, rel=1e-6)


def test_spread_is_0_for_equal_directions() -> None:
    direction = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert spread(direction.expand(8, 4)) == 0
    direction = torch.linspace(-1, 2, 50)
    lengths = torch.linspace(0.1, 30, 64)[:, None]
    assert spread(lengths * direction) < 1e-5  # lengths do not count


def test_spread_is_near_1_for_random_directions() -> None:
    z = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    # Over directions spread evenly each coordinate deviates by exactly 1/√d; the estimate from B
    # of them is off by about 1/√(2Bd) as a share of it, here 0.0007, and biased by −1/(2B).
    assert spread(z).item() == pytest.approx(1, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spread_computes_in_fp32_and_carries_no_gradient(dtype: torch.dtype) -> None:
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = z.double().numpy()
    directions = wide / numpy.linalg.norm(wide, axis=1, keepdims=True)
    result = spread(z.requires_grad_())
    assert result.dtype == torch.float32
    assert not result.requires_grad
    assert result.item() == pytest.approx(directions.std(axis=0).mean() * 32**0.5, rel=1e-5)


# ---------------------------------------------------------------- ImageNet


def test_imagenet_backbone_is_torchvisions_but_for_the_classifier() -> None:
    torch.manual_seed(0)
    backbone = imagenet_resnet("resnet50")
    assert backbone.feature_dim == 2048
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(weights=None)
    missing = reference.load_state_dict(backbone.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    torch.manual_seed(0)
    fresh = torchvision.models.resnet50(weights=None)
    assert torch.equal(fresh.conv1.weight, backbone.conv1.weight), "torchvision's initialisation"
    backbone.eval()
    assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, 2048)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_simsiam_imagenet_heads_and_initialisation() -> None:
    torch.manual_seed(0)
    network = ImageNetSimSiam("resnet18", projector_dim=2048, predictor_dim=512)
    linear, norm = (lambda a, b: a * b + b), (lambda d: 2 * d)
    projector = linear(512, 2048) + 2 * linear(2048, 2048) + 3 * norm(2048)
    assert count(network.projector) == projector
    assert count(network.predictor) == linear(2048, 512) + norm(512) + linear(512, 2048)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in network.predictor] == [*block, nn.Linear]
    kinds = [type(layer) for layer in network.projector]
    assert kinds == [*block, *block, nn.Linear, nn.BatchNorm1d]
    checked = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
            for tensor in tensors:
                assert tensor.abs().max() <= bound
                # a uniform distribution's standard deviation, within five of its own errors
                expected, error = bound / 3**0.5, bound / (3 * tensor.numel()) ** 0.5
                assert abs(tensor.std().item() - expected) < 5 * error
                checked += 1
    assert checked == 20 + 2 * 5  # convolutions; weights and biases of the five Linears


@pytest.mark.parametrize("is_cifar", [True, False])
def test_byol_heads_and_projections(is_cifar: bool) -> None:
    torch.manual_seed(0)
    if is_cifar:
        network = byol_cifar10.model.online_network("resnet18", 64, 4096, 256)
        assert count(network.backbone) == 11_168_832
    else:
        network = byol_harder_aug_imagenet.model.online_network("resnet18", 4096, 256)
        assert count(network.backbone) == 11_176_512
    linear, norm = (lambda a, b: a * b + b), (lambda d: 2 * d)
    assert count(network.projector) == linear(512, 4096) + norm(4096) + linear(4096, 256)
    assert count(network.predictor) == linear(256, 4096) + norm(4096) + linear(4096, 256)
    network.eval()
    images = torch.rand(2, 3, 32, 32)
    p, z = network(images)
    assert torch.equal(network.project(images), z)
    assert torch.equal(network.predictor(z), p)


def test_simclr_has_a_projector_alone() -> None:
    torch.manual_seed(0)
    network = SimCLR("resnet18", 64, hidden_dim=2048, projector_dim=128)
    assert count(network.backbone) == 11_168_832
    assert count(network.projector) == (512 + 1) * 2048 + 2 * 2048 + (2048 + 1) * 128
    assert count(network) == 11_168_832 + 1_316_992
    network.eval()
    images = torch.rand(2, 3, 32, 32)
    p, z = network(images)
    assert p is z
    assert z.shape == (2, 128)
    assert torch.equal(network.projector(network.backbone(images)), z)
