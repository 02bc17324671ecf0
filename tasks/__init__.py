"""The work of each stage, on Ray."""
