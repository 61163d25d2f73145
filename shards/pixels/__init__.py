"""From bytes to pixels: any image file, a view of it, a stored crop.

`decode` reads source images of every format, `views` draws and renders crops as a pure function of
(policy, sample, view) and encodes what is stored. Nothing here knows of shards.
"""
