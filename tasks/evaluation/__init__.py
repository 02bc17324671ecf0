"""Suites of items that score a model."""
