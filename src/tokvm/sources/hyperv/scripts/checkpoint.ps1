# Freeze the VM under this name, unless it is frozen under it already. Data: { vm, mark, types }.
# types: the checkpoint types that will do for a VM that is not off; of another type nothing is made, and the answer says which
# it is. The mutex makes a second request wait for the first, whose answer was lost.
param($data)
$id = [guid]$data.vm
$mutex = New-Object System.Threading.Mutex $false, "Global\tokvm-$id"
try { $held = $mutex.WaitOne(300000) } catch [System.Threading.AbandonedMutexException] { $held = $true }
if (-not $held) { throw 'TokvmBusy' }
try {
    $vm = Get-VM -Id $id
    $type = $null
    if ($vm.PSObject.Properties['CheckpointType']) { $type = $vm.CheckpointType.ToString() }
    $automatic = $null
    if ($vm.PSObject.Properties['AutomaticCheckpointsEnabled']) { $automatic = [bool]$vm.AutomaticCheckpointsEnabled }
    $found = @(Get-VMSnapshot -VM $vm | Where-Object { $_.Name -ceq $data.mark })
    $suits = $null -eq $type -or @($data.types) -ccontains $type -or ([int]$vm.State -eq 3 -and $type -ne 'Disabled')
    if ($found.Count -eq 0 -and $suits) { $found = @(Checkpoint-VM -VM $vm -SnapshotName $data.mark -Passthru) }
    $made = @($found | ForEach-Object {
        $frozen = @($_.HardDrives | ForEach-Object { @{ controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation; path = [string]$_.Path } })
        @{ id = $_.Id.ToString(); name = [string]$_.Name; type = $_.SnapshotType.ToString(); disks = $frozen }
    })
    @{ checkpointType = $type; automaticCheckpoints = $automatic; state = [int]$vm.State; checkpoints = $made }
} finally {
    $mutex.ReleaseMutex()
    $mutex.Dispose()
}
