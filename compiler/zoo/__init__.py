"""Recipes that come with moec, and what they were measured on and at what."""
