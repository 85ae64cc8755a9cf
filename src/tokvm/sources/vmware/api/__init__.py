"""VMware through its own API: vCenter, or a single ESXi. Needs pyVmomi (`pip install 'tokvm[vmware]'`)."""
