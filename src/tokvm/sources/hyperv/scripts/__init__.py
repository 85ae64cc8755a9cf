"""The PowerShell scripts, as they are sent. Their contract is docs/hyperv-commands.md."""
