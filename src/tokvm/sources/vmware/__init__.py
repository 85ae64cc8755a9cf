"""VMware as a source: ESXi over SSH alone; `api`: vSphere's API."""
