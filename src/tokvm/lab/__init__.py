"""A hypervisor to try tokvm on: personas behind a real sshd, real guests in QEMU."""
