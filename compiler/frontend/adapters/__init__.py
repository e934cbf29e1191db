"""Families that bypass the registries of transformers: one adapter each."""
