"""What does libvirt have to know? VirtualMachine → XML (pure), define and start (libvirt)."""
