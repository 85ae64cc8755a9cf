"""What every played host has: a state directory, a plan of faults, a real sshd in front, and a connection that can break."""
