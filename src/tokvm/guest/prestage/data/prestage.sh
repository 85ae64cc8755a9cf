# What the initramfs files of a running Linux guest hold, and virtio put into them by the guest's own tools.
#
#     sh -s look       looks, and changes nothing
#     sh -s prepare    looks; adds the drivers to the generator's configuration; rebuilds; looks again
#
# POSIX sh (dash, bash, busybox) and the plain tools that every generator needs itself. This text comes by stdin and is always
# the same: nothing is ever put into it, so no name of anybody's is run. All of it is functions until the last line: a text that
# was cut short does nothing. What it says (report.py reads it, and nothing else):
#
#     tokvm-prestage 1
#     system S | host NAME | running VERSION | distribution ID VERSION | mac ADDRESS
#     refused no-linux | no-root | no-room | no-folder | busy | unwritable
#     generator initramfs-tools | dracut | mkinitcpio | none
#     unified PATH                                      a kernel and its initramfs in one file
#     kernel VERSION INITRAMFS BYTES FREE-KIB listed | unreadable | signed
#     module VERSION NAME inside | builtin | loadable | none
#     config PATH written | kept                        then, when it did not help: config PATH back | stuck
#     said TEXT                                         what the rebuild says
#     rebuilt EXIT-CODE                                 then kernel and module lines again
#     end

PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL
umask 022
drivers='virtio_pci virtio_blk virtio_scsi'

say() { printf '%s\n' "$*"; }

# One word, of harmless characters.
clean() {
    word=$(printf '%s' "$1" | tr -cd 'A-Za-z0-9._+~:/@=,-' | cut -c 1-200)
    printf '%s' "${word:--}"
}

has() {
    for program; do
        command -v "$program" >/dev/null 2>&1 || return 1
    done
}

# /etc/os-release is read, never sourced.
release() { clean "$(sed -n "s/^$1=//p" /etc/os-release 2>/dev/null | head -n 1)"; }

facts() {
    say "system $(clean "$(uname -s)")"
    say "host $(clean "$(uname -n)")"
    say "running $(clean "$(uname -r)")"
    say "distribution $(release ID) $(release VERSION_ID)"
    for card in /sys/class/net/*; do
        [ -e "$card/device" ] || continue
        for file in "$card/address" "$card/bonding_slave/perm_hwaddr"; do
            [ -r "$file" ] && say "mac $(clean "$(head -n 1 "$file" 2>/dev/null)")"
        done
    done
}

find_generator() {
    generator=none
    if has update-initramfs lsinitramfs && [ -d /etc/initramfs-tools ]; then
        generator=initramfs-tools file=/etc/initramfs-tools/modules
    elif has dracut lsinitrd; then
        generator=dracut file=/etc/dracut.conf.d/tokvm.conf
    elif has mkinitcpio lsinitcpio; then
        generator=mkinitcpio file=/etc/mkinitcpio.conf.d/tokvm.conf
    fi
    say "generator $generator"
}

unified() {
    for image in /boot/EFI/Linux/*.efi /efi/EFI/Linux/*.efi /boot/efi/EFI/Linux/*.efi; do
        [ -f "$image" ] && say "unified $(clean "$image")"
    done
}

# The initramfs of a kernel, under the names that distributions give it.
initrd_of() {
    for name in "initrd.img-$1" "initramfs-$1.img" "initrd-$1" "initrd-$1.img" "initramfs-$1"; do
        [ -f "/boot/$name" ] && say "/boot/$name" && return 0
    done
    package=$(clean "$(head -n 1 "/lib/modules/$1/pkgbase" 2>/dev/null)")
    [ -f "/boot/initramfs-$package.img" ] && say "/boot/initramfs-$package.img" && return 0
    for name in /boot/*/"$1"/initrd /efi/*/"$1"/initrd /boot/efi/*/"$1"/initrd; do
        [ -f "$name" ] && say "$(clean "$name")" && return 0
    done
    return 1
}

list_initrd() {
    case $generator in
        initramfs-tools) lsinitramfs "$1" ;;
        dracut) lsinitrd "$1" ;;
        mkinitcpio) lsinitcpio "$1" ;;
        *) false ;;
    esac
}

# The driver files in an initramfs, the lister's exit code, the number of lines.
drivers_in() {
    {
        list_initrd "$1" </dev/null 2>/dev/null
        say "status $?"
    } | sed -n -e '\#/virtio[_-][a-z]*\.ko#p' -e '/^status [0-9]*$/p' -e '$='
}

free_kib() {
    free=$(df -Pk "$1" 2>/dev/null | sed -n '$s/^.* \([0-9][0-9]*\)  *[0-9-]*% .*$/\1/p')
    printf '%s' "${free:-0}"
}

# Bytes as `$((…))` shows them: wc may pad.
size_of() {
    size=$(wc -c <"$1" 2>/dev/null)
    printf '%s' "$((${size:-0}))"
}

# $1 version, $2 driver. A file's name may have `-` where the module's has `_`.
module_state() {
    stem=$(printf '%s' "$2" | sed 's/_/[_-]/g')
    if printf '%s\n' "$listed" | grep -Eq "/$stem\.ko(\.[a-z0-9]+)?\$"; then
        say inside
    elif grep -Eq "/$stem\.ko\$" "/lib/modules/$1/modules.builtin" 2>/dev/null; then
        say builtin
    elif grep -Eq "^([^:]*/)?$stem\.ko(\.[a-z0-9]+)?:" "/lib/modules/$1/modules.dep" 2>/dev/null; then
        say loadable
    else
        say none
    fi
}

