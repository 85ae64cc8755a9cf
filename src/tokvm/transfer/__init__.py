"""How do the bytes get there? Plan, pass, checkpoint, manifest, verify, progress."""
