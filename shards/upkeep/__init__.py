"""Keeping a dataset sound.

Finding damage, making lost objects again, and removing files that nothing refers to.
"""
