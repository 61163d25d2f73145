"""What lies on disk, byte for byte.

The record of a sample, the tar and its index, the plan of a pass, the shard table and the manifest, and the
builder that makes a shard in memory and opens it again. No image library and no Ray.
"""
