#!/bin/busybox sh
# The lab guest's work: /sbin/init goes on as this, a real distribution has it as a systemd unit (then it is not process 1).
# Everything it tells the outside is a line of `WORD key=value …`:
#
#   HEARTBEAT boot guest up last        every few tenths of a second, from the moment the root file system is mounted
#   READY     boot guest root up last sum count missing bad torn     the ledger as found at boot, once per boot
#   ACK       boot guest n sum          record n is on stable storage: sent only after fsync returned
#   STOPPING  boot guest last           the power button was pressed
#   TROUBLE   boot guest what           something that should not happen
#
# /ledger, one line per record:  n boot up w1 … w8 sum      all decimal; see ledger.awk for the sum
# The ledger writer never waits for the network: it appends to a file in memory, and a pump of its own process feeds nc.
# READY is the console's first line of ours as well: LAB-GUEST READY …
export PATH=${APPLETS:-/bin}             # where busybox' own names are
run=/run/lab
mkdir -p $run
mkfifo $run/never
exec 9<>$run/never                       # a read from it with a deadline is a sleep that costs no process
pause() { read -t "$1" -r _nothing <&9; }
console() { echo "LAB-GUEST $*" >/dev/ttyS0; }
uptime() { read -r up _idle </proc/uptime; }
while read -r device point _rest; do [ "$point" = / ] && root_device=$device; done </proc/mounts

# --- settings: those of the disk, overridden and replaced by those of the kernel's command line (tokvm.KEY=VALUE)
guest=guest port=0 write_rate=0 ledger_s=0.2 heartbeat_s=0.1 data_disks=0 work_kib=1024
[ -e /etc/lab.conf ] && . /etc/lab.conf
read -r words </proc/cmdline
for word in $words; do
    case $word in
        tokvm.guest=*) guest=${word#*=} changed=1 ;;
        tokvm.port=*) port=${word#*=} changed=1 ;;
        tokvm.write_rate=*) write_rate=${word#*=} changed=1 ;;
        tokvm.ledger_s=*) ledger_s=${word#*=} changed=1 ;;
        tokvm.heartbeat_s=*) heartbeat_s=${word#*=} changed=1 ;;
    esac
done
read -r boot_id </proc/sys/kernel/random/boot_id
boot=${boot_id%%-*}
boot_number=$((0x$boot & 0x7fffffff))
me="boot=$boot guest=$guest"
out=$run/out
: >$out
echo 0 >$run/last

# --- the pump: lines of $out and heartbeats → nc; when the link breaks it is made again and the last lines are sent twice
# (nobody calls a machine that is being shut down alive: no heartbeat after the power button)
beat() {
    [ -e $run/stop ] && return
    uptime
    read -r last <$run/last
    echo "HEARTBEAT $me up=$up last=$last"
}
pump() {
    exec 5<$out
    beat
    tail -n 100 <&5                      # leaves the shared file offset at the end: the loop below goes on from there
    while :; do
        while read -r line <&5; do echo "$line"; done
        beat
        pause "$heartbeat_s"
    done
}
connected() {                            # process 1 gives the card its address, else the distribution does
    for card in /sys/class/net/*; do
        [ "${card##*/}" = lo ] && continue
        [ $$ != 1 ] || ifconfig "${card##*/}" 10.0.2.15 netmask 255.255.255.0 up && return
    done
    [ "$complained" ] || console "no network card"
    complained=1
    return 1
}
[ $$ != 1 ] || ifconfig lo 127.0.0.1 up
if [ "$port" != 0 ]; then
    { while :; do connected && { pump 2>/dev/null | nc 10.0.2.2 "$port" 2>/dev/null; }; pause 0.2; done; } &
fi

