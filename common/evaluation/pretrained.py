"""A pretrained backbone out of a file: of a run, of torchvision, or of another project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.evaluation.classifier import checksum
from common.networks.resnet import CifarResNet, Depth
from common.networks.weights import find_backbone
from common.runtime.errors import UserError, require
from common.runtime.output import say
from common.runtime.ranks import Ranks
from common.training.checkpoint import first_line, read_checkpoint


def load_backbone(
    path: Path,
    architecture: Depth | None = None,
    stem_stride: int | None = None,
    image_size: int | None = None,
    *,
    tell: bool = True,
) -> nn.Module:
    """The backbone in a file of weights, in any of the forms of `common.networks.weights`.

    Args:
        architecture: what it has to be, a ResNet for large images; None: any, `CifarResNet` too.
        stem_stride: of a `CifarResNet`; None: as in the settings of the run that wrote the file,
            without such settings 1.
        image_size: of the images to come; a run that was trained at another is told of.
        tell: print which weights of the file were taken, and which were not.

    Raises:
        UserError: if the file is missing, damaged, or has no such backbone.
    """
    content = read_checkpoint(path, with_objects=True)
    found = find_backbone(content, str(path), architecture)
    settings = _settings(content, path)
    if stem_stride is None:
        stem_stride = settings.get("stem_stride", 1)
    try:
        network = found.build(stem_stride)
    except UserError:
        raise
    except Exception as error:  # values of a kind that cannot be copied
        reason = first_line(error)
        raise UserError(f"{path} does not fit a {found.architecture}: {reason}") from error
    if tell:
        kind = found.architecture
        if isinstance(network, CifarResNet):
            kind += f" for 32 px of width {network.conv1.out_channels}, stem stride {stem_stride}"
        where = f" behind {found.prefix!r}" if found.prefix else ""
        say(f"Backbone: {kind}, the weights{where} in {path}.")
        if found.others:
            say(f"  Other whole ResNets in it, not used: {', '.join(found.others)}")
        if found.unused:
            say(f"  Not used: {', '.join(found.unused)}")
        trained_at = settings.get("image_size", image_size)
        if image_size is not None and trained_at != image_size:
            say(f"  Trained on views of {trained_at} px, evaluated at {image_size} (--image-size)")
    return network


def require_same_weights(backbone: nn.Module, path: Path, ranks: Ranks) -> int:
    """Refuse to measure where processes have read different files; all ranks wait for each other.

    Returns:
        The checksum of the weights.

    Raises:
        UserError: on every rank.
    """
    weights = checksum(backbone.state_dict())
    require(
        ranks.agree(weights),
        f"not every process finds the same weights in {path}; give every machine the same file",
    )
    return weights


def _settings(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """A run's settings: in its checkpoints, or in the config.json beside its backbone.pt."""
    if isinstance(content.get("config"), dict):
        return content["config"]
    try:
        settings = json.loads((path.parent / "config.json").read_bytes())["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}
