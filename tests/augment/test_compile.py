"""`compile` of augmentations: the same images; and what `--compile` needs."""

from __future__ import annotations

import re
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import simsiam_cifar10.run
from assertions import assert_equal
from common.augment.base import Chain, Draws, RandomApply
from common.augment.cifar10 import standard_augmentation
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.grid_shuffle import GridShuffle
from common.augment.operations import OPERATIONS
from common.augment.randaugment import RandAugment
from common.runtime.compiler import require_compiler
from common.runtime.errors import UserError
from common.runtime.seeding import generator_for
from common.views import ViewMaker
from pillow_reference import pictures

torch.set_num_threads(1)

COUNT, SIZE = 48, (20, 27)
Traced = list[GraphModule]


@pytest.fixture(params=["traced", "compiled"])
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Traced:
    """torch.compile whole, or up to the traced operations, which need no C++ compiler."""
    graphs: Traced = []

    def run_traced(graph: GraphModule, example: list[torch.Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    def run_compiled(graph: GraphModule, example: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return torch._inductor.compile(graph, example)

    if request.param == "compiled":
        try:
            require_compiler(torch.device("cpu"))
        except UserError as error:
            pytest.skip(str(error))
    backend = run_traced if request.param == "traced" else run_compiled
    compiled = partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    return graphs


def test_compiled_views_are_the_same_to_the_bit(traced: Traced) -> None:
    """A crop, ColorJitter's four adjustments, grey, and RandAugment's four in floating point."""
    images = pictures(COUNT, SIZE)
    heavy = RandomApply(RandAugment(2, 9), 0.9, otherwise=GridShuffle(4))
    maker = ViewMaker(standard_augmentation(16), heavy, "dssl")
    draws = [maker.draw(COUNT, SIZE, generator_for("views", seed)) for seed in range(3)]
    plain = [maker.make(images, numbers) for numbers in draws]
    assert not traced
    maker.compile()
    for views, numbers in zip(plain, draws, strict=True):
        for name, view in maker.make(images, numbers)._asdict().items():
            assert_equal(view, getattr(views, name), name)
    assert len(traced) >= 9  # functions; some once more for a group of one image
    assert list(OPERATIONS) == list(heavy.choices[0].operations)


def test_a_gpus_steps_are_the_same_when_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """ColorJitter and grey, one graph each. C++ for a CPU, which never runs them, takes minutes."""
    traced: Traced = []

    def run_traced(graph: GraphModule, example: list[torch.Tensor]) -> GraphModule:
        traced.append(graph)
        return graph

    compiled = partial(torch.compile, backend=run_traced, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    images = pictures(COUNT, SIZE)
    augmentation = Chain(ColorJitter(0.4, 0.4, 0.4, 0.1, 0.8), RandomGrey(0.2))
    draws = Draws.of(augmentation.draw(COUNT, SIZE, generator_for("views", 0)))
    plain = augmentation.apply(images, draws)
    monkeypatch.setattr(Draws, "is_on_cpu", False)
    augmentation.compile()
    assert_equal(augmentation.apply(images, draws), plain, "traced")
    assert len(traced) == 2


def test_without_a_compiler_a_run_stops_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = simsiam_cifar10.run.Config(
        device="cpu", compile=True, dataset="shapes", run_dir=str(tmp_path / "run")
    )
    with pytest.raises(UserError, match=r"--compile needs a compiler.*no-such-compiler.*CXX"):
        simsiam_cifar10.run.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compiling_needs_a_compiler_and_pythons_headers(
    device: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=f"needs a compiler.*(gcc|g\\+\\+).*{variable}"):
        require_compiler(torch.device(device))
    monkeypatch.setenv(variable, sys.executable)
    with pytest.raises(UserError, match=re.escape(f"there is no {tmp_path / 'Python.h'}")):
        require_compiler(torch.device(device))
    (tmp_path / "Python.h").touch()
    require_compiler(torch.device(device))
