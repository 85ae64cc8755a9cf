"""A Windows host with Hyper-V, played behind a real sshd: strict, hostile on demand, with real VHDX chains."""
