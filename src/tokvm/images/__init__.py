"""What does this file say about the guest disk? Bytes in, allocation map out; never writes, no network."""