# Says what each kernel's initramfs has; $lacking: some initramfs has not all that its kernel could load.
kernels() {
    lacking=no
    for folder in /lib/modules/*; do
        version=${folder##*/}
        case $version in *[!A-Za-z0-9._+~-]*) continue ;; esac
        [ -f "$folder/modules.dep" ] || continue
        initrd=$(initrd_of "$version") || continue
        listed=$(drivers_in "$initrd")
        state=listed
        case $listed in
            *"
1" | 1) state=unreadable ;;
            *.ko* | *'status 0'*) ;;
            *) state=unreadable ;;
        esac
        [ -e "$initrd.sig" ] && state=signed
        say "kernel $version $initrd $(size_of "$initrd") $(free_kib "${initrd%/*}") $state"
        for driver in $drivers; do
            found=$(module_state "$version" "$driver")
            [ "$found" = loadable ] && lacking=yes
            say "module $version $driver $found"
        done
    done
}

# The configuration as it shall be.
compose() {
    case $generator in
        initramfs-tools)
            missing=
            for driver in $drivers; do
                grep -Eqs "^[[:space:]]*$driver([[:space:]]|\$)" "$file" || missing="$missing $driver"
            done
            [ ! -e "$file" ] || cat "$file" || return 1
            [ -n "$missing" ] || return 0
            [ ! -s "$file" ] || [ -z "$(tail -c 1 "$file")" ] || say
            say '# added by tokvm: the disks of KVM'
            for driver in $missing; do say "$driver"; done
            ;;
        dracut) say "add_drivers+=\" $drivers \"" ;;
        mkinitcpio) say "MODULES+=($drivers)" ;;
    esac
}

# Beside it and renamed: a full disk must not leave half a file. What was there stays as $before until it is known to be
# right; one that is found was left by a run that died, and is what the file was.
configure() {
    [ ! -e "$file" ] || file=$(readlink -f "$file") || return 1
    before=$file.tokvm-before beside=$file.tokvm-new
    if [ -e "$before" ]; then
        mv -f "$before" "$file" || return 1
        rm -f "$before"
    fi
    compose >"$work/new" || return 1
    if [ -e "$file" ] && [ "$(cat "$file")" = "$(cat "$work/new")" ]; then
        say "config $file kept"
        return 0
    fi
    if [ -e "$file" ]; then
        ln "$file" "$before" 2>/dev/null || cp -p "$file" "$before" || return 1
        cp -p "$file" "$beside" || return 1
    fi
    cat "$work/new" >"$beside" && mv -f "$beside" "$file" || return 1
    written=yes
    say "config $file written"
}

give_back() {
    rm -f "$beside"
    if [ "$written" = no ]; then
        rm -f "$before"
    elif if [ -e "$before" ]; then mv -f "$before" "$file"; else rm -f "$file"; fi; then
        say "config $file back"
    else
        say "config $file stuck"
    fi
    written=no
}

rebuild() {
    case $generator in
        initramfs-tools) update-initramfs -u -k all ;;
        dracut) dracut -f --regenerate-all ;;
        mkinitcpio) mkinitcpio -P ;;
    esac
}

# Reads on when nobody listens any more: a rebuild must not end because a connection did.
tell() {
    trap : PIPE
    while IFS= read -r line || [ -n "$line" ]; do
        printf 'said %.1000s\n' "$line" 2>/dev/null
    done
}

# One run at a time, for an earlier one goes on without its connection. /run is empty again after a restart.
enter() {
    work=/run/tokvm-prestage
    if ! mkdir "$work" 2>/dev/null && kill -0 "$(cat "$work/pid" 2>/dev/null)" 2>/dev/null; then
        say 'refused busy'
        return 1
    fi
    echo "$$" 2>/dev/null >"$work/pid" || { say 'refused no-room'; return 1; }
}

leave() {
    rm -f "$work/new" "$work/code" "$work/pid"
    rmdir "$work"
}

prepare() {
    [ -d "${file%/*}" ] || { say 'refused no-folder'; return; }
    enter || return
    written=no before=$file.tokvm-before beside=$file.tokvm-new
    # Once begun it goes to its end, whatever becomes of the connection: half a change is the worst of all.
    trap '' HUP
    trap : PIPE
    trap 'give_back; leave; exit 143' INT TERM
    if ! configure; then
        give_back
        say 'refused unwritable'
        leave
        return
    fi
    {
        rebuild </dev/null 2>&1
        echo "$?" >"$work/code"
    } | tell
    code=$(cat "$work/code" 2>/dev/null)
    say "rebuilt ${code:-255}"
    kernels
    if [ "${code:-255}" = 0 ] && [ "$lacking" = no ]; then
        rm -f "$before"
    else
        give_back
    fi
    leave
    sync
}

main() {
    say 'tokvm-prestage 1'
    facts
    if [ "$(uname -s)" != Linux ]; then
        say 'refused no-linux'
    elif [ "$(id -u)" != 0 ]; then
        say 'refused no-root'
    else
        find_generator
        unified
        kernels
        [ "$1" != prepare ] || [ "$generator" = none ] || prepare
    fi
    say end
}

{ main "$1" </dev/null; exit 0; }
