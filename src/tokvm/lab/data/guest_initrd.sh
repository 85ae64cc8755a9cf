#!/bin/busybox sh
# /init of the lab guest's initrd: loads drivers, mounts the root found by its UUID, hands over.
# First the modules of /conf/modules, then, while there is no root, whatever the hardware asks for by modalias, more than once:
# a bus that has got its driver shows devices that ask for more.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb modprobe -a -q $($bb cat /conf/modules) 2>/dev/null
read -r words </proc/cmdline
for word in $words; do case $word in root=UUID=*) uuid=${word#root=UUID=} ;; esac; done
tries=0
until root=$($bb findfs "UUID=$uuid" 2>/dev/null); do
    tries=$((tries + 1))
    case $tries in
    1) $bb mount -t sysfs sys /sys ;;
    2 | 3 | 20) $bb modprobe -a -q -b $($bb find /sys/devices -name modalias -exec $bb cat {} + | $bb sort -u) 2>/dev/null ;;
    60)
        echo "LAB-GUEST ALERT! UUID=$uuid does not exist" >/dev/ttyS0
        $bb cat /proc/partitions >/dev/ttyS0
        $bb poweroff -f
        ;;
    esac
    $bb usleep 50000
done
$bb mount -t ext4 -o rw,noatime "$root" /new || { echo "LAB-GUEST cannot mount $root" >/dev/ttyS0; $bb poweroff -f; }
$bb mount -t devtmpfs dev /new/dev
$bb mount -t proc proc /new/proc
exec $bb switch_root /new /sbin/init
