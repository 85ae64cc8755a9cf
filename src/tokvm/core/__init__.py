"""Words everybody uses: units, extents, disks, machines, errors. No I/O."""
