"""The backbone in a file of weights: of this project, of torchvision, and of other projects.

Other projects' ResNets have torchvision's names behind a prefix. So one rule finds a backbone: the
prefix under which there are all weights of one of the ResNets here, each of the right shape. Two
spellings are translated: the children of an `nn.Sequential`, which have numbers, by their order;
and `shortcut`, which torchvision calls `downsample`.

The prefixes as these projects' sources write them, and the networks that they evaluate:

| project | backbone | also a whole ResNet |
|---|---|---|
| MoCo | `state_dict.module.encoder_q.` | `state_dict.module.encoder_k.` |
| MoCo v3 | `state_dict.module.base_encoder.` | `state_dict.module.momentum_encoder.` |
| SimSiam | `state_dict.module.encoder.` | |
| DINO | `teacher.module.backbone.` | `student.module.backbone.` |
| solo-learn | `state_dict.backbone.` (once `encoder.`) | `state_dict.momentum_backbone.` |
| lightly | `state_dict.backbone.`, then numbers: `4.0.conv1` | `state_dict.backbone_momentum.` |
| lightly's DINO | `state_dict.teacher_backbone.` | `state_dict.student_backbone.` |
| VISSL | `classy_state_dict.base_model.model.trunk._feature_blocks.` | `….loss.moco_encoder.…` |
| timm | `state_dict_ema.`, without averages `state_dict.` | `state_dict.` |
| this one | `model.backbone.` of a checkpoint | `target.backbone.` or `keys.backbone.` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from common.networks.resnet import CifarDepth, CifarResNet, Depth, imagenet_resnet
from common.runtime.errors import UserError, require

PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # with weights, in their order
# In the prefix of a network that a project trains with, but does not evaluate.
NOT_EVALUATED = re.compile("encoder_k|moco_encoder|momentum|student|target|keys")
AVERAGED = re.compile(r"(^|[._])ema[._]")  # an average of the trained network, evaluated instead

Shapes = Mapping[str, tuple[int, ...]]


class Backbone(NamedTuple):
    """A ResNet's weights.

    Attributes:
        architecture: one of `Depth`, or of `CifarDepth` if the first convolution is 3 × 3.
        prefix: of the names in the file.
        state: by torchvision's names.
        unused: what else the file has, by the first part of each name that differs from `prefix`.
        others: prefixes of other whole ResNets in the file.
    """

    architecture: str
    prefix: str
    state: dict[str, Tensor]
    unused: list[str]
    others: list[str]

    def build(self, stem_stride: int = 1) -> torch.nn.Module:
        """The network with these weights.

        Args:
            stem_stride: of a `CifarResNet`; weights do not tell it.
        """
        stem = self.state["conv1.weight"]
        if stem.shape[-1] == 3:
            network = CifarResNet(self.architecture, len(stem), stem_stride)
        else:
            network = imagenet_resnet(self.architecture)
        network.load_state_dict(self.state)
        return network


def find_backbone(
    content: Mapping[str, object], source: str, architecture: Depth | None = None
) -> Backbone:
    """Find a ResNet in what a file of weights has, nested dictionaries included.

    If there are several, the one that its project evaluates is taken.

    Args:
        source: the file's name, for messages.
        architecture: what it has to be, a ResNet for large images; None: any.

    Raises:
        UserError: if there is none, or none that is whole, or several that no rule decides between.
    """
    tensors = dict(_tensors(content))
    require(
        bool(tensors),
        f"{source} has no tensors with names, perhaps because a whole network was saved; with the "
        "program that wrote it save the state dict alone: torch.save(network.state_dict(), FILE)",
    )
    candidates = dict(_candidates(tensors))
    found = {
        prefix: {name: tensors[old] for name, old in names.items()}
        for prefix, names in candidates.items()
    }
    require(
        bool(found),
        f"{source} has no ResNet: among its {len(tensors)} tensors there is no conv1.weight of "
        "shape [channels, 3, k, k]",
    )
    known = {prefix: _architecture(state, architecture) for prefix, state in found.items()}
    whole = [prefix for prefix, name in known.items() if name]
    if not whole:
        raise UserError(_misfit(source, found, architecture))
    prefix, *rivals = _evaluated(whole, found)
    require(
        not rivals,
        f"{source} has several ResNets, and none is known to be the one to evaluate: "
        f"{', '.join([prefix, *rivals])}; save the state dict of one of them alone",
    )
    unused = _unused(tensors, prefix, candidates[prefix].values())
    others = [other for other in whole if other != prefix]
    return Backbone(known[prefix], prefix, found[prefix], unused, others)


def _tensors(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries, by their keys joined by dots."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and prefix.count(".") < 20:  # it may contain itself
            yield from _tensors(value, f"{prefix}{key}.")


def _candidates(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, str]]]:
    """Prefixes behind which there is a first convolution, each with the ResNet's names.

    Yields:
        The prefix; and by torchvision's name each name in the file.
    """
    for stem, value in tensors.items():
        match = re.fullmatch(r"(|.*\.)(conv1|\d+)\.weight", stem)
        if not match or value.dim() != 4 or value.shape[1] != 3:
            continue
        prefix = match[1]
        below = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        numbers = {name.partition(".")[0] for name in below}
        numbers = sorted(filter(str.isdecimal, numbers), key=int)
        parts = {**dict(zip(numbers, PARTS, strict=False)), **{part: part for part in PARTS}}
        names = {}
        for name in below:
            child, _, rest = name.partition(".")
            if child in parts:
                rest = rest.replace("shortcut.", "downsample.")
                names[f"{parts[child]}.{rest}"] = prefix + name
        yield prefix, names


@cache
def _shapes(architecture: str, width: int | None) -> Shapes:
    """Names and shapes of a ResNet; `width` is that of a `CifarResNet`."""
    with torch.device("meta"):
        network = CifarResNet(architecture, width) if width else imagenet_resnet(architecture)
    return _shapes_of(network.state_dict())


def _shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Without the number of batches, which old files lack and which has no effect."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _possible(state: Mapping[str, Tensor]) -> dict[str, Shapes]:
    """The ResNets that have such a first convolution, by their architecture."""
    width, _, kernel, _ = state["conv1.weight"].shape
    if kernel == 3 and width % 8 == 0:
        return {name: _shapes(name, width) for name in get_args(CifarDepth)}
    return {name: _shapes(name, None) for name in get_args(Depth)}


def _architecture(state: Mapping[str, Tensor], wanted: Depth | None) -> str:
    """The ResNet that has exactly these names and shapes; empty: none."""
    possible = {wanted: _shapes(wanted, None)} if wanted else _possible(state)
    own = _shapes_of(state)
    return next((name for name, shapes in possible.items() if shapes == own), "")


def _misfit(
    source: str, found: Mapping[str, Mapping[str, Tensor]], architecture: Depth | None
) -> str:
    """Why none of the networks in a file is taken."""
    prefix, state = max(found.items(), key=lambda item: len(item[1]))
    own, possible = _shapes_of(state), _possible(state)
    closest = min(possible, key=lambda name: len(possible[name].items() ^ own.items()))
    name = architecture or closest
    text = f"{source}{f', names behind {prefix!r},' * bool(prefix)} does not fit a {name}: "
    if architecture and closest in get_args(Depth) and _shapes(closest, None) == own:
        return f"{text}it is a {closest}; use --backbone {closest}"
    wanted = _shapes(name, None) if architecture else possible[closest]
    reasons = []
    for verb, names in (("lacks", wanted.keys() - own), ("also has", own.keys() - wanted)):
        if names:
            reasons.append(f"it {verb} {_first_of(names)}")
    wrong = [name for name in wanted if name in own and wanted[name] != own[name]]
    if wrong:
        first = wrong[0]
        shapes = f"{first} has the shape {[*own[first]]} in place of {[*wanted[first]]}"
        reasons.append(f"{len(wrong)} shapes differ ({shapes})")
    return f"{text}{'; '.join(reasons)}. Known ResNets: {', '.join(get_args(Depth))}"


def _first_of(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _evaluated(whole: list[str], found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Of several whole ResNets those that are evaluated; equal ones count once."""
    evaluated = [prefix for prefix in whole if not NOT_EVALUATED.search(prefix)] or whole
    chosen = [prefix for prefix in evaluated if AVERAGED.search(prefix)] or evaluated
    different: list[str] = []
    for prefix in chosen:
        if not any(_are_equal(found[prefix], found[other]) for other in different):
            different.append(prefix)
    return different


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))


def _unused(tensors: Mapping[str, Tensor], prefix: str, used: Iterable[str]) -> list[str]:
    """The other names, each cut to its first part that differs from the prefix."""
    own, used = prefix.split("."), set(used)
    unused = {}
    for name in tensors:
        if name not in used:
            parts = name.split(".")
            differing = (part for part, same in zip(parts, own, strict=False) if part != same)
            unused[next(differing, parts[-1])] = None
    return list(unused)
