"""Evaluation: semantic segmentation with UperNet on a pretrained backbone (paper §3.4, Table 11).

python -m jobs.finetune_segmentation --help
"""

from __future__ import annotations

from pipeline.config import run_job
from pretrain.segment.config import SegmentationConfig
from pretrain.segment.train import finetune_segmentation

if __name__ == "__main__":
    run_job(finetune_segmentation, SegmentationConfig)
