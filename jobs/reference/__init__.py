"""The checks behind `check_reference`: recorded numbers of the official code against ours.

`fixtures` finds and reads the recorded files, measures differences and repeats the recorded optimizer steps;
`vqkd` compares the tokenizer, `vit` the pretraining and fine-tuning models, schedules and position tables.
"""
