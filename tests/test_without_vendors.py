"""Algorithms run on machines that have torch and timm, but no Ray and no open_clip.

Shards are written by webdataset, so it is there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys
for absent in ("ray", "open_clip", "moto"):
    sys.modules[absent] = None  # importing it now raises ImportError

from pipeline.cluster.config import ClusterConfig
from pretrain.model.artifacts import load_backbone
from pretrain.model.size import BackboneSize
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.config import PretrainConfig
from pretrain.train import pretrain_mim
from shards.writer.prepare import PrepareConfig, prepare_images
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.run import precompute_shards
from tokenizer.config import TokenizerTrainConfig
from tokenizer.train import train_tokenizer
from tokenizer.model.vqkd import VQKDConfig

source, root = sys.argv[1:]
images, tokenizer, tokens = f"{root}/images", f"{root}/tokenizer", f"{root}/tokens"
here = ClusterConfig(num_workers=0)
prepare_images(PrepareConfig(source=source, output=images, cluster=here))
sizes = dict(image_size=32, patch_size=8, width=32, depth=1, heads=2, decoder_depth=1)
model = VQKDConfig(codebook_size=16, code_dim=8, **sizes)
train_tokenizer(
    TokenizerTrainConfig(images=images, output=tokenizer, model=model, epochs=1, batch_size=8, cluster=here)
)
precompute_shards(PrecomputeConfig(images=images, tokenizer=tokenizer, output=tokens, cluster=here))
heads = MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1))
size = BackboneSize(width=32, depth=2, heads=2)
common = dict(backbone=size, mim=heads, epochs=1, batch_size=8, cluster=here)
pretrain_mim(PretrainConfig(shards=tokens, output=f"{root}/backbone", **common))
pretrain_mim(PretrainConfig(images=images, tokenizer=tokenizer, output=f"{root}/online", **common))
load_backbone(f"{root}/online")
print("all stages ran")
"""


def test_all_stages_run_in_process_without_the_vendors(
    make_image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(make_image_folder()), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("all stages ran")
