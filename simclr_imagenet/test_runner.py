"""Linear evaluation on ImageNet of a backbone that simclr_imagenet has pretrained.

    python test_runner.py --pretrained FILE --data-root DIR

FILE is the run's last.pt, such as ../runs/simclr_imagenet/dssl-seed0/last.pt.
DIR holds train/<class>/* and val/<class>/*. It runs on every GPU of the machine, or under torchrun.
The protocol and its settings are those of every ImageNet experiment: `Config` in
`common/evaluation/test_runner.py`. Typing the same command again continues.
"""

from __future__ import annotations

from common.evaluation.test_runner import Config, main
from common.runtime.script import run_script

if __name__ == "__main__":
    run_script(main, Config, __doc__)
