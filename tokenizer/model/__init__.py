"""VQ-KD (paper §2.2) as a model.

The ViT encoder and decoder, the quantizer, the loss, the frozen teachers, and the tokenizer artifact: its
file format, and the official checkpoints' names.
"""
