# Ask the guest to shut down, and look for at most `wait` seconds whether it does. Data: { vm, ask, wait }.
# InitiateShutdown asks the guest and returns; unlike Stop-VM it does not wait, and nothing here ever cuts the power.
# Force lets the guest close programs that hold unsaved data, as Stop-VM -Force does.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id
$answer = $null
if ($data.ask -and [int]$vm.State -eq 2) {
    $component = Get-CimInstance -Namespace 'root\virtualization\v2' -ClassName 'Msvm_ShutdownComponent' -Filter "SystemName='$id'" | Select-Object -First 1
    if ($component) {
        $answer = [long](Invoke-CimMethod -InputObject $component -MethodName 'InitiateShutdown' -Arguments @{ Force = $true; Reason = 'tokvm' }).ReturnValue
    } else {
        $answer = [long]-1
    }
}
$until = [DateTime]::UtcNow.AddSeconds([double]$data.wait)
$refused = $null -ne $answer -and $answer -ne 0 -and $answer -ne 4096
while ([int]$vm.State -ne 3 -and -not $refused -and [DateTime]::UtcNow -lt $until) {
    Start-Sleep -Milliseconds 250
    $vm = Get-VM -Id $id
}
@{ answer = $answer; state = [int]$vm.State }
