"""Text without its secrets, for transcripts that leave the house.

    text ─► known secrets ─► private keys ─► base64 that holds any ─► commands and tokens by their shape
         ─► what is called password, token, …: `name=value`, `"name": "value"`, `<name>value<`, `--name value` ─► text

Each secret becomes a word, `REMOVED-<kind>-<number>`; the same secret has the same number all through one scrubber. What stays
is the text as it was, quotes and all, so that an answer can still be parsed. Where it is not clear where a secret ends, more
is removed rather than less. A secret of a shape that nobody knows, in a place that no name gives away, is not found: whoever
sends a transcript to somebody reads it first.

Text comes from outside: every pattern is possessive or bounded, so that no text makes it slow, and is tried only where a word
that it needs is there at all.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import json
import re
import secrets
import shlex
import threading
import urllib.parse
from bisect import bisect_right
from collections.abc import Iterable, Mapping

_DEEPEST = 3  # a JSON in base64 in a script in base64
_MOST_NUMBERS = 1 << 16
_SHORTEST_OF_ENVIRONMENT = 6  # `X_TOKEN=1` would remove every 1
_ENVIRONMENT = re.compile(r"PASS(?:WORD|WD|PHRASE|CODE|$)|SECRET|TOKEN|(?:API|ACCESS|PRIVATE)_?KEY|CREDENTIAL", re.IGNORECASE)

_QUOTED = r"(?:'[^'\n\0]*+'|\"(?:[^\"\\\n\0]|\\.)*+\")"
_WORD = rf"(?:{_QUOTED}|[^\s\0])++"
_LINE = r"[^\r\n\0]++"
_REMOVED = re.compile(r"['\"]?REMOVED-[a-z]+-\d+['\"]?")

_NAME = re.compile(
    r"(?:passwor[dt]|passwd|passphrase|passcode|kennwort|secret|token|credential|cookie|authori[sz]ation|keysafe|ticket|pwd"
    r"|(?:api|access|private|auth|encryption|recovery|session|licen[cs]e|product|vnc)[_. -]?key|session[_. -]?(?:id|ref|uuid)"
    r"|sshpass|(?<![a-z0-9])(?:pass|pw)(?![a-z0-9]))[\w.-]{0,32}+",
    re.IGNORECASE,
)
"""What a secret is called. Any letters before it (`root-password`) do not matter."""


def _compiled(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern, re.IGNORECASE | re.DOTALL) for pattern in patterns)


# What may follow the name; the secret is the group `v`. The first that fits counts.
_KEY = r"\\?[\"']\s{0,40}+(?::|=>?)\s{0,40}+"
_STRUCTURED = _compiled(
    # JSON, JSON inside of a JSON string, what Python and Perl print
    rf"{_KEY}\"(?P<v>(?:[^\"\\]|\\.)*+)\"",
    rf"{_KEY}'(?P<v>(?:[^'\\\n]|\\.)*+)'",
    rf"{_KEY}\\\"(?P<v>(?:[^\"\\]|\\\\(?:\\.|[^\\]))*+)\\\"",
    rf"{_KEY}(?P<v>\[[^\]]{{0,4096}}+\]|\{{[^{{}}]{{0,4096}}+\}}|(?:null|true|false)\b)",
    rf"{_KEY}(?P<v>[^\s\"'\\\[{{,}}\]][^\s,}}\]]*+)",
    rf"{_KEY}(?P<v>{_LINE})",
    # XML: elements, members of XML-RPC
    r"(?:[\"'\s][^<>]{0,200}+)?>(?P<v><!\[CDATA\[.{0,1024}?\]\]>|[^<]++)(?=<|\Z)",
    r"</name>\s{0,40}+<value>\s{0,40}+(?:<\w{1,20}+>)?(?P<v>[^<]++)",
    rf"[ \t]*+[=:][ \t]*+(?P<v>{_QUOTED}++)(?![^\s\0;,)}}\]&|>])",
)
_SIGN = re.compile(r"[ \t]*+[=:](?!//)[ \t]*+(?=[^\s\0])")
_PLAIN = _compiled(
    rf"=(?P<v>{_WORD})",
    rf"[ \t]*+=[ \t]*+(?P<v>{_LINE})",
    # xe's maps, `password: x; target: y`; its long format, `password ( RW): x`; headers
    r"(?:[ \t]++\([ A-Z]{2,5}\))?[ \t]*+:(?!//)[ \t]*+(?P<v>[^\s\0][^\r\n\0]*?)(?=; [\w.:-]{1,64}+: |[\r\n\0]|\Z)",
    rf"[\"']?\s++(?:is\s+|was\s+|of\s+)?(?P<v>{_QUOTED})(?!\w)",
)
_OPTION = re.compile(r"(?<![\w.-])--?[\w-]{0,32}\Z")
_AFTER_OPTION = _compiled(
    rf"[\"']?(?:\s*+,\s*+|\s++)(?P<v>{_QUOTED}(?=[\s,;)\]}}]|\Z)|(?![|;&<>=:]){_WORD})",
)
_PROSE = re.compile(r"\s+(?:is|was)\s+(?P<v>[^\s\0]++)")
_PIECE = re.compile(
    r"(?<!\w)'(?:[^'\n\0]|'\"'\"')*+(?:(?P<closed>')|)|\"(?:[^\"\\\n\0]|\\.)*+(?:(?P<closed_too>\")|)", re.DOTALL
)
"""A quoted piece of a command line, with the quotes that `shlex.quote` puts into one. No group has matched: never closed."""

_BASE64 = re.compile(
    r"(?:[A-Za-z0-9+/]{48,96}+\r?\n)++(?:[A-Za-z0-9+/]{1,96}+={0,2}(?=[\r\n\"'<]|\Z))?|[A-Za-z0-9+/_-]{24,}+={0,2}"
)
_LOGIN = r"(?P<v>'[^'\s:]*+:[^'\n]*+'|\"[^\"\s:]*+:[^\"\n]*+\"|[^\s:'\"]++:\S++)"

# (kind, a word in lower case without which it cannot fit, pattern)
_KEYS = [
    (
        "key",
        "private key",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?P<v>.*?)(?:-----END [A-Z0-9 ]{0,40}-----|\Z)",
    ),
    ("key", "private-lines", r"Private-Lines:(?P<v>.*?(?:Private-MAC:[^\r\n]*+|\Z))"),  # PuTTY
    ("key", "b3blbnnzac1rzxktdje", r"(?P<v>b3BlbnNzaC1rZXktdjE[A-Za-z0-9+/=\s]*+)"),  # `openssh-key-v1` without its first line
]
_SHAPES = [
    ("password", "securestring", rf"(?i:ConvertTo-SecureString)\s++(?i:-String\s++)?(?P<v>{_WORD})"),
    ("password", "<ss", r"<SS(?:\s[^<>]{0,200}+)?>(?P<v>[^<]++)"),  # a secure string in PowerShell's XML
    ("password", "sshpass", rf"\bsshpass\s++-p\s*+(?P<v>{_WORD})"),
    ("password", "net", rf"\b(?i:net\s{{1,9}}+user)\s{{1,9}}+[^\s/]++\s++(?P<v>{_WORD})"),
    ("password", "-u", rf"(?<![\w-])(?:-u|--user|--proxy-user)(?:[ =]|(?=['\"])){_LOGIN}"),
    (
        "password",
        "chpasswd",
        r"(?<![^\s'\"])(?P<v>[^\s:'\"|]{1,64}+:[^\s'\"|]{1,256}+)['\"]?\s{0,8}+\|\s{0,8}+(?:sudo\s{1,4}+)?chpasswd",
    ),
    ("password", "://", r"(?<=://)[^\s/:@\"'<>\[]{0,64}+:(?!\d{1,5}(?:[/\s]|\Z))(?P<v>[^\s\"'<>]{1,256})@"),
    ("session", "opaqueref:", r"OpaqueRef:(?!NULL|REMOVED)(?P<v>[A-Za-z0-9-]{8,}+)"),
    ("session", "cst-vct-", r"(?P<v>\bcst-VCT-[\w.:-]{8,}+)"),
    ("token", "bearer", r"(?i:\bbearer)\s++(?P<v>[\w.~+/=-]{8,}+)"),
    ("token", "eyj", r"(?P<v>\beyJ[\w-]{8,}+(?:\.[\w-]*+){1,4}+)"),
    ("token", "gh", r"(?P<v>\bgh[opsur]_[A-Za-z0-9]{20,}+)"),
    ("token", "github_pat_", r"(?P<v>\bgithub_pat_\w{20,}+)"),
    ("token", "glpat-", r"(?P<v>\bglpat-[\w-]{16,}+)"),
    ("token", "xox", r"(?P<v>\bxox[abeoprs]-[\w-]{10,}+)"),
    ("token", "akia", r"(?P<v>\bAKIA[0-9A-Z]{16}\b)"),
    ("token", "asia", r"(?P<v>\bASIA[0-9A-Z]{16}\b)"),
    ("token", "aiza", r"(?P<v>\bAIza[\w-]{35})"),
    ("token", "hvs.", r"(?P<v>\bhvs\.[\w-]{20,}+)"),
    ("token", "sk-", r"(?P<v>\bsk-[\w-]{20,}+)"),
    ("key", "age-secret-key-1", r"(?P<v>\bAGE-SECRET-KEY-1[0-9A-Z]{20,}+)"),
    ("key", "-", r"(?P<v>\b(?:\d{6}-){7}\d{6}\b)"),  # BitLocker's recovery password
    ("key", "-", r"(?P<v>\b(?:[0-9A-Z]{5}-){4}[0-9A-Z]{5}\b)"),  # licence keys of Windows and vSphere
    ("hash", "$", r"(?P<v>\$(?:1|2[abxy]?|5|6|7|y|gy|argon2[a-z]{1,2}|scrypt)\$[^\s:\"'\\,;]{8,}+)"),
    ("hash", ":", r"(?P<v>\b[0-9a-fA-F]{32}:[0-9a-fA-F]{32}\b)"),  # LM:NTLM
    (
        "hash",
        "01000000d08c9ddf",
        r"(?P<v>\b01000000[dD]08[cC]9[dD]{2}[fF]0115[dD]1118[cC]7[aA]00[cC]04[fF][cC]297[eE][bB][0-9a-fA-F]*+)",
    ),
]

_BYTES = {"utf-16-le": "surrogatepass", "utf-8": "surrogateescape"}
"""How a text is found in base64, with what is no text in it kept."""

Rule = tuple[str, str, re.Pattern[str]]


def _rules(rows: Iterable[tuple[str, str, str]]) -> list[Rule]:
    return [(kind, needed, re.compile(pattern, re.DOTALL)) for kind, needed, pattern in rows]


_KEY_RULES, _SHAPE_RULES = _rules(_KEYS), _rules(_SHAPES)


class Scrubber:
    """Removes secrets from texts. Thread-safe."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        """known: secrets that are removed wherever they stand, in any of the usual quotings."""
        self._lock = threading.Lock()
        self._pepper = secrets.token_bytes(16)
        self._numbers: dict[bytes, int] = {}
        self._exact: set[str] = set()
        self._known: re.Pattern[str] | None = None
        self.hide(*known)

    def hide(self, *known: str) -> None:
        """More secrets to be removed wherever they stand, from now on."""
        with self._lock:
            self._exact.update(form for secret in known if secret.strip() for form in _forms(secret))
            if self._exact:
                longest_first = sorted(self._exact, key=len, reverse=True)
                self._known = re.compile("(?P<v>" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, text: str) -> str:
        """`text` without its secrets."""
        return self._scrub(text, 0)

    @staticmethod
    def decoded(text: str) -> list[str]:
        """The texts that stand in it as base64, for people, who have to read what they send to others."""
        blobs = (match[0] for match in _BASE64.finditer(text))
        return [plain for blob in blobs for _, plain in _decoded(blob) if _is_readable(plain)]

    def _scrub(self, text: str, depth: int) -> str:
        if self._known is not None:
            text = self._known.sub(lambda match: self._name("known", match[0]), text)
        text = self._by_rules(text, _KEY_RULES)
        if depth < _DEEPEST:
            text = _BASE64.sub(lambda match: self._encoded(match[0], depth), text)
        return self._named(self._by_rules(text, _SHAPE_RULES))

    def _by_rules(self, text: str, rules: Iterable[Rule]) -> str:
        lower = text.lower()
        for kind, needed, pattern in rules:
            if needed in lower:
                found = ((*match.span("v"), kind) for match in pattern.finditer(text))
                text = self._without(text, found)
        return text

    def _named(self, text: str) -> str:
        """What has a secret's name. Behind a value the search goes on, so that no value is taken for a name."""
        names, pieces = _NAME.search(text), None
        found = []
        while names is not None:
            if pieces is None:
                pieces = [match.span() for match in _PIECE.finditer(text) if match.lastgroup]
            span = _value_of(text, names, pieces)
            if span is not None:
                found.append((*span, "password"))
            names = _NAME.search(text, names.end() if span is None else max(span[1], names.end()))
        return self._without(text, found)

    def _without(self, text: str, spans: Iterable[tuple[int, int, str]]) -> str:
        """The text with a word for each span; the quotes around a secret stay."""
        kept, at = [], 0
        for start, end, kind in spans:
            secret = text[start:end]
            if _REMOVED.fullmatch(secret) or not secret.strip("'\""):
                continue
            quote = secret[0] if len(secret) > 1 and secret[0] in "'\"" and secret[-1] == secret[0] else ""
            word = self._name(kind, secret[1:-1] if quote else secret)
            kept += [text[at:start], quote, word, quote]
            at = end
        return "".join([*kept, text[at:]]) if kept else text

    def _encoded(self, text: str, depth: int) -> str:
        """base64 of a text that holds a secret becomes base64 of the text without it."""
        for encoding, plain in _decoded(text):
            cleaned = self._scrub(plain, depth + 1)
            if cleaned != plain:
                encoded = base64.b64encode(cleaned.encode(encoding, _BYTES[encoding])).decode("ascii")
                return encoded + text[len(text.rstrip()) :]
        return text

    def _name(self, kind: str, secret: str) -> str:
        digest = hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), key=self._pepper, digest_size=16).digest()
        with self._lock:
            if digest not in self._numbers and len(self._numbers) >= _MOST_NUMBERS:
                return f"REMOVED-{kind}-0"
            return f"REMOVED-{kind}-{self._numbers.setdefault(digest, len(self._numbers) + 1)}"


