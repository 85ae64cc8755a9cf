"""What is on a VM's disks, read through libguestfs' appliance: `inspect(appliance) -> GuestFacts`.

    partitions, ESP ─► which OS ─► mount ─► menus, kernels, fstab … (Linux)  |  registry, NTFS flags (Windows) ─► GuestFacts

Parsers are pure and one per format; only tree.py, registry.py and facts.py speak to the appliance.
"""

from tokvm.guest.inspection.facts import inspect

__all__ = ["inspect"]
