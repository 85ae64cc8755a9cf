"""Which VMs are there, freeze one, what changed since? One folder per hypervisor with the same file names."""
