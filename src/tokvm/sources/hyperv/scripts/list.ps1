# Which VMs does this host have? Data: {}. Planned VMs and replicas are VMs to Hyper-V as well.
param($data)
$machines = @(Get-VM | ForEach-Object { @{ id = $_.Id.ToString(); name = [string]$_.Name; state = [int]$_.State } })
@{ host = [string]$env:COMPUTERNAME; machines = $machines }
