"""A guest's initramfs: what is in it, and one more segment with the modules that KVM needs. Pure: bytes in, bytes out."""
