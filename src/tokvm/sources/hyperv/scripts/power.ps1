# How does it stand now? Data: { vm }. Cheap: no disk is looked at. `now`: seconds since 1970 by the host's clock.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id
$cluster = $null
if ($vm.IsClustered) {
    $group = Get-ClusterGroup -VMId $id
    $resource = Get-ClusterResource -VMId $id | Where-Object { $_.ResourceType.Name -eq 'Virtual Machine' } | Select-Object -First 1
    $cluster = @{ group = [string]$group.Name; owner = [string]$group.OwnerNode.Name; priority = [int]$group.Priority; restartAction = [int]$resource.RestartAction }
}
$checkpointType = $null
if ($vm.PSObject.Properties['CheckpointType']) { $checkpointType = $vm.CheckpointType.ToString() }
$automatic = $null
if ($vm.PSObject.Properties['AutomaticCheckpointsEnabled']) { $automatic = [bool]$vm.AutomaticCheckpointsEnabled }
$record = [regex]::Match([string]$vm.Notes, '(?:^|\n)#tokvm ([^\r\n]*)')
$line = $null
if ($record.Success) { $line = $record.Groups[1].Value }
$now = [long]([DateTime]::UtcNow - (New-Object DateTime 1970, 1, 1)).TotalSeconds
@{
    state = [int]$vm.State; operational = @($vm.OperationalStatus | ForEach-Object { [int]$_ }); status = [string]$vm.Status
    uptime = [long]$vm.Uptime.TotalSeconds; now = $now; record = $line
    checkpointType = $checkpointType; automaticCheckpoints = $automatic; autoStart = $vm.AutomaticStartAction.ToString()
    clustered = [bool]$vm.IsClustered; cluster = $cluster
}
