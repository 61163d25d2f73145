"""What every training loop calls, and no loop inherits.

The worker (rank and device), the request to save and end, the settings that all jobs share, optimizer and
schedule, what happens inside a step, and the journal: checkpoints, metrics, progress lines. The loops are
`tokenizer.train`, `pretrain.train`, `pretrain.finetune.train` and `pretrain.segment.train`.
"""
