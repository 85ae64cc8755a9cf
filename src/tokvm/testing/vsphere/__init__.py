"""A played vSphere API (vCenter, or one ESXi's own) in front of the played ESXi host."""
