"""XenServer and XCP-ng over SSH alone."""
