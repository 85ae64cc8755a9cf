# Where do the disks' bytes lie, and what did each checkpoint freeze? Data: { vm }.
param($data)
$vm = Get-VM -Id ([guid]$data.vm)

function Layers($path) {
    $found = @()
    $at = [string]$path
    while ($at -and $found.Count -lt 64) {
        $vhd = Get-VHD -Path ([WildcardPattern]::Escape($at))
        $found += @{ path = $at; parent = [string]$vhd.ParentPath; format = $vhd.VhdFormat.ToString(); size = [long]$vhd.Size; diskId = [string]$vhd.DiskIdentifier }
        $at = [string]$vhd.ParentPath
    }
    ,$found
}

$disks = @(Get-VMHardDiskDrive -VM $vm | Where-Object { $_.Path -and $null -eq $_.DiskNumber } | ForEach-Object {
    $layers = Layers $_.Path
    @{ controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation; path = [string]$_.Path; layers = @($layers) }
})
$seen = @{}
$checkpoints = @(@(Get-VMSnapshot -VM $vm) + @(Get-VMSnapshot -VM $vm -SnapshotType Recovery -ErrorAction SilentlyContinue) | Where-Object { $_ -and -not $seen[$_.Id] } | ForEach-Object {
    $seen[$_.Id] = $true
    $parent = $null
    if ($_.ParentSnapshotId) { $parent = $_.ParentSnapshotId.ToString() }
    $frozen = @($_.HardDrives | ForEach-Object { @{ controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation; path = [string]$_.Path } })
    @{ id = $_.Id.ToString(); name = [string]$_.Name; type = $_.SnapshotType.ToString(); parent = $parent; disks = $frozen }
})
@{ state = [int]$vm.State; operational = @($vm.OperationalStatus | ForEach-Object { [int]$_ }); disks = $disks; checkpoints = $checkpoints }
