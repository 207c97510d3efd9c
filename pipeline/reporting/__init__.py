"""Writes the report: results, table, figures, page, and the comparison of two revisions.

In: `outputs/`, `reports/*.json`, `sweeps/`. Out: `reports/`.
"""
