"""VMDK, all kinds: descriptor, flat, hosted sparse, stream-optimised, COWD, seSparse."""
