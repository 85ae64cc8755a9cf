# Remove one checkpoint if it bears this name now. Data: { vm, id, mark }. Its merge begins afterwards, by itself.
param($data)
$vm = Get-VM -Id ([guid]$data.vm)
$wanted = [guid]$data.id
$found = Get-VMSnapshot -VM $vm | Where-Object { $_.Id -eq $wanted } | Select-Object -First 1
if ($null -eq $found) {
    @{ found = $false; name = $null; removed = $false }
} elseif ($found.Name -cne $data.mark) {
    @{ found = $true; name = [string]$found.Name; removed = $false }
} else {
    Remove-VMSnapshot -VMSnapshot $found -Confirm:$false
    @{ found = $true; name = [string]$found.Name; removed = $true }
}
