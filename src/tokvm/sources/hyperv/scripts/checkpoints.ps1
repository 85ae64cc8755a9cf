# The VM's checkpoints, whoever made them. Data: { vm }.
param($data)
$vm = Get-VM -Id ([guid]$data.vm)
$seen = @{}
$checkpoints = @(@(Get-VMSnapshot -VM $vm) + @(Get-VMSnapshot -VM $vm -SnapshotType Recovery -ErrorAction SilentlyContinue) | Where-Object { $_ -and -not $seen[$_.Id] } | ForEach-Object {
    $seen[$_.Id] = $true
    $parent = $null
    if ($_.ParentSnapshotId) { $parent = $_.ParentSnapshotId.ToString() }
    $frozen = @($_.HardDrives | ForEach-Object { @{ controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation; path = [string]$_.Path } })
    @{ id = $_.Id.ToString(); name = [string]$_.Name; type = $_.SnapshotType.ToString(); parent = $parent; disks = $frozen }
})
@{ checkpoints = $checkpoints }
