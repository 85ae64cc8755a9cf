"""A XenServer played behind a real sshd: strict, logged, faulty on demand. Start at `host.build_host`."""
