"""Secrets are found wherever they may stand, and nothing else is touched."""

from __future__ import annotations

import base64
import json
import shlex
import time
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.remote.scrub import Scrubber, secrets_of_environment

CANARY = "c4nary-Xy9"
HEX = "0123456789abcdef" * 2
PLACES = {
    "xe argument": f"xe sr-create device-config:chappassword={CANARY} type=lvmoiscsi",
    "quoted argument with blanks": shlex.quote(f"device-config:cifspassword=it's {CANARY} and {CANARY}"),
    "option": f"xe -s h -u root -pw {CANARY} vm-list",
    "long option": f"tool --db-password '{CANARY} x' --verbose",
    "quoted option": f"'--password' '{CANARY} a'",
    "list of arguments": json.dumps(["mount", "--password", f"{CANARY} x", "next"]),
    "assignment": f"SSHPASS='{CANARY} x' sshpass -e ssh h",
    "sshpass": f"sshpass -p {CANARY} ssh h",
    "curl": f"curl --user 'root:{CANARY} x' https://h/",
    "url": f"https://root:{CANARY}@esx1/folder?dcPath=x",
    "query": f"GET /x?token={CANARY}",
    "net user": f"net user Administrator {CANARY} /add",
    "chpasswd": f"echo root:{CANARY} | chpasswd",
    "xe map": f"chap_user: me; chappassword: {CANARY} x; target: 10.0.0.1",
    "xe long format": f"     password ( RW): {CANARY} x",
    "json": json.dumps({"Name": "web", "Password": f'{CANARY} "x" {CANARY}'}),
    "json in json": json.dumps({"text": json.dumps({"password": f'{CANARY} "x" {CANARY}'})}),
    "json list": json.dumps({"tokens": [CANARY, CANARY]}),
    "json number": '{"api_key": 12345' + CANARY + ', "b": 1}',
    "json, cut": '{"a": 1, "password": "' + CANARY,
    "python": str({"password": CANARY}),
    "xml": f"<Password>{CANARY}</Password>",
    "xml with attributes": f'<S N="AdminPassword">{CANARY}</S>',
    "xml-rpc": f"<member><name>password</name><value><string>{CANARY}</string></value></member>",
    "secure string in xml": f'<SS N="x">{CANARY}</SS>',
    "ini": f"password = {CANARY} x",
    "vmx": f'RemoteDisplay.vnc.password = "{CANARY}"\nencryption.keySafe = "vmware:key/list/(pair/({CANARY}))"',
    "powershell": f"$password = '{CANARY} x'; Get-VM",
    "powershell list": f"Password        : {CANARY}",
    "secure string": f"ConvertTo-SecureString -String '{CANARY}' -AsPlainText -Force",
    "encoded command": base64.b64encode(f"Set-VM -Password '{CANARY}'".encode("utf-16-le")).decode(),
    "json in a script in base64": base64.b64encode(
        f"$x = '{base64.b64encode(json.dumps({'secret': CANARY}).encode()).decode()}'".encode("utf-16-le")
    ).decode(),
    "wrapped base64": base64.encodebytes(("x" * 70 + f"\npassword={CANARY}\n" + "y" * 90).encode()).decode() + "end\n",
    "basic authorization": f"Authorization: Basic {CANARY}\r\nHost: x",
    "cookie": f'Cookie: vmware_soap_session="{CANARY}"; a=b',
    "session header": f"vmware-api-session-id: {CANARY}",
    "prose": f"the password '{CANARY}' is too short; new password is {CANARY}",
    "private key": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----\n",
    "private key, cut": f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4\n\n{CANARY}\n{CANARY}",
    "key of putty": f"Private-Lines: 2\n{CANARY}\n{CANARY}\nPrivate-MAC: {CANARY}",
}
SHAPES = [
    "OpaqueRef:1f0e3dad-99ba-4ee1-8c5f-55fd56a1e2b1",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "123456-123456-123456-123456-123456-123456-123456-123456",
    "ABCDE-12345-FGHIJ-67890-KLMNO",
    "$6$rounds=5000$saltsalt$hashhashhash",
    f"{HEX}:{HEX}",
    "cst-VCT-52f4a1b2-tp-aa-bb",
    "01000000d08c9ddf0115d1118c7a00c04fc297eb0100aabb",
]
UNTOUCHED = [
    "xe vm-param-get uuid=11111111-1111-4111-8111-111111111111 param-name=other-config param-key=tokvm-owner",
    "xe vm-list is-control-domain=false params=uuid --minimal; printf '\\0%d\\0' $?",
    "set -o pipefail; xe vdi-export uuid=x format=vhd filename= | tail -c +5",
    "The uuid you supplied was invalid.\ntype: VM\nuuid: 11111111-1111-4111-8111-111111111111",
    "auto_poweron: true; tokvm-owner: ab12cd34@host; XenCenter.CustomFields.a: b",
    'invalid\0000\0{"State":2,"Passthrough":[],"Token":null,"SecureBoot":true}',
    "ssh://root@[fe80::1]:22/x http://h:80/foo@bar",
    "Permission denied (publickey,password).\nPasswordAuthentication no",
    "\udc80 bytes \x1b[31m “ü” it's",
    base64.b64encode(b"Get-VM | Select-Object Name, Id, State" * 5).decode(),
]


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_found_by_its_place(place: str) -> None:
    scrub = Scrubber()
    cleaned = scrub(f"before {PLACES[place]}")
    assert not leaks(cleaned), cleaned
    assert cleaned.startswith("before ")
    assert scrub(cleaned) == cleaned, "cleaned once is clean"


