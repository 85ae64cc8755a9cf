"""The part of the POSIX shell that the contract uses, read strictly; everything else is refused.

    C                                           one command
    C; echo TAG $?; C; echo TAG $?              several reads in a line
    set -C; printf %s TEXT >FILE                a new file, if there is none
    printf %s TEXT >NEW && mv -f NEW FILE       a file, at once

A word is plain letters, or quoted as shlex.quote does it. No variable, no pattern, no pipe.
"""

from __future__ import annotations

from typing import NamedTuple

from tokvm.testing.esxi.errors import NotInContract

PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")  # what shlex.quote leaves alone
STATUS = "$?"
SPECIAL = (";", "&&", ">")
CLAIM, WRITE, RUN = "claim", "write", "run"


class Word(NamedTuple):
    text: str


class Operator(NamedTuple):
    text: str


Token = Word | Operator


class Line(NamedTuple):
    """kind: RUN for `commands`, each of its words; with a tag when each is followed by `echo TAG $?`. CLAIM and WRITE: a text
    and its file, `commands` are then [[TEXT, FILE]] and [[TEXT, NEW, FILE]]."""

    kind: str
    commands: list[list[str]]
    tag: str = ""


def tokens(line: str) -> list[Token]:
    found: list[Token] = []
    at = 0
    while at < len(line):
        if line[at] == " ":
            at += 1
        elif operator := next((one for one in (*SPECIAL, STATUS) if line.startswith(one, at)), ""):
            found.append(Operator(operator))
            at += len(operator)
        else:
            at, text = _word(line, at)
            found.append(Word(text))
    return found


def _word(line: str, at: int) -> tuple[int, str]:
    """(behind it, its text)"""
    text = ""
    if line[at] == "&":
        raise NotInContract(f"nothing is left running behind: {line!r}")
    while at < len(line) and line[at] not in " ;&>":
        if line[at] in "'\"":
            end = line.find(line[at], at + 1)
            inside = line[at + 1 : end]
            if end < 0 or (line[at] == '"' and set(inside) & set('$`\\"')):
                raise NotInContract(f"quotes that are no plain text: {line[at:]!r}")
            text, at = text + inside, end + 1
        elif line[at] in PLAIN:
            text, at = text + line[at], at + 1
        else:
            raise NotInContract(f"{line[at]!r} means something to a shell: {line!r}")
    return at, text


def parse(line: str) -> Line:
    """NotInContract for what is not of one of the four forms."""
    if "\n" in line or "\0" in line:
        raise NotInContract("more than a line")
    found = tokens(line)
    operators = [one.text for one in found if isinstance(one, Operator)]
    texts = [one.text for one in found]
    if operators == [";", ">"] and texts[:5] == ["set", "-C", ";", "printf", "%s"] and texts[6] == ">" and len(texts) == 8:
        return Line(CLAIM, [[texts[5], texts[7]]])
    if operators == [">", "&&"] and texts[:2] == ["printf", "%s"] and texts[5:8] == ["&&", "mv", "-f"] and len(texts) == 10:
        if texts[4] != texts[8]:
            raise NotInContract("what is moved is not what was written")
        return Line(WRITE, [[texts[2], texts[4], texts[9]]])
    if not operators and found:
        return Line(RUN, [texts])
    return _tagged(found)


def _tagged(found: list[Token]) -> Line:
    parts: list[list[Token]] = [[]]
    for one in found:
        if one == Operator(";"):
            parts.append([])
        else:
            parts[-1].append(one)
    commands, echoes = parts[::2], parts[1::2]
    tags = {_tag_of(one) for one in echoes}
    if len(commands) != len(echoes) or len(tags) != 1 or not all(commands):
        raise NotInContract("no form of line that the contract has")
    if any(isinstance(token, Operator) for command in commands for token in command):
        raise NotInContract("an operator inside of a line of reads")
    return Line(RUN, [[token.text for token in command] for command in commands], tags.pop())


def _tag_of(part: list[Token]) -> str:
    if len(part) != 3 or part[0] != Word("echo") or part[2] != Operator(STATUS) or not isinstance(part[1], Word):
        raise NotInContract("a read in a line is followed by `echo TAG $?`")
    return part[1].text
