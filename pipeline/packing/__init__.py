"""Packs source images into shards, and indexes existing shards.

Reads `data.source`. Writes tars, `{train,val}.index.parquet`, `oddities.csv` and `manifest.json`.
"""
