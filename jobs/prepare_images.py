"""Images of a folder, WebDataset tars or Parquet files become image shards; what cannot be read is set aside.

python -m jobs.prepare_images --source photos --output runs/images --val_fraction 0.1
"""

from __future__ import annotations

from pipeline.config import run_job
from shards.writer.prepare import PrepareConfig, prepare_images

if __name__ == "__main__":
    run_job(prepare_images, PrepareConfig)
