# Compare and set our one line in the VM's Notes: `#tokvm LINE`. Data: { vm, expect, write }; null is "no line".
# The rest of the Notes stays as it is, byte for byte: a new line goes in front, a removed one takes its own newline with it.
param($data)
$id = [guid]$data.vm
$pattern = '(^|\n)#tokvm ([^\r\n]*)(\r?\n|$)'
$mutex = New-Object System.Threading.Mutex $false, "Global\tokvm-$id"
try { $held = $mutex.WaitOne(30000) } catch [System.Threading.AbandonedMutexException] { $held = $true }
if (-not $held) { throw 'TokvmBusy' }
try {
    $vm = Get-VM -Id $id
    $notes = [string]$vm.Notes
    $match = [regex]::Match($notes, $pattern)
    $line = $null
    if ($match.Success) { $line = $match.Groups[2].Value }
    $swapped = $false
    if ($line -ceq $data.expect) {
        if ($match.Success) {
            $before = $notes.Substring(0, $match.Index) + $match.Groups[1].Value
            $after = $notes.Substring($match.Index + $match.Length)
            $end = $match.Groups[3].Value
        } else {
            $before = ''
            $after = $notes
            $end = "`n"
        }
        if ($null -ne $data.write) { $notes = $before + '#tokvm ' + $data.write + $end + $after } else { $notes = $before + $after }
        Set-VM -VM $vm -Notes $notes
        $match = [regex]::Match([string](Get-VM -Id $id).Notes, $pattern)
        $line = $null
        if ($match.Success) { $line = $match.Groups[2].Value }
        $swapped = $true
    }
    $now = [long]([DateTime]::UtcNow - (New-Object DateTime 1970, 1, 1)).TotalSeconds
    @{ swapped = $swapped; record = $line; now = $now }
} finally {
    $mutex.ReleaseMutex()
    $mutex.Dispose()
}
