"""Linear evaluation on ImageNet of a backbone that barlowtwins_imagenet has pretrained.

    python test_runner.py --pretrained ../runs/barlowtwins_imagenet/dssl-seed0/last.pt

with --data-root DIR, which holds train/<class>/* and val/<class>/*; on every GPU of the machine,
under torchrun as run.py.
The protocol and its settings are those of every ImageNet experiment: `Config` in
`common/evaluation/test_runner.py`. Typing the same command again continues.
"""

from __future__ import annotations

from common.evaluation.test_runner import Config, main
from common.runtime.script import run_script

if __name__ == "__main__":
    run_script(main, Config, __doc__)
