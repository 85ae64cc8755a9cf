"""tokvm: move virtual machines to KVM while they keep running."""

__version__ = "0.1.0"
