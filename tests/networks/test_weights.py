"""Backbones in every project's layout of weights, with torchvision's own ResNet as the measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from common.networks.resnet import imagenet_resnet
from common.networks.weights import find_backbone
from common.runtime.errors import UserError

State = dict[str, Any]


def network(seed: int) -> nn.Module:
    """torchvision's, its BatchNorm averages moved from their start."""
    torch.manual_seed(seed)
    made = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        made(torch.randn(8, 3, 32, 32))
    return made.eval()


EVALUATED, OTHER = network(0), network(1)
CUT = nn.Sequential(*list(EVALUATED.children())[:-1], nn.Flatten())  # without the classifier


def under(prefix: str, made: nn.Module, head: str = "fc.") -> State:
    """A network's weights behind a prefix; its classifier gets another name, "" for none."""
    return {
        prefix + (head + name[3:] if name.startswith("fc.") else name): value
        for name, value in made.state_dict().items()
        if head or not name.startswith("fc.")
    }


def children(prefix: str, made: nn.Module) -> State:
    """As lightly makes a backbone: the children of a ResNet without the classifier."""
    return under(prefix, nn.Sequential(*list(made.children())[:-1]))


def after_moco(query: str, key: str) -> State:
    state = {**under(query, EVALUATED), **under(key, OTHER), "module.queue": torch.zeros(2, 3)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state}


def after_dino() -> State:
    head = {"module.head.mlp.0.weight": torch.zeros(2)}
    return {
        "student": {**under("module.backbone.", OTHER, ""), **head},
        "teacher": {**under("module.backbone.", EVALUATED, ""), **head},
    }


def after_solo_learn() -> State:
    state = {
        **under("backbone.", EVALUATED, ""),
        **under("momentum_backbone.", OTHER, ""),
        "classifier.weight": torch.zeros(2),
    }
    return {"state_dict": state, "callbacks": {"best": 1}}


def after_vissl() -> State:
    model = {"trunk": under("_feature_blocks.", EVALUATED, ""), "heads": {}}
    loss = under("moco_encoder.trunk._feature_blocks.", OTHER, "")
    return {"classy_state_dict": {"base_model": {"model": model}, "loss": loss}}


LAYOUTS: Mapping[str, tuple[Callable[[], State], str, str]] = {
    "torchvision": (EVALUATED.state_dict, "", "fc"),
    "MoCo": (
        lambda: after_moco("module.encoder_q.", "module.encoder_k."),
        "state_dict.module.encoder_q.",
        "fc, encoder_k, queue",
    ),
    "MoCo v3": (
        lambda: after_moco("module.base_encoder.", "module.momentum_encoder."),
        "state_dict.module.base_encoder.",
        "fc, momentum_encoder, queue",
    ),
    "SimSiam": (
        lambda: {"state_dict": under("module.encoder.", EVALUATED, "fc.0.")},
        "state_dict.module.encoder.",
        "fc",
    ),
    "DINO": (after_dino, "teacher.module.backbone.", "student, head"),
    "solo-learn": (after_solo_learn, "state_dict.backbone.", "momentum_backbone, classifier"),
    "lightly": (
        lambda: {
            "state_dict": {
                **children("backbone_momentum.", OTHER),
                **children("backbone.", EVALUATED),
                "projection_head.layers.0.weight": torch.zeros(2),
            }
        },
        "state_dict.backbone.",
        "backbone_momentum, projection_head",
    ),
    "lightly's DINO": (
        lambda: {
            "state_dict": {
                **children("student_backbone.", OTHER),
                **children("teacher_backbone.", EVALUATED),
            }
        },
        "state_dict.teacher_backbone.",
        "student_backbone",
    ),
    "VISSL": (
        after_vissl,
        "classy_state_dict.base_model.model.trunk._feature_blocks.",
        "loss",
    ),
    "timm": (
        lambda: {"state_dict": OTHER.state_dict(), "state_dict_ema": EVALUATED.state_dict()},
        "state_dict_ema.",
        "state_dict, fc",
    ),
    "two names of one network": (
        lambda: {"state_dict": {**under("a.", EVALUATED, ""), **under("b.net.", EVALUATED, "")}},
        "state_dict.a.",
        "b",
    ),
}


@pytest.mark.parametrize("project", LAYOUTS)
def test_features_are_those_of_torchvision_s_network(project: str) -> None:
    content, prefix, unused = LAYOUTS[project]
    found = find_backbone(content(), "weights.pth", "resnet18")
    assert found.prefix == prefix
    assert ", ".join(found.unused) == unused
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        features = found.build().eval()(images)
        assert torch.equal(EVALUATED.fc(features), EVALUATED(images))
        assert torch.equal(features, CUT(images))


@pytest.mark.parametrize("architecture", ["resnet101", "resnet152", "wide_resnet50_2"])
def test_larger_backbones_are_torchvision_s(architecture: str) -> None:
    with torch.device("meta"):
        ours, theirs = imagenet_resnet(architecture), getattr(torchvision.models, architecture)()
    assert ours.feature_dim == 2048
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {
        name: value.shape
        for name, value in theirs.state_dict().items()
        if not name.startswith("fc.")
    }


def without(name: str) -> State:
    return {key: value for key, value in under("a.", EVALUATED).items() if key != f"a.{name}"}


@pytest.mark.parametrize(
    ("content", "architecture", "message"),
    [
        (EVALUATED.state_dict(), "resnet50", "does not fit a resnet50: it is a resnet18; use --b"),
        (without("layer3.0.conv1.weight"), None, r"behind 'a\.', .* it lacks layer3\.0\.conv1\.w"),
        (
            {**under("", EVALUATED), "layer1.0.se.weight": torch.zeros(2)},
            "resnet18",
            r"does not fit a resnet18: it also has layer1\.0\.se\.weight",
        ),
        (
            {**under("", EVALUATED), "layer2.0.bn1.bias": torch.zeros(64)},
            "resnet18",
            r"1 shapes differ \(layer2\.0\.bn1\.bias has the shape \[64\] in place of \[128\]\)",
        ),
        (
            {**under("a.", EVALUATED), **under("b.", OTHER)},
            "resnet18",
            r"several ResNets, and none is known to be the one to evaluate: a\., b\.;",
        ),
        ({"model": [1], "x": torch.zeros(3)}, "resnet18", "no ResNet: among its 1 tensors"),
        (
            {"model": object()},
            None,
            r"no tensors with names, .* save the state dict alone: torch\.s",
        ),
    ],
)
def test_what_does_not_fit_is_named(content: State, architecture: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_backbone(content, "weights.pt", architecture)
