# Is it off, and has everybody let go of its disks? Data: { vm }. Each running disk's file is opened for reading, shared with
# nobody, and closed: that fails while a VM, a merge, a backup or one of our own readers holds it.
param($data)
$vm = Get-VM -Id ([guid]$data.vm)
$files = @(Get-VMHardDiskDrive -VM $vm | Where-Object { $_.Path -and $null -eq $_.DiskNumber } | ForEach-Object {
    $file = @{ path = [string]$_.Path; free = $false; hresult = 0; message = '' }
    try {
        $stream = [System.IO.File]::Open($file.path, 'Open', 'Read', 'None')
        $stream.Dispose()
        $file.free = $true
    } catch {
        $e = $_.Exception
        while ($e.InnerException) { $e = $e.InnerException }
        $file.hresult = [int]$e.HResult
        $file.message = [string]$e.Message
    }
    $file
})
@{ state = [int]$vm.State; operational = @($vm.OperationalStatus | ForEach-Object { [int]$_ }); files = $files }
