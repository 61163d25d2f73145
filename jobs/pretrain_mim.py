"""Stage two: masked image modelling from token shards, or online (paper §2.3).

python -m jobs.pretrain_mim --help
"""

from __future__ import annotations

from pipeline.config import run_job
from pretrain.config import PretrainConfig
from pretrain.train import pretrain_mim

if __name__ == "__main__":
    run_job(pretrain_mim, PretrainConfig)
