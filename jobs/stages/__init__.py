"""Stages in order: what each needs, what is finished, and running or submitting the rest."""
