"""Virtio put into the initramfs of the running source, by its own tools.

    data/prestage.sh ─stdin─► ssh GUEST sh -s look|prepare ─lines─► report.py ─► Report ─► checks.py: may it, and is it done?

On request only: it is the one place where something runs inside a guest. docs/morph.md.
"""
