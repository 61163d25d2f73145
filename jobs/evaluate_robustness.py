"""Evaluation: a fine-tuned classifier on clean and on shifted images, side by side (Table 3).

python -m jobs.evaluate_robustness --classifier runs/ft --clean runs/val --corruptions jpeg --output runs/r
"""

from __future__ import annotations

from pipeline.config import run_job
from pretrain.evals.robustness import RobustnessConfig, evaluate_robustness

if __name__ == "__main__":
    run_job(evaluate_robustness, RobustnessConfig)
