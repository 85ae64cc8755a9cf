# Set-up shared by ./tokvm-lab and ./run-tests (sourced, bash): Debian 12 or Ubuntu 24.04 → packages, .venv, .venv/bin/tokvm.
# Idempotent; a second run with nothing changed costs some milliseconds. `setup_lab` is enough to run; `setup_dev` adds the tests' tools.

setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What tokvm and its lab need from the distribution, and what only the tests need on top.
lab_packages=(
    python3 python3-venv python3-libvirt python3-libnbd openssh-client openssh-server openssh-sftp-server
    qemu-system-x86 qemu-utils seabios libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients
    busybox-static grub-pc-bin grub-common e2fsprogs fdisk cpio kmod xz-utils zstd util-linux libxml2-utils
    python3-guestfs virt-v2v mmdebstrap uidmap ovmf ntfs-3g
)
dev_packages=(git strace libvhdi-utils python3-libvhdi nbdkit samba openssl libwin-hivex-perl python3-hivex osslsigncode
    xfsprogs btrfs-progs)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Ask for the password once, in sight, before anything's output goes to a log.
need_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo >/dev/null || die "this needs root: run it as root, or install these yourself: $*"
    if [ -t 0 ]; then sudo -v; else sudo -n true; fi || die "this needs root, and sudo said no; install these yourself: $*"
}

need_packages() {
    local missing=() package there
    there=" $(dpkg-query -W -f='${db:Status-Status}:${Package} ' "$@" 2>/dev/null || true)"
    for package in "$@"; do
        [[ $there == *" installed:$package "* ]] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "this is no Debian or Ubuntu; install these yourself: ${missing[*]}"
    need_root "${missing[*]}"
    say "installing ${missing[*]} (on a host with systemd, sshd, libvirtd and smbd start when they are installed)"
    local log try
    log=$(mktemp)
    for try in 1 2 3; do
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update >"$log" 2>&1 || true
        if as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
            -o Dpkg::Options::=--force-confold -o DPkg::Lock::Timeout=300 "${missing[@]}" >>"$log" 2>&1; then
            rm -f "$log"
            return
        fi
        say "apt-get failed (try $try of 3)"
        sleep $((try * 5))
    done
    tail -n 25 "$log" >&2
    rm -f "$log"
    die "apt-get could not install: ${missing[*]}"
}

# Made here (not moved), from today's /usr/bin/python3, seeing the distribution's bindings, with a pip that works.
venv_is_ours() {
    local version
    version=$(/usr/bin/python3 -c 'import platform; print(platform.python_version())')
    [ -x "$1/bin/python" ] && grep -qx "version = $version" "$1/pyvenv.cfg" &&
        grep -qx 'include-system-site-packages = true' "$1/pyvenv.cfg" &&
        [ "$(head -n 1 "$1/bin/pip" 2>/dev/null)" = "#!$1/bin/python3" ] && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

# need_venv STAMP-NAME REQUIREMENTS-FILE...: .venv from the distribution's Python (its bindings import), pinned and hashed.
need_venv() {
    local name=$1 venv=$setup_root/.venv stamp want
    shift
    stamp=$venv/.stamp-$name
    want=$( (cd "$setup_root" && cat "$@" pyproject.toml scripts/setup.sh && /usr/bin/python3 --version && echo "$setup_root") | sha256sum | cut -d' ' -f1)
    [ -x "$venv/bin/tokvm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    say "making .venv ($name)"
    venv_is_ours "$venv" || /usr/bin/python3 -m venv --clear --system-site-packages "$venv" || die "cannot make $venv"
    local files=() file
    for file in "$@"; do files+=(-r "$setup_root/$file"); done
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes "${files[@]}" || die "pip could not install $*"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --no-index -e "$setup_root" \
        || die "pip could not install tokvm itself"
    printf '%s\n' "$want" >"$stamp"
}

# libguestfs makes its appliance from the host's kernel; a container has none, and then the lab's is used (lab/kernel.py).
need_modules_folder() { [ -d /lib/modules ] || as_root mkdir -p /lib/modules; }

setup_lab() {
    need_packages "${lab_packages[@]}"
    need_modules_folder
    need_venv lab requirements/runtime.txt
}

setup_dev() {
    need_packages "${lab_packages[@]}" "${dev_packages[@]}"
    need_modules_folder
    need_venv lab requirements/runtime.txt
    need_venv dev requirements/runtime.txt requirements/dev.txt
}