@pytest.mark.parametrize("secret", SHAPES)
def test_a_secret_is_found_by_its_shape(secret: str) -> None:
    cleaned = Scrubber()(f"an answer with {secret} in it")
    assert secret.removeprefix("OpaqueRef:") not in cleaned
    assert cleaned.startswith("an answer with ")
    assert cleaned.endswith(" in it")


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_is_no_secret_stays_byte_for_byte(text: str) -> None:
    assert Scrubber()(text) == text


def test_our_own_scripts_stay_byte_for_byte() -> None:
    powershell = pytest.importorskip("tokvm.sources.hyperv.powershell")
    scripts = sorted(path.name for path in files("tokvm.sources.hyperv.scripts").iterdir() if path.name.endswith(".ps1"))
    assert scripts
    assert Scrubber()(powershell.COMMAND) == powershell.COMMAND
    for name in scripts:
        sent = powershell.request(powershell.script_text(name.removesuffix(".ps1")), {"vm": "web"}).decode("ascii")
        assert Scrubber()(sent) == sent, name


def test_the_rest_of_an_answer_stays_what_it_was() -> None:
    answer = {"Name": "web", "Password": "a b", "Token": None, "Disks": [{"Path": "C:\\x.vhdx", "Key": 'y"'}]}
    cleaned = json.loads(Scrubber()(json.dumps(answer)))
    assert cleaned == {**answer, "Password": "REMOVED-password-1"}
    command = shlex.join(["xe", "sr-create", "device-config:password=a b", "device-config:target=t u"])
    assert shlex.split(Scrubber()(command))[2:] == ["device-config:password=REMOVED-password-1", "device-config:target=t u"]


def test_an_encoded_script_stays_one_without_its_secret() -> None:
    script = f"Set-VM -Password '{CANARY}' -Name web"
    word = Scrubber()(base64.b64encode(script.encode("utf-16-le")).decode())
    assert base64.b64decode(word).decode("utf-16-le") == "Set-VM -Password 'REMOVED-password-1' -Name web"


def test_the_same_secret_has_the_same_number() -> None:
    scrub = Scrubber()
    first, second = scrub("token=aaaaaa"), scrub("token=bbbbbb")
    assert first != second
    assert scrub("other_token=aaaaaa").partition("=")[2] == first.partition("=")[2]


@given(st.text(min_size=4, max_size=30).filter(lambda text: len(text.strip()) >= 4))
@pytest.mark.slow
def test_a_known_secret_is_removed_in_every_quoting(secret: str) -> None:
    secret = "\x02" + secret  # so that it is no part of what stands around it
    scrub = Scrubber([secret])
    for written in (secret, shlex.quote(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        assert "\x02" not in (cleaned := scrub(f"a {written} b"))
        assert "\\u0002" not in cleaned


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="\n\r\0"), min_size=1, max_size=20))
def test_an_argument_of_any_text_is_removed_whole(tail: str) -> None:
    line = shlex.join(["xe", f"device-config:password={CANARY}{tail}{CANARY}", "uuid=x"])
    cleaned = Scrubber()(line)
    assert CANARY not in cleaned
    assert cleaned.startswith("xe ")
    assert cleaned.endswith(" uuid=x")


@given(st.text(max_size=200))
def test_any_text_is_cleaned_without_an_error(text: str) -> None:
    Scrubber(["known-secret"])(text + "password" + text)


HEAVY = ["a", "'", '"', '\\"', "-", "password", "password=", "password: ", "password\n", "password:[", '"password":']
HEAVY += ['password\\":\\"', "password><![CDATA[", "-----BEGIN PRIVATE KEY-----", "QUJD" * 19 + "\n"]
HEAVY += ["://a:", "-u a:", "net user ", "eyJabcdefg."]


@pytest.mark.parametrize("unit", HEAVY)
@pytest.mark.slow
def test_no_text_makes_it_slow(unit: str) -> None:
    scrub, begun = Scrubber(), time.process_time()
    scrub(unit * ((128 << 10) // len(unit)))
    assert time.process_time() - begun < 1.0


def test_variables_with_a_secret_name_are_secret() -> None:
    environment = {"MY_PASSWORD": "abcdefg", "SSHPASS": "hijklmn", "API_KEY": "opqrstu", "HOME": "/root", "X_TOKEN": "1"}
    found = secrets_of_environment({**environment, "VAULT_TOKEN_FILE": "/run/secrets/x"})
    assert found == ["abcdefg", "hijklmn", "opqrstu"]


def leaks(text: str) -> bool:
    """Whether the canary stands there, in base64 too."""
    for _ in range(4):
        if CANARY in text:
            return True
        words = [word for word in text.replace("\n", "").replace("'", " ").split() if len(word) > 16]
        text = " ".join(_plain(word) for word in words)
    return False


def _plain(word: str) -> str:
    try:
        data = base64.b64decode(word)
    except ValueError:
        return ""
    return data.replace(b"\0", b"").decode("utf-8", "replace")
