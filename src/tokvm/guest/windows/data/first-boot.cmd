@echo off
rem tokvm: the work of the first boot on KVM, as LocalSystem. Constant text: what differs between guests lies beside it in files.
rem   certs\*.cer    signers of the drivers, for TrustedPublisher
rem   drivers\*\*.inf
rem   addresses.csv  static addresses by MAC, for first-boot.ps1
rem   qemu-ga.msi
rem Each step may run twice: when the guest goes down in the middle, its next boot starts over.
setlocal
cd /d "%~dp0"
if exist done.txt goto remove
set LOG=%~dp0first-boot.log
call :steps >>"%LOG%" 2>&1
:remove
sc.exe delete tokvm-firstboot >nul 2>&1
exit /b 0

:steps
echo ==== %DATE% %TIME% started
rem Plug and play is still at work on the new hardware right after the boot.
ping.exe -n 21 127.0.0.1 >nul
for %%f in (certs\*.cer) do (
    echo ---- %DATE% %TIME% certificate %%f
    certutil.exe -f -addstore TrustedPublisher "%%f"
)
for /d %%d in (drivers\*) do for %%f in ("%%d\*.inf") do (
    echo ---- %DATE% %TIME% driver %%f
    rem The first is Windows 10's and Server 2016's, the second everybody's. Exit codes 259 (no such device) and 3010 are fine.
    pnputil.exe /add-driver "%%~f" /install || pnputil.exe -i -a "%%~f"
)
pnputil.exe /scan-devices
ping.exe -n 11 127.0.0.1 >nul
echo ---- %DATE% %TIME% disks, addresses, old tools
powershell.exe -NoLogo -NoProfile -NonInteractive -ExecutionPolicy Bypass -File "%~dp0first-boot.ps1"
if exist qemu-ga.msi (
    echo ---- %DATE% %TIME% guest agent
    msiexec.exe /i "%~dp0qemu-ga.msi" /qn /norestart /l*+ "%~dp0qemu-ga.log"
)
echo ==== %DATE% %TIME% done
echo done>done.txt
exit /b 0
