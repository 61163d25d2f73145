"""Stage one: train the VQ-KD visual tokenizer (paper §2.2).

python -m jobs.train_tokenizer --help
"""

from __future__ import annotations

from pipeline.config import run_job
from tokenizer.config import TokenizerTrainConfig
from tokenizer.train import train_tokenizer

if __name__ == "__main__":
    run_job(train_tokenizer, TokenizerTrainConfig)
