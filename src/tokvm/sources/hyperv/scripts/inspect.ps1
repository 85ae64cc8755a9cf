# What is this VM made of, and what state is it in? Data: { vm }.
# Enums that are only compared are numbers; those that are written back, and those without documented numbers, are their
# .NET names, which no language changes. What an old host does not have is null.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id

function Has($command) { $null -ne (Get-Command -Name $command -ErrorAction SilentlyContinue) }
function Failure($record) {
    $e = $record.Exception
    while ($e.InnerException) { $e = $e.InnerException }
    @{ type = $e.GetType().FullName; message = [string]$e.Message; hresult = [int]$e.HResult; id = [string]$record.FullyQualifiedErrorId }
}

# From the file that the VM writes down to the one without a parent.
function Layers($path) {
    $found = @()
    $at = [string]$path
    while ($at -and $found.Count -lt 64) {
        $layer = @{ path = $at; parent = ''; format = $null; type = $null; size = $null; fileSize = $null; diskId = $null; logicalSector = $null; physicalSector = $null; error = $null }
        try {
            $vhd = Get-VHD -Path ([WildcardPattern]::Escape($at))
            $layer.parent = [string]$vhd.ParentPath
            $layer.format = $vhd.VhdFormat.ToString()
            $layer.type = $vhd.VhdType.ToString()
            $layer.size = [long]$vhd.Size
            $layer.fileSize = [long]$vhd.FileSize
            $layer.diskId = [string]$vhd.DiskIdentifier
            $layer.logicalSector = [int]$vhd.LogicalSectorSize
            $layer.physicalSector = [int]$vhd.PhysicalSectorSize
        } catch {
            $layer.error = Failure $_
        }
        $found += $layer
        $at = $layer.parent
    }
    ,$found
}

function Volume($path) {
    try {
        $volume = Get-Volume -FilePath $path
        @{ id = [string]$volume.UniqueId; fileSystem = [string]$volume.FileSystem; size = [long]$volume.Size; free = [long]$volume.SizeRemaining }
    } catch { $null }
}

$firmware = $null
if ([int]$vm.Generation -eq 2) {
    $fw = Get-VMFirmware -VM $vm
    $first = $fw.BootOrder | Where-Object { $_.BootType.ToString() -eq 'Drive' -and $_.Device -and $_.Device.PSObject.Properties['ControllerLocation'] } | Select-Object -First 1
    $boot = $null
    if ($first) { $boot = @{ number = [int]$first.Device.ControllerNumber; location = [int]$first.Device.ControllerLocation } }
    $firmware = @{ secureBoot = $fw.SecureBoot.ToString(); bootDrive = $boot }
}

$security = $null
if (Has 'Get-VMSecurity') {
    $s = Get-VMSecurity -VM $vm
    $security = @{ tpm = [bool]$s.TpmEnabled; shielded = [bool]$s.Shielded; encryptedState = [bool]$s.EncryptStateAndVmMigrationTraffic }
}

$disks = @(Get-VMHardDiskDrive -VM $vm | ForEach-Object {
    $path = [string]$_.Path
    $number = $null
    if ($null -ne $_.DiskNumber) { $number = [int]$_.DiskNumber }
    $layers = @()
    $volume = $null
    if ($path -and $null -eq $number) { $layers = Layers $path; $volume = Volume $path }
    @{
        controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation
        path = $path; passThrough = $number; shared = [bool]$_.SupportPersistentReservations; layers = @($layers); volume = $volume
    }
})

$nics = @(Get-VMNetworkAdapter -VM $vm | ForEach-Object {
    $vlan = $null
    if ($_.VlanSetting) { $vlan = @{ mode = $_.VlanSetting.OperationMode.ToString(); access = [int]$_.VlanSetting.AccessVlanId; native = [int]$_.VlanSetting.NativeVlanId } }
    @{ id = [string]$_.Id; name = [string]$_.Name; mac = [string]$_.MacAddress; dynamic = [bool]$_.DynamicMacAddressEnabled; switch = [string]$_.SwitchName; vlan = $vlan }
})

$seen = @{}
$checkpoints = @(@(Get-VMSnapshot -VM $vm) + @(Get-VMSnapshot -VM $vm -SnapshotType Recovery -ErrorAction SilentlyContinue) | Where-Object { $_ -and -not $seen[$_.Id] } | ForEach-Object {
    $seen[$_.Id] = $true
    $parent = $null
    if ($_.ParentSnapshotId) { $parent = $_.ParentSnapshotId.ToString() }
    $frozen = @($_.HardDrives | ForEach-Object { @{ controller = $_.ControllerType.ToString(); number = [int]$_.ControllerNumber; location = [int]$_.ControllerLocation; path = [string]$_.Path } })
    @{ id = $_.Id.ToString(); name = [string]$_.Name; type = $_.SnapshotType.ToString(); parent = $parent; disks = $frozen }
})

$services = @(Get-VMIntegrationService -VM $vm | ForEach-Object {
    @{ component = ([string]$_.Id).Split('\')[-1]; enabled = [bool]$_.Enabled; status = [int]$_.PrimaryOperationalStatus }
})

$cluster = $null
if ($vm.IsClustered) {
    try {
        $group = Get-ClusterGroup -VMId $id
        $resource = Get-ClusterResource -VMId $id | Where-Object { $_.ResourceType.Name -eq 'Virtual Machine' } | Select-Object -First 1
        $cluster = @{ group = [string]$group.Name; owner = [string]$group.OwnerNode.Name; priority = [int]$group.Priority; restartAction = [int]$resource.RestartAction; error = $null }
    } catch {
        $cluster = @{ group = ''; owner = ''; priority = $null; restartAction = $null; error = Failure $_ }
    }
}

$checkpointType = $null
if ($vm.PSObject.Properties['CheckpointType']) { $checkpointType = $vm.CheckpointType.ToString() }
$automatic = $null
if ($vm.PSObject.Properties['AutomaticCheckpointsEnabled']) { $automatic = [bool]$vm.AutomaticCheckpointsEnabled }

@{
    host = [string]$env:COMPUTERNAME
    id = $vm.Id.ToString(); name = [string]$vm.Name; notes = [string]$vm.Notes; version = [string]$vm.Version
    state = [int]$vm.State; operational = @($vm.OperationalStatus | ForEach-Object { [int]$_ }); status = [string]$vm.Status
    generation = [int]$vm.Generation; processors = [int]$vm.ProcessorCount
    memory = @{ startup = [long]$vm.MemoryStartup; dynamic = [bool]$vm.DynamicMemoryEnabled; maximum = [long]$vm.MemoryMaximum }
    checkpointType = $checkpointType; automaticCheckpoints = $automatic; autoStart = $vm.AutomaticStartAction.ToString()
    replication = @{ state = [int]$vm.ReplicationState; mode = [int]$vm.ReplicationMode }
    clustered = [bool]$vm.IsClustered; cluster = $cluster
    firmware = $firmware; security = $security; disks = $disks; nics = $nics; checkpoints = $checkpoints; services = $services
}
