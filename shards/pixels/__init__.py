"""From bytes to pixels: any image file, a view of it, a stored crop.

`decode` reads source images, `views` draws and renders crops as a pure function of (policy, sample, view) and
encodes what is stored, `crops` decides what a reader shows of an image. Nothing here knows of shards.
"""
