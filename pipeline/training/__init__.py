"""What every training loop calls, and no loop inherits.

The worker (rank and device), the request to save and end, optimizer groups and schedules, what happens
inside a step, checkpoints on any storage, metrics and progress lines. The loops themselves are written out
in `tokenizer.train`, `pretrain.train`, `pretrain.finetune.train` and `pretrain.segment.train`.
"""
