"""What went wrong between us and an SMB server, in our words; by status, never by text.

login refused            SourceError         a person must mend it
a file or a share        HyperVError         with the same kinds of fault as a script's failure (faults.py)
anything else            ConnectionLost      the connection is of no use any more
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from smbprotocol import exceptions as smb

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.sources.hyperv.faults import Fault, HyperVError

# What the library's thread raises for bytes that are no SMB comes out of the next call, whatever it is.
ANY = (
    smb.SMBException,
    InvalidTag,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    RecursionError,
)

# The server's answer about one file or share: the connection is as good as before.
REFUSED = (
    smb.AccessDenied,
    smb.BadNetworkName,
    smb.DeletePending,
    smb.FileIsADirectory,
    smb.ObjectNameInvalid,
    smb.ObjectNameNotFound,
    smb.ObjectPathInvalid,
    smb.ObjectPathNotFound,
    smb.ObjectPathSyntaxBad,
    smb.PathNotCovered,
    smb.SharingViolation,
    smb.StoppedOnSymlink,
)
_GONE = "a merge may have moved the disks; run the same command again"
_LOOK = "look at the path on the host; no alternate streams, links or DFS names are followed"
_WORDS: dict[type[BaseException], tuple[Fault, str, str]] = {
    smb.AccessDenied: (
        Fault.ACCESS_DENIED,
        "the user may not read it",
        "log in as a member of the host's Administrators; on a file server, as one with read access to the share and the files",
    ),
    smb.BadNetworkName: (
        Fault.NO_SUCH_FILE,
        "the server has no such share",
        "is the administrative share of the drive switched off (AutoShareServer)? is the SMB server (LanmanServer) running?",
    ),
    smb.DeletePending: (Fault.NO_SUCH_FILE, "it is being deleted", _GONE),
    smb.ObjectNameNotFound: (Fault.NO_SUCH_FILE, "it is not there", _GONE),
    smb.ObjectPathNotFound: (Fault.NO_SUCH_FILE, "its folder is not there", _GONE),
    smb.SharingViolation: (
        Fault.IN_USE,
        "another program has it open for writing, or for itself alone",
        "a merge, a backup or another copy has it; wait until it is over, then run the same command again",
    ),
    smb.PathNotCovered: (
        Fault.UNKNOWN,
        "its name belongs to a DFS namespace",
        "name the VM's storage by the server that has it",
    ),
}


def refused(exc: smb.SMBResponseException, *, doing: str, where: str) -> SourceError:
    """One of REFUSED."""
    fault, what, fix = _WORDS.get(type(exc), (Fault.UNKNOWN, "it is no file that can be opened", _LOOK))
    return HyperVError(f"{doing} over SMB failed: {what} ({_said(exc)})", where=where, fix=fix, fault=fault)


def explained(exc: BaseException, *, doing: str, where: str) -> SourceError:
    """Any of ANY."""
    if doing == "logging in" and isinstance(exc, smb.SMBResponseException | smb.SMBAuthenticationError):
        return SourceError(
            f"the SMB server refused the login ({_said(exc)})",
            where=where,
            fix="check the user (DOMAIN%5Cname for a domain's) and the password; a file server has no local users of the host",
        )
    if doing == "logging in" and "guest" in str(exc):  # a text of the library's, no server's
        return SourceError(
            "the SMB server let us in as a guest only, so nothing it says can be believed",
            where=where,
            fix="check the user and the password; guest access (map to guest) must be off for them to be refused",
        )
    return ConnectionLost(
        f"the SMB connection failed while {doing}: {_said(exc)}",
        where=where,
        fix="run the same command again once the host answers on its SMB port (445)",
    )


def too_old(where: str) -> SourceError:
    return SourceError("the server speaks no SMB 3", where=where, fix="Windows Server 2012 and later do; switch SMB 3 on")


def unencrypted(where: str) -> SourceError:
    return SourceError(
        "the server offers no SMB encryption, and disks are not read in clear",
        where=where,
        fix="switch it on: a Windows server offers it by default (Get-SmbServerConfiguration), Samba with `server smb encrypt`",
    )


def _said(exc: BaseException) -> str:
    status = getattr(exc, "status", None)
    if isinstance(exc, smb.SMBResponseException) and isinstance(status, int):
        return f"status {status:#010x}"
    return readable(" ".join(str(exc).split()) or type(exc).__name__, limit=200)
