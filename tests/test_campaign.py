"""results/: what the campaigns would run, and the tables made of what they leave."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import tyro

import campaign
import report
from common.training.settings import check_settings
from scripts import ROOT


def planned(name: str) -> dict[tuple, str]:
    """A campaign's run names by experiment, regime, seed, epochs and heavy augmentation."""
    names = {}
    plan = campaign.Campaign(name)
    for run in plan.runs:
        script = importlib.import_module(f"{run.experiment}.run")
        words = plan.command(run, campaign.Config(name))
        assert words[1] == str(ROOT / run.experiment / "run.py")
        config = tyro.cli(script.Config, args=words[2:])
        check_settings(config)
        heavy = (config.randaug_num_ops, config.randaug_magnitude, config.translate_relative)
        key = (run.experiment, config.regime, config.seed, config.epochs, heavy)
        assert key not in names, run.name
        names[key] = run.name
        assert config.run_dir.endswith(run.name)
    return names


def test_every_cell_of_both_tables_is_planned_and_each_run_differs() -> None:
    settings = planned("miniature")
    paper = (2, 9, False)
    for seed in (0, 1, 2):
        for regime in ("baseline", "joint", "dssl"):
            for method in ("simclr", "byol", "simsiam"):
                name = settings.pop((f"{method}_cifar10", regime, seed, 10, paper))
                assert name == f"{method}-{regime}-seed{seed}"
        for regime in ("joint", "dssl"):
            for heavy in ((4, 10, False), (8, 16, False)):
                del settings["byol_cifar10", regime, seed, 10, heavy]
    assert sorted(settings) == [
        (f"{method}_cifar10", regime, 0, 10, (2, 9, True))
        for method in ("simclr", "simsiam")
        for regime in ("dssl", "joint")
    ]


def test_the_long_campaign_compares_equal_epochs_and_equal_cost() -> None:
    paper, heavier = (2, 9, False), (8, 16, False)
    regimes = [("dssl", 100), ("baseline", 100), ("joint", 100), ("baseline", 200)]
    expected = [
        ("simsiam_cifar10", regime, seed, epochs, paper)
        for seed in (0, 1)
        for regime, epochs in regimes
    ]
    expected += [("byol_cifar10", regime, 0, 100, heavier) for regime in ("joint", "dssl")]
    assert list(planned("long")) == expected


def leave(folder: Path, rows: list[dict[str, float]]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_kept_when_its_linear_accuracy_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "REPOSITORY", tmp_path)
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "results")
    plan = campaign.Campaign("miniature")
    run = plan.runs[0]
    folder = tmp_path / "runs" / "miniature" / run.name
    assert not campaign.is_finished(folder)
    leave(folder, [{"epoch": 0, "knn": 30.0}])
    assert not campaign.is_finished(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 10, "linear": 50.0}) + "\n")
    settings = {name.replace("-", "_"): value for name, value in run.flags.items()}
    settings["dataset"] = "cifar10"
    paths = {"data_root": "/home/someone/data", "run_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps({"config": {**settings, **paths}}))
    assert campaign.is_finished(folder)
    assert not plan.is_kept(run, "cifar10")
    plan.keep(run)
    assert plan.is_kept(run, "cifar10")
    assert not plan.is_kept(run, "folder")  # other pixels
    kept = tmp_path / "results" / "miniature" / run.name
    assert (kept / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert json.loads((kept / "config.json").read_text()) == {
        "config": {**settings, "data_root": "data", "run_dir": run.name}
    }
    longer = run._replace(flags={**run.flags, "epochs": 20})
    assert not plan.is_kept(longer, "cifar10")  # another recipe's results do not count


def test_tables_are_means_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    for seed, gain in enumerate((0.0, 1.0, 5.0)):
        rows = [{"epoch": 0, "knn": 29.0 + seed}]
        rows += [
            {"epoch": e, "knn": 40.0 + e + gain, "spread": 0.9 + e / 100} for e in (1, 2, 3, 4)
        ]
        rows += [{"epoch": 4, "linear": 60.0 + 2 * gain}]
        leave(tmp_path / f"byol-dssl-seed{seed}", rows)
        leave(tmp_path / f"byol-baseline-seed{seed}", rows[:4] + rows[5:])
    leave(tmp_path / "byol-ra4-10-dssl-seed0", [{"epoch": 2, "knn": 44.4, "linear": 51.5}])
    tables = report.tables()
    # Means of 44, 45, 49 and of 60, 62, 70; deviations √7 and √28.
    assert "| dssl |  | 46.0 ± 2.6 (3) |  |" in tables
    assert "| dssl |  | 64.0 ± 5.3 (3) |  |" in tables
    assert "| baseline |  | 45.0 ± 2.6 (3) |  |" in tables
    # Half of dssl's four epochs.
    assert "(the cost of a whole baseline) |  | 44.0 ± 2.6 (3) |  |" in tables
    assert "| untrained |  | 30.0 ± 1.0 (3) |  |" in tables
    assert "| dssl |  | 0.94 |  |" in tables
    expected = "| dssl | 46.0 ± 2.6 (3) / 64.0 ± 5.3 (3) | 44.4 (1 seed) / 51.5 (1 seed) |  /  |"
    assert expected in tables
