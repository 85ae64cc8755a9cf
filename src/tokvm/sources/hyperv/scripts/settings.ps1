# Change what starts the VM and how it is checkpointed; what is null or missing stays. Read back.
# Data: { vm, checkpointType, automaticCheckpoints, autoStart, priority, restartAction }. The last two: of a cluster's role.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id
if ($null -ne $data.checkpointType) { Set-VM -VM $vm -CheckpointType $data.checkpointType }
if ($null -ne $data.automaticCheckpoints) { Set-VM -VM $vm -AutomaticCheckpointsEnabled ([bool]$data.automaticCheckpoints) }
if ($null -ne $data.autoStart) { Set-VM -VM $vm -AutomaticStartAction $data.autoStart }
if ($vm.IsClustered) {
    if ($null -ne $data.priority) { (Get-ClusterGroup -VMId $id).Priority = [int]$data.priority }
    if ($null -ne $data.restartAction) {
        (Get-ClusterResource -VMId $id | Where-Object { $_.ResourceType.Name -eq 'Virtual Machine' } | Select-Object -First 1).RestartAction = [int]$data.restartAction
    }
}
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
@{ checkpointType = $checkpointType; automaticCheckpoints = $automatic; autoStart = $vm.AutomaticStartAction.ToString(); clustered = [bool]$vm.IsClustered; cluster = $cluster }
