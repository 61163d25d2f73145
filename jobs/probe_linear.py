"""Evaluation: a linear classifier on the frozen features of a pretrained backbone (paper §3.3).

python -m jobs.probe_linear --help
"""

from __future__ import annotations

from pipeline.config import run_job
from pretrain.evals.probe import ProbeConfig, probe_linear

if __name__ == "__main__":
    run_job(probe_linear, ProbeConfig)
