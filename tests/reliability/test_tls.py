"""TLS and client certificates, by a server process that has nothing to rank with."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def server(home: Path, **variables: str) -> Iterator[int]:
    """A server process with these settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    environment = {**os.environ, "MEMOIR_HOME": str(home), **variables}
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", "--port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, (home / "server.log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def asks(port: int, context: ssl.SSLContext, path: str = "/livez", token: str = "") -> int | str:
    """The status, or the kind of the refusal."""
    request = urllib.request.Request(f"https://localhost:{port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (ssl.SSLError, OSError):
        return "refused"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def files_of(authority: trustme.CA, folder: Path) -> dict[str, Any]:
    """A server's certificate and key as files."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key, root = folder / "server.pem", folder / "server.key", folder / "ca.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(pkcs8(issued))
    authority.cert_pem.write_to_path(str(root))
    return {"certificate": certificate, "key": key, "root": root}


def pkcs8(issued: trustme.LeafCert) -> bytes:
    """A private key as the HTTP server reads it."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def caller(authority: trustme.CA, *, trusts: trustme.CA | None = None) -> ssl.SSLContext:
    """A caller with a certificate of an authority, who trusts another's servers."""
    context = ssl.create_default_context()
    (trusts or authority).configure_trust(context)
    authority.issue_cert("caller.example").configure_cert(context)
    return context


def test_only_callers_with_a_certificate_and_a_token_come_in(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """None, another authority's, the right one; then tokens and scopes on top."""
    files = files_of(authority, tmp_path)
    variables = {
        "MEMOIR_SERVE_TLS_CERTIFICATE": str(files["certificate"]),
        "MEMOIR_SERVE_TLS_KEY": str(files["key"]),
        "MEMOIR_SERVE_TLS_CLIENT_CA": str(files["root"]),
        "MEMOIR_SERVE_API_KEYS": '{"a-scraper-of-this-test": ["metrics"]}',
    }
    nobody = ssl.create_default_context()
    authority.configure_trust(nobody)
    with server(tmp_path, **variables) as port:
        assert asks(port, caller(authority)) == 200
        assert asks(port, nobody) == "refused"
        assert asks(port, caller(trustme.CA(), trusts=authority)) == "refused"
        assert asks(port, ssl.create_default_context()) == "refused"  # whom the caller distrusts
        assert asks(port, caller(authority), "/metrics") == 401
        assert asks(port, caller(authority), "/metrics", "a-scraper-of-this-test") == 200
        assert asks(port, caller(authority), "/v1/models", "a-scraper-of-this-test") == 403
        assert (
            asks(port, caller(authority), "/readyz", "a-scraper-of-this-test") == 503
        )  # nothing to rank with
