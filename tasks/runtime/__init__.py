"""Artifact store, manifests, stages, Ray sessions and jobs, progress."""
