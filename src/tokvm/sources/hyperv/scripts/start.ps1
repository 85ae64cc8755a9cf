# Start the VM if it is off. Data: { vm }.
param($data)
$id = [guid]$data.vm
$vm = Get-VM -Id $id
if ([int]$vm.State -eq 3) { Start-VM -VM $vm -Confirm:$false }
@{ state = [int](Get-VM -Id $id).State }
