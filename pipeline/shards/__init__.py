"""The shard format on disk, and readers for a folder, a URL or a node-local cache.

Reads a folder with `manifest.json`. Provides `Shards` and stores that return the bytes of an image.
"""