# --- the ledger as it was left: verified, a torn tail cut off, copies on data disks compared with it and caught up
verify() {                               # → last sum count missing bad torn good_bytes
    [ -e "$1" ] || : >"$1"
    tr '\000' '#' <"$1" | awk -f /etc/ledger.awk          # busybox awk ends a record at a zero byte
}
end_at() {                               # FILE BYTES: cut a torn tail off, or end a last line that lost only its newline
    have=$(stat -c %s "$1")
    if [ "$have" -gt "$2" ]; then truncate -s "$2" "$1"; elif [ "$have" -lt "$2" ]; then echo >>"$1"; fi
}
set -- $(verify /ledger)
last=$1 sum=$2 count=$3 missing=$4 bad=$5 torn=$6
[ "$bad" = 0 ] && end_at /ledger "$7"
copies=
i=0
while [ $i -lt "$data_disks" ]; do
    i=$((i + 1))
    mkdir -p /data$i
    disk=$(findfs LABEL=tokvm-data$i) && mount -t ext4 -o rw,noatime "$disk" /data$i || {
        echo "TROUBLE $me what=no-data-disk-$i" >>$out
        missing=$((missing + last))
        continue
    }
    copy=/data$i/ledger
    set -- $(verify $copy)
    bad=$((bad + $5)) missing=$((missing + $4)) torn=$((torn + $6))
    [ "$5" = 0 ] && end_at $copy "$7"
    # The root's ledger is written first: its copy may be one record behind after a crash, never more, never ahead.
    behind=$((last - $1))
    if [ $behind -lt 0 ]; then bad=$((bad - behind)); fi
    if [ $behind -gt 1 ]; then missing=$((missing + behind - 1)); fi
    if [ $behind -gt 0 ]; then tail -n $behind /ledger >>$copy; fi
    copies="$copies $copy"
done
echo "$last" >$run/last
uptime
ready="READY $me root=${root_device##*/} up=$up last=$last sum=$sum count=$count missing=$missing bad=$bad torn=$torn"
echo "$ready" >>$out
console "$ready"

# --- the end: any event of a device called power button, or systemd's signal
trap ': >$run/stop' TERM
watch_buttons() {
    watched=
    for input in /sys/class/input/event*; do
        [ -e "$input/device/name" ] && read -r name <"$input/device/name" || continue
        [ "$name" = "Power Button" ] || continue
        { head -c 1 "/dev/input/${input##*/}" >/dev/null && : >$run/button >$run/stop; } &
        watched=1
    done
    [ "$watched" ]
}
{ until watch_buttons; do pause 1; done; } &       # udev may come to its driver later than to us
[ "$changed" ] && {
    echo "guest=$guest port=$port write_rate=$write_rate ledger_s=$ledger_s heartbeat_s=$heartbeat_s" \
        "data_disks=$data_disks work_kib=$work_kib" >/etc/lab.conf.new && sync /etc/lab.conf.new && mv /etc/lab.conf.new /etc/lab.conf
}

# --- the background writer: write_rate bytes a second of fresh random data, round and round a file, synced each second
work() {
    blocks=$(((write_rate + 4095) / 4096)) at=0
    [ $blocks -gt $((work_kib / 4)) ] && blocks=$((work_kib / 4))
    while [ ! -e $run/stop ]; do
        [ $((at + blocks)) -gt $((work_kib / 4)) ] && at=0
        dd if=/dev/urandom of=/work bs=4096 count=$blocks seek=$at conv=notrunc,fsync 2>/dev/null
        at=$((at + blocks))
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            [ -e $run/stop ] && return
            pause 0.1
        done
    done
}
[ "$write_rate" -gt 0 ] && work &
worker=$!

# --- the ledger
seed=$boot_number
append() { echo "$record" >>"$1" && sync "$1"; }
while [ ! -e $run/stop ]; do
    n=$((last + 1))
    uptime
    centiseconds=${up%.*}${up#*.}
    set -- $n $boot_number "$centiseconds"
    for _ in 1 2 3 4 5 6 7 8; do
        seed=$(((seed * 1103515245 + 12345) & 0x7fffffff))
        set -- "$@" $seed
    done
    next=$sum
    for word in "$@"; do next=$(((next * 65599 + word) % 2147483647)); done
    record="$* $next"
    ok=1
    for ledger in /ledger $copies; do append "$ledger" || ok=; done
    if [ "$ok" ]; then
        last=$n sum=$next
        echo "ACK $me n=$n sum=$sum" >>$out
        echo "$n" >$run/last
    else
        echo "TROUBLE $me what=record-$n-not-written" >>$out
        console "record $n was not written"
        pause 5
        reboot -f
    fi
    pause "$ledger_s"
done

# --- off: nothing is acknowledged any more; what was is on the disks already
echo "STOPPING $me last=$last" >>$out
console "stopping, last=$last"
[ "$worker" ] && wait "$worker" 2>/dev/null
pause 0.3                                # the pump's turn
sync
if [ $$ != 1 ]; then
    [ ! -e $run/button ] || /bin/systemctl poweroff
    exit 0
fi
for mount in $(cut -d' ' -f2 /proc/mounts | grep '^/data'); do umount "$mount"; done
mount -o remount,ro /
poweroff -f
