"""Descriptions and reports of models and artifacts, for people and programs."""
