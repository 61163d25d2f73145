"""Evaluation: fine-tune a backbone on labelled images, also as an intermediate step (Tables 1 and 7).

python -m jobs.finetune_classifier --backbone runs/backbone --train runs/train --val runs/val --output runs/ft
"""

from __future__ import annotations

from pipeline.config import run_job
from pretrain.finetune.config import FinetuneConfig
from pretrain.finetune.train import finetune_classifier

if __name__ == "__main__":
    run_job(finetune_classifier, FinetuneConfig)
