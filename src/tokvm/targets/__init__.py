"""Where do the bytes go? Raw file, block device."""
