#!/bin/sh
# private_libvirtd.sh FOLDER LIBVIRTD, in a mount namespace of its own: libvirtd finds our files where the system's would be.
set -e
for name in etc:/etc/libvirt lib:/var/lib/libvirt cache:/var/cache/libvirt log:/var/log/libvirt run:/run/libvirt; do
    mkdir -p "${name#*:}"
    mount --bind "$1/${name%%:*}" "${name#*:}"
done
exec "$2" --daemon --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid
