r"""What goes over the wire: the one command line, requests on stdin, their answers on stdout; and how a shell refuses the rest.

Get-VHD 'C:\x.vhdx'     cmd.exe:      'Get-VHD' is not recognized as an internal or external command, …
                        PowerShell:   Get-VHD : The term 'Get-VHD' is not recognized as the name of a cmdlet, …
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import BinaryIO

import tokvm
from tokvm.testing.hyperv.errors import OPERATION_FAILED, HostError, NotInContract
from tokvm.testing.hyperv.state import Options

PREFIX = "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -InputFormat None -EncodedCommand "
SUBSYSTEM = "sftp-server.exe"
LONGEST_LINE = 8191  # of cmd.exe
WHOLE = b"@@X"
LINES = 4  # of a request: tag, script, data, WHOLE
TAG_LENGTH = 16
BANNER = "Willkommen auf dem Server für Prüfzwecke – Zugriff nur für Berechtigte. Größe: 5 µ\r\n@@B ist hier kein Anfang\r\n"
FAREWELL = "Die Sitzung wird geschlossen. Auf Wiedersehen, schönen Tag noch\r\n@@E oder so\r\n"
NOISE = (
    '#< CLIXML\r\n<Objs Version="1.1.0.1" xmlns="http://schemas.microsoft.com/powershell/2004/04"><Obj S="progress" RefId="0">'
    '<TN RefId="0"><T>System.Management.Automation.PSCustomObject</T></TN><MS><I64 N="SourceId">1</I64><PR N="Record"><AV>'
    "Module werden für die erstmalige Verwendung vorbereitet.</AV><AI>0</AI></PR></MS></Obj></Objs>\r\n"
)
CRASH = (
    '#< CLIXML\r\n<Objs Version="1.1.0.1" xmlns="http://schemas.microsoft.com/powershell/2004/04"><S S="Error">'
    "Nicht genügend Arbeitsspeicher, um die Ausführung des Programms fortzusetzen._x000D__x000A_</S></Objs>\r\n"
)


def check_command(line: str, bootstrap: str) -> None:
    """NotInContract unless it is the one command line, to the letter."""
    if not line.startswith(PREFIX):
        raise NotInContract("no row of the contract has this command line")
    if len(line) > LONGEST_LINE:
        raise NotInContract(f"cmd.exe takes {LONGEST_LINE} characters, not {len(line)}")
    try:
        text = base64.b64decode(line.removeprefix(PREFIX), validate=True).decode("utf-16-le")
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise NotInContract(f"the encoded command is not base64 of UTF-16LE: {exc}") from exc
    if text != bootstrap:
        raise NotInContract(f"the bootstrap is another one: {text[:200]!r}")


def read_request(stdin: BinaryIO) -> bytes:
    """The lines of the next request, as many as come; nothing at the end."""
    return b"".join(stdin.readline() for _ in range(LINES))


def tag_of(raw: bytes) -> str:
    """What the answer bears, whatever else is wrong with the request."""
    return raw.split(b"\n")[0].decode("ascii", "replace")


def parse_request(raw: bytes) -> tuple[str, str, object]:
    """(script's name, data as text, data). HostError when the request was cut short, NotInContract for anything else."""
    lines = raw.split(b"\n")
    if len(lines) != LINES + 1 or lines[LINES - 1] != WHOLE:
        text = "TokvmCutShort"
        raise HostError("System.Management.Automation.RuntimeException", OPERATION_FAILED, text, text)
    if len(lines[0]) != TAG_LENGTH or not set(lines[0]) <= set(b"0123456789abcdef"):
        raise NotInContract(f"the request bears no tag: {lines[0][:100]!r}")
    try:
        script, data = (base64.b64decode(line, validate=True) for line in lines[1:3])
        text = data.decode("ascii")
        parsed: object = json.loads(text)
    except ValueError as exc:
        raise NotInContract(f"the request is not base64 of a script and of ASCII JSON: {exc}") from exc
    return _name_of(script), text, parsed


def _name_of(script: bytes) -> str:
    """By the hash of its text, among the scripts that tokvm ships."""
    import hashlib

    wanted = hashlib.sha256(script).digest()
    for path in sorted((Path(tokvm.__file__).parent / "sources" / "hyperv" / "scripts").glob("*.ps1")):
        if hashlib.sha256(path.read_bytes()).digest() == wanted:
            return path.stem
    raise NotInContract(f"no script of the contract: {script[:300]!r}")


def framed(answer: dict[str, object], options: Options) -> bytes:
    """What PowerShell prints. Half a surrogate pair, which no UTF-8 has, becomes U+FFFD, as .NET writes it."""
    said = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    text = base64.b64encode(said.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()).decode()
    width = options["wrap"] or len(text)
    lines = "\r\n".join(text[at : at + width] for at in range(0, len(text), width))
    answered = f"\r\n@@B\r\n{lines}\r\n@@E\r\n".encode("ascii")
    if not options["banner"]:
        return answered
    return encoded(BANNER, options) + answered + encoded(FAREWELL, options)


def encoded(text: str, options: Options) -> bytes:
    """In the console's code page, as Windows does it: what it does not have becomes `?`."""
    return text.encode(options["code_page"], "replace")


def refusal(line: str, options: Options) -> bytes:
    """A command that the default shell does not know, on stderr."""
    word = (line.split() or [""])[0]
    if options["default_shell"] == "cmd":
        said = f"'{word}' is not recognized as an internal or external command,\r\noperable program or batch file.\r\n"
    else:
        said = (
            f"{word} : The term '{word}' is not recognized as the name of a cmdlet, function, script file, or operable "
            "program.\r\n"
            "Check the spelling of the name, or if a path was included, verify that the path is correct and try again.\r\n"
            f"    + CategoryInfo          : ObjectNotFound: ({word}:String) [], CommandNotFoundException\r\n"
            "    + FullyQualifiedErrorId : CommandNotFoundException\r\n"
        )
    return said.encode(options["code_page"], "replace")