def _value_of(text: str, name: re.Match[str], pieces: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Where the secret of this name stands."""
    end = name.end()
    for pattern in _STRUCTURED:
        if found := pattern.match(text, end):
            literal = found["v"] in ("null", "true", "false")
            return None if literal else found.span("v")
    closing = _end_of_piece(pieces, name.start())
    if closing is not None and (sign := _SIGN.match(text, end, closing)):
        return sign.end(), closing
    for pattern in _PLAIN:
        if found := pattern.match(text, end):
            return found.span("v")
    if _OPTION.search(text, max(0, name.start() - 40), name.start()):
        for pattern in _AFTER_OPTION:
            if found := pattern.match(text, end):
                return found.span("v")
    if name[0][:4].lower() in ("pass", "kenn") and (found := _PROSE.match(text, end)):
        return found.span("v")
    return None


def _end_of_piece(pieces: list[tuple[int, int]], at: int) -> int | None:
    """Where the closing quote is, inside of quotes: the value of `'name=value'` may hold blanks."""
    number = bisect_right(pieces, (at, at)) - 1
    if number >= 0 and pieces[number][0] < at < pieces[number][1]:
        return pieces[number][1] - 1
    return None


def secrets_of_environment(environment: Mapping[str, str]) -> list[str]:
    """Values of variables whose name says that they are secret."""
    return [
        value
        for name, value in environment.items()
        if _ENVIRONMENT.search(name)
        and not name.upper().endswith(("_FILE", "_PATH", "_DIR"))
        and len(value) >= _SHORTEST_OF_ENVIRONMENT
    ]


def _forms(secret: str) -> set[str]:
    """A secret as it may be written: as it is, quoted for a shell, for JSON, XML, a URL; a key's lines one by one."""
    lines = {line.strip() for line in secret.splitlines() if len(line.strip()) >= 16}
    written = {secret, secret.strip()} | lines
    for plain in tuple(written):
        written |= {
            shlex.quote(plain).removeprefix("'").removesuffix("'"),
            plain.replace("'", "''"),  # PowerShell, SQL
            json.dumps(plain)[1:-1],
            json.dumps(plain, ensure_ascii=False)[1:-1],
            html.escape(plain),
            urllib.parse.quote(plain, safe="", errors="surrogatepass"),
            urllib.parse.quote_plus(plain, errors="surrogatepass"),
        }
    return {form for form in written if form}


def _is_readable(plain: str) -> bool:
    """A uuid is base64 too, of something."""
    return sum(c.isascii() and (c.isprintable() or c.isspace()) for c in plain) > 0.9 * len(plain)


def _decoded(text: str) -> Iterable[tuple[str, str]]:
    """What base64 holds, if it is text: as UTF-16 (PowerShell's -EncodedCommand), as UTF-8."""
    joined = re.sub(r"\s", "", text).rstrip("=")
    joined = joined[: len(joined) - (len(joined) % 4 == 1)]
    try:
        data = base64.b64decode(joined.replace("-", "+").replace("_", "/") + "=" * (-len(joined) % 4), validate=True)
    except (binascii.Error, ValueError):
        return
    for encoding, keep in _BYTES.items():
        try:
            plain = data[: len(data) & ~1].decode(encoding, keep) if encoding == "utf-16-le" else data.decode(encoding, keep)
        except UnicodeDecodeError:
            continue
        if sum(not (c.isprintable() or c.isspace()) for c in plain[:200]) <= 2:
            yield encoding, plain
