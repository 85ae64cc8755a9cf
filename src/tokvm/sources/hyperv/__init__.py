"""Hyper-V over SSH: PowerShell for questions, SFTP for the disks."""
