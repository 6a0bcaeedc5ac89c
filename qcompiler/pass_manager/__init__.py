"""Passes, pipelines, the pipeline runner, and instruments."""
