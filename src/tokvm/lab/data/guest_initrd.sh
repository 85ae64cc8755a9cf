#!/bin/busybox sh
# /init of the lab guest's initrd: loads every driver (IDE and virtio alike), mounts the root found by its UUID, hands over.
# /modules.list names the modules in an order in which each finds what it needs.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
while read -r module; do $bb insmod "/modules/$module" 2>/dev/null; done </modules.list
read -r words </proc/cmdline
for word in $words; do case $word in root=UUID=*) uuid=${word#root=UUID=} ;; esac; done
tries=0
until root=$($bb findfs "UUID=$uuid" 2>/dev/null); do
    tries=$((tries + 1))
    if [ $tries = 100 ]; then
        echo "LAB-GUEST no disk holds UUID $uuid" >/dev/ttyS0
        $bb cat /proc/partitions >/dev/ttyS0
        $bb poweroff -f
    fi
    $bb usleep 50000
done
$bb mount -t ext4 -o rw,noatime "$root" /new || { echo "LAB-GUEST cannot mount $root" >/dev/ttyS0; $bb poweroff -f; }
$bb mount -t devtmpfs dev /new/dev
$bb mount -t proc proc /new/proc
exec $bb switch_root /new /sbin/init "$root"
