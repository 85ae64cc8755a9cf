# tokvm: what batch cannot do at the first boot on KVM. Constant text; PowerShell 2 (Server 2008 R2) and later.
# addresses.csv: mac,addresses,masks,gateways,dns; lists are separated by spaces. It is data: read, checked, passed as arguments.
$here = Split-Path -Parent $MyInvocation.MyCommand.Path
$ip = '^\d{1,3}(\.\d{1,3}){3}$'

function Say([string]$text) { Write-Output ("     {0:s} {1}" -f (Get-Date), $text) }

function Words([string]$text) { , @($text -split ' ' | Where-Object { $_ -match $ip }) }

# Disks on a new controller are new disks for Windows Server: its SAN policy leaves them offline.
if (Get-Command Get-Disk -ErrorAction SilentlyContinue) {
    foreach ($disk in @(Get-Disk | Where-Object { $_.IsOffline })) {
        Say "disk $($disk.Number) was offline"
        try {
            Set-Disk -Number $disk.Number -IsOffline $false -ErrorAction Stop
            Set-Disk -Number $disk.Number -IsReadOnly $false -ErrorAction Stop
        } catch { Say "disk $($disk.Number): $_" }
    }
}

function Set-Address($row) {
    $mac = $row.mac.ToUpper()
    if ($mac -notmatch '^([0-9A-F]{2}:){5}[0-9A-F]{2}$') { Say 'a row without a MAC'; return }
    # The driver may have come a moment ago.
    for ($try = 0; $try -lt 30; $try++) {
        $adapter = @(Get-WmiObject Win32_NetworkAdapterConfiguration -Filter 'IPEnabled = TRUE' |
            Where-Object { $_.MACAddress -eq $mac })
        if ($adapter.Count -gt 0) { break }
        Start-Sleep -Seconds 2
    }
    if ($adapter.Count -ne 1) { Say "$($adapter.Count) adapters have $mac"; return }
    $addresses = Words $row.addresses
    $masks = Words $row.masks
    if ($addresses.Count -eq 0 -or $addresses.Count -ne $masks.Count) { Say "$mac has no usable addresses"; return }
    $answer = $adapter[0].EnableStatic($addresses, $masks)
    Say "$mac addresses: $($answer.ReturnValue)"
    $gateways = Words $row.gateways
    if ($gateways.Count -gt 0) {
        $metrics = [uint16[]]@($gateways | ForEach-Object { 1 })
        $answer = $adapter[0].SetGateways($gateways, $metrics)
        Say "$mac gateways: $($answer.ReturnValue)"
    }
    $dns = Words $row.dns
    if ($dns.Count -gt 0) {
        $answer = $adapter[0].SetDNSServerSearchOrder($dns)
        Say "$mac name servers: $($answer.ReturnValue)"
    }
}

$file = Join-Path $here 'addresses.csv'
if (Test-Path -LiteralPath $file) {
    foreach ($row in @(Import-Csv -LiteralPath $file)) { Set-Address $row }
}

# Tools of the old hypervisor that Windows Installer can remove. Microsoft's integration services are part of Windows.
if (Test-Path -LiteralPath (Join-Path $here 'remove-tools.txt')) {
    $names = '^(VMware Tools|XenServer VM Tools|XenServer Tools.*|Citrix VM Tools|Citrix Hypervisor.*|XCP-ng .*)$'
    $keys = 'HKLM:\SOFTWARE\Microsoft\Windows\CurrentVersion\Uninstall', 'HKLM:\SOFTWARE\Wow6432Node\Microsoft\Windows\CurrentVersion\Uninstall'
    foreach ($key in $keys | Where-Object { Test-Path -LiteralPath $_ }) {
        foreach ($product in Get-ChildItem -LiteralPath $key) {
            $name = [string]$product.GetValue('DisplayName')
            $code = $product.PSChildName
            if ($name -match $names -and $code -match '^\{[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\}$') {
                Say "removing $code"
                $done = Start-Process -FilePath msiexec.exe -ArgumentList '/x', $code, '/qn', '/norestart' -Wait -PassThru
                Say "removed: $($done.ExitCode)"
            }
        }
    }
}
