"""A configuration's way in: composed by Hydra, then checked before anything is built or written."""
