"""The checkout of this repository whose code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.runtime.errors import require

REPOSITORY = Path(__file__).resolve().parents[2]


def require_own_code(script: Path) -> None:
    """Refuse to run a script of one checkout with the `common` of another.

    This happens in a second clone with the environment of the first, where `common` was installed.

    Raises:
        UserError: if the script is in another checkout.
    """
    script = script.resolve()
    for folder in script.parents:
        if (folder / "common" / "runtime").is_dir():
            require(
                folder == REPOSITORY,
                f"{script} would run with common/ of another checkout, {REPOSITORY}, which this "
                f"Python environment was installed for. Set PYTHONPATH={folder}, or install this "
                f"checkout: pip install -e {folder}",
            )
            return


def git_commit() -> str | None:
    """The commit, with "-dirty" appended where files were changed; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
