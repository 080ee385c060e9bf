"""What a server's address, key and surroundings may be, and what is said where no request can be made with them."""

import datetime
import ipaddress
import json
import ssl
import sys
import threading
from base64 import b64encode
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_openai_engine import GREEDY, Server, answers, ask, refusal, reply, server  # noqa: F401 - server is a fixture
from test_server_faults import command, place, rows_of  # noqa: F401 - place is a fixture

from distiller.arguments import StageArguments
from distiller.cli import resume_command
from distiller.engine import EngineDead, EngineNotStarted
from distiller.openai_engine import OpenAIEngine
from distiller.openai_faults import secrets_of, shown_url, without_secrets

SECRET, PASSWORD, QUERY = "sk-very-secret", "pass-word-1", "in-the-query"
REMOTE = "http://teacher.invalid/v1"  # reserved: no such host


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"\ufeff{SECRET}", f"  {SECRET}\r\n"])
def test_what_copying_adds_to_a_key_is_no_part_of_it(server, monkeypatch, key):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert answers(server, [ask()])[0].text == "yes" and server.keys == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("key", "said"), [(f"“{SECRET}”", r"character 1 of 16 is '“' \(U\+201C\)"), ("a b", "2 of 3")]
)
def test_a_key_that_no_request_can_carry_is_refused_at_once(server, monkeypatch, key, said):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EngineNotStarted, match=said) as refused:
        OpenAIEngine("m", GREEDY, server.url)
    assert SECRET not in str(refused.value) and not server.bodies


def test_no_proxy_leads_to_this_machine(server, monkeypatch):  # noqa: F811
    monkeypatch.delenv("NO_PROXY")
    for name in ("ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    assert answers(server, [ask()])[0].text == "yes"
    server.url = server.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(EngineDead, match="nothing listens there$|nothing listens there\\)"):
        answers(server, [ask()], max_retries=0)


def ends(url: str, **options) -> str:
    """What the engine says that gives up on one ask."""
    engine = OpenAIEngine("m", GREEDY, url, **{"max_retries": 0, **options})
    try:
        engine.submit(0, ask())
        with pytest.raises(EngineDead) as end:
            engine.collect()
    finally:
        engine.close()
    return str(end.value)


def test_each_cause_of_no_connection_is_told_apart(server, monkeypatch):  # noqa: F811
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "it does not speak https: try http://" in ends(server.url.replace("http:", "https:"))
    assert "the host teacher.invalid is not known" in ends(REMOTE)
    assert "nothing listens there" in ends("http://127.0.0.1:1/v1")
    monkeypatch.setenv("HTTP_PROXY", f"http://someone:{SECRET}@127.0.0.1:1")
    said = ends(REMOTE)
    assert "nothing listens there, by way of HTTP_PROXY=http://127.0.0.1:1" in said and SECRET not in said
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(EngineNotStarted, match=r"ALL_PROXY=socks5://127.0.0.1:1.*NO_PROXY"):
        OpenAIEngine("m", GREEDY, REMOTE)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    with pytest.raises(EngineNotStarted, match=r"SSL_CERT_FILE names /no/such.pem, which does not exist"):
        OpenAIEngine("m", GREEDY, REMOTE)
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    with pytest.raises(EngineNotStarted, match="SSL_CERT_FILE or SSL_CERT_DIR names no certificates"):
        OpenAIEngine("m", GREEDY, REMOTE)


def certificate(path: Path) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    where = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = made.add_extension(where, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_self_signed_certificate_is_named_and_taken_where_it_is_trusted(tmp_path, monkeypatch):
    pem = certificate(tmp_path / "server.pem")
    server = Server()  # noqa: F811
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.url = server.url.replace("http:", "https:")
    try:
        assert "its certificate is not trusted" in (said := ends(server.url)) and "SSL_CERT_FILE" in said
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert answers(server, [ask()])[0].text == "yes"
    finally:
        server.shutdown()
        server.server_close()


def test_an_address_is_cleaned_and_its_query_goes_with_every_request(server):  # noqa: F811
    url, server.url = server.url, f" {server.url}?api-version=2024-10-21\r\n"
    assert answers(server, [ask()])[0].text == "yes"
    assert server.paths == {"/v1/chat/completions?api-version=2024-10-21"}
    assert shown_url(server.url) == url


def test_nothing_secret_is_in_any_message_or_file(place, server, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.url = server.url.replace("//", f"//someone:{PASSWORD}@") + f"?key={QUERY}"
    basic = b64encode(f"someone:{PASSWORD}".encode()).decode()
    echo = f"key {SECRET}, at /v1?key={QUERY}, by someone:{PASSWORD}, Authorization: Basic {basic}"
    for fault in (refusal(401, f"Incorrect API key provided: {echo}"), refusal(500, f"for {echo}")):
        server.script = lambda body, fault=fault: fault
        assert command(server) == 2
    bad = iter([refusal(400, f"not with {echo}"), reply(f"half {echo}", "content_filter")])
    server.script = lambda body: next(bad, reply())
    assert command(server) == 1  # two of twelve failed
    said = capsys.readouterr()
    assert "To go on, run: " in said.err and "[OPENAI_API_KEY]" in said.err
    assert len(rows_of(".failed.jsonl")) == 2
    for text in (said.out, said.err, *(path.read_text() for path in place.iterdir())):
        assert not [secret for secret in (SECRET, PASSWORD, QUERY, basic) if secret in text]
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["made_with"]["base_url"].startswith("http://127.")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (" http://me:pw-1@host:80/v1?key=K#f", "http://host:80/v1"),
        ("HTTP://me:pw-1@host/v1", "HTTP://host/v1"),
        ("me:pw-1@host/v1", "host/v1"),
        ("'http://me:pw-1@host/v1'", "http://host/v1"),
        ("http://me:pw/-1@host/v1", "http://host/v1"),
        ("https:/me:pw-1@host/v1", "host/v1"),
        ("proxy:3128", "proxy:3128"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("https://host:443/v1/@cf/meta", "https://host:443/v1/@cf/meta"),
    ],
)
def test_an_address_is_shown_without_what_is_secret_in_it(monkeypatch, url, shown):
    assert shown_url(url) == shown
    for flags in (["--base_url", url], [f"--base_url={url}"], [f"--base-url={url}"]):
        monkeypatch.setattr(sys, "argv", ["stage.py", *flags])
        assert "pw" not in resume_command(StageArguments(), begun=False)


def test_what_is_no_secret_is_left_in_a_message(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    secrets = secrets_of(f"http://user:{PASSWORD}@host/v1?api-version=2024-10-21&sig={QUERY}")
    said = f"the user message of 2024-10-21: {PASSWORD} {QUERY} {SECRET}"
    assert (
        without_secrets(said, secrets) == "the user message of 2024-10-21: [--base_url] [--base_url] [OPENAI_API_KEY]"
    )
    assert without_secrets("by a-token", secrets_of("http://a-token@host/v1")) == "by [--base_url]"


def test_a_proxy_that_is_no_address_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://someone:{SECRET}@proxy:port")
    with pytest.raises(EngineNotStarted, match="no client can be made with .*HTTP_PROXY=http://proxy:port") as refused:
        OpenAIEngine("m", GREEDY, REMOTE)
    assert SECRET not in str(refused.value)
