"""Fine-tuning for classification (paper §3.1 and Table 10).

What a run starts from, augmentation (which pretraining never touches) and layer-wise learning rates.
"""
