"""Callbacks: files of a run, its progress, its checkpoints, and how it ends."""
