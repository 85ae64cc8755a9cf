"""Whose host is it? The fingerprint offered by a host that was refused, and those we believe.

A fingerprint is shown as ssh shows it, `SHA256:…`, with the key's type. What a host offers is learned by a handshake of
the real ssh (so through the user's jump hosts too) into an empty known_hosts file of our own, with no way to log in; it is
for a person to compare, and nothing here ever writes it to the known_hosts file that counts.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from pathlib import Path

from tokvm.core.errors import HostKeyError, TokvmError
from tokvm.remote import process
from tokvm.remote.errors import is_changed_key
from tokvm.remote.ssh_config import HostKeys, SshConfig, option_value

# `256 SHA256:… name (ED25519)` from -l, `name ED25519 SHA256:…` from -l -F.
_FINGERPRINT = re.compile(r"(?:([A-Z0-9-]+) )?(SHA256:[A-Za-z0-9+/]{43})(?![A-Za-z0-9+/])(?:.*\(([A-Z0-9-]+)\)$)?")
_NO_LOGIN = (
    "PreferredAuthentications=none",
    "PubkeyAuthentication=no",
    "PasswordAuthentication=no",
    "KbdInteractiveAuthentication=no",
    "GSSAPIAuthentication=no",
    "HostbasedAuthentication=no",
    "HashKnownHosts=no",
    "ControlMaster=no",
    "ControlPath=none",
)
_C = {"LC_ALL": "C"}


def offered_fingerprint(config: SshConfig) -> str:
    """What the host shows now, `SHA256:… (ED25519)`, or "" when that cannot be found out."""
    with tempfile.TemporaryDirectory(prefix="tokvm-key-") as private:
        learned = Path(private) / "known_hosts"
        probe = [
            *("ssh", "-N", "-T"),
            *(part for option in _NO_LOGIN for part in ("-o", option)),
            *config.arguments(believe=HostKeys(str(learned), "accept-new")),
            *("--", config.host),
        ]
        with contextlib.suppress(process.ProgramError):  # who lets everybody in keeps the session open: a timeout
            process.run(probe, timeout_s=config.connect_timeout_s + 5, where=config.where, env=_C)
        if not learned.exists():
            return ""
        return ", ".join(_fingerprints(["-l", "-f", str(learned)], config))


def believed_fingerprints(config: SshConfig) -> list[str]:
    """Every key under which we know the host. ssh itself says under which name, in which files it looks."""
    settings = _effective(config)
    name = _known_as(config, settings)
    found: list[str] = []
    for file in _known_hosts_files(config, settings):
        if file.is_file():
            found += _fingerprints(["-l", "-F", name, "-f", str(file)], config)
    return list(dict.fromkeys(found))


def host_key_error(config: SshConfig, stderr: bytes) -> HostKeyError:
    """The refusal, with the fingerprint a person must compare."""
    offered = offered_fingerprint(config)
    shown = f"it shows {offered}" if offered else "the key it shows could not be read"
    if is_changed_key(stderr):
        name = _known_as(config, _effective(config))
        file = f" -f {shlex.quote(config.known_hosts)}" if config.known_hosts else ""
        return HostKeyError(
            f"the host key has CHANGED: {shown}, which is not the key known for it; someone may be listening in",
            where=config.where,
            fix=f"ask whoever runs the host; only if it really has a new key: ssh-keygen -R {shlex.quote(name)}{file}",
        )
    return HostKeyError(
        f"the host key is unknown: {shown}",
        where=config.where,
        fix="compare it with the host's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there), "
        f"then run again with --accept-new-host-key, or where there is no such option after `{_by_hand(config)}`",
    )


def _by_hand(config: SshConfig) -> str:
    """The command with which a person teaches ssh this host's key, into the file that counts here."""
    port = ["-p", str(config.port)] if config.port else []
    files = ["-F", config.config_file] if config.config_file else []
    files += ["-o", f"UserKnownHostsFile={option_value(config.known_hosts)}"] if config.known_hosts else []
    name = f"{config.user}@{config.host}" if config.user else config.host
    return shlex.join(["ssh", *files, *port, name])


def _known_as(config: SshConfig, settings: dict[str, str]) -> str:
    """The host's name in known_hosts: `[host]:port` unless the port is 22 or an alias rules."""
    if alias := settings.get("hostkeyalias"):
        return alias
    host = settings.get("hostname", config.host)
    port = settings.get("port", str(config.port or 22))
    return host if port == "22" else f"[{host}]:{port}"


def _effective(config: SshConfig) -> dict[str, str]:
    """The settings that ssh would use for this host (`ssh -G`), by lower-case name."""
    try:
        done = process.run(["ssh", "-G", *config.arguments(), "--", config.host], timeout_s=10, where=config.where, env=_C)
    except TokvmError:
        return {}
    return {key: value for key, _, value in (line.partition(" ") for line in done.text.splitlines())}


def _known_hosts_files(config: SshConfig, settings: dict[str, str]) -> list[Path]:
    if config.known_hosts is not None:
        return [Path(config.known_hosts)]
    listed = settings.get("userknownhostsfile", "~/.ssh/known_hosts") + " " + settings.get("globalknownhostsfile", "")
    return [Path(name).expanduser() for name in listed.split()]


def _fingerprints(arguments: list[str], config: SshConfig) -> list[str]:
    try:
        done = process.run(["ssh-keygen", *arguments], timeout_s=10, where=config.where, env=_C)
    except TokvmError:
        return []
    found: list[str] = []
    for line in done.text.splitlines():
        if match := _FINGERPRINT.search(line):
            kind = match[3] or match[1]
            found.append(f"{match[2]} ({kind})" if kind else match[2])
    return found
