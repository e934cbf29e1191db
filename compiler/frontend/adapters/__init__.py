"""Adapters for model families that bypass the registries of transformers: one file per block."""
