# Cut the power. Data: { vm }.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id
if ([int]$vm.State -ne 3) { Stop-VM -VM $vm -TurnOff -Force -Confirm:$false }
@{ state = [int](Get-VM -Id $id).State }
