"""Image files that are already here."""
