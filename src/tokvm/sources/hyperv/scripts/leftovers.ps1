# sftp-server processes whose connection is gone but which may still hold our files open. Data: { end }. end: end them.
# Only those of the user we are logged in as, and only where no sshd (sshd.exe, since 9.8 sshd-session.exe) is among the living
# ancestors: all others are somebody's session.
param($data)
$me = [System.Security.Principal.WindowsIdentity]::GetCurrent().User.Value
$all = @{}
Get-CimInstance -ClassName Win32_Process | ForEach-Object { $all[[long]$_.ProcessId] = $_ }
$found = @($all.Values | Where-Object { $_.Name -eq 'sftp-server.exe' } | Where-Object {
    $child = $_
    $served = $false
    for ($steps = 0; $steps -lt 16 -and -not $served; $steps++) {
        $parent = $all[[long]$child.ParentProcessId]
        if (-not $parent -or $parent.CreationDate -gt $child.CreationDate) { break }
        $served = $parent.Name -like 'sshd*'
        $child = $parent
    }
    -not $served
} | Where-Object { (Invoke-CimMethod -InputObject $_ -MethodName GetOwnerSid).Sid -eq $me } | ForEach-Object {
    $ended = $false
    if ($data.end) { $ended = 0 -eq [int](Invoke-CimMethod -InputObject $_ -MethodName Terminate).ReturnValue }
    @{ pid = [long]$_.ProcessId; ended = $ended }
})
@{ processes = $found }
