"""What the routers' gRPC and HTTP ports prove themselves with, from PEM files.

Owns the certificate, its key and the authority of clients, as the files say them now: handshakes that begin after `reload` use
what is new, connections that stand go on. TLS 1.2 and later alone.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from tandem.config import RouterTlsConfig
from tandem.errors import ConfigError

MAX_PEM_BYTES = 2**20


class ServerTls:
    """`config` names `cert` and `key`. Raises ConfigError for files that can't be used."""

    def __init__(self, config: RouterTlsConfig) -> None:
        self._cert = Path(config.cert).expanduser()
        self._key = Path(config.key).expanduser()
        self._ca = Path(config.ca).expanduser() if config.ca else None
        self._contexts: list[ssl.SSLContext] = []
        self._grpc = self._read()

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self._cert, self._key, *([self._ca] if self._ca is not None else [])]

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port. With an authority of clients, who has no certificate of it is refused."""
        # Asked at each handshake, on threads of gRPC's own.
        return grpc.dynamic_ssl_server_credentials(
            self._grpc, lambda: self._grpc, require_client_authentication=self._ca is not None
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For a port of Python's own, with the same rules. It stays with this object, and is changed by `reload`."""
        context = self._context()
        self._contexts.append(context)
        return context

    def reload(self) -> None:
        """Takes up the files as they are now. Raises ConfigError for files that can't be used, and then changes nothing. The
        authority of HTTP's clients can only be added to: one that is taken away is trusted until the router starts again."""
        self._grpc = self._read()
        for context in self._contexts:
            context.load_cert_chain(self._cert, self._key)
            if self._ca is not None:
                context.load_verify_locations(self._ca)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key)
        if self._ca is not None:
            context.load_verify_locations(self._ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """What gRPC wants of the files, once OpenSSL has found them good: gRPC would only refuse each handshake."""
        parts = {path: _read(path) for path in self.paths}
        try:
            self._context()
        except (ssl.SSLError, OSError) as error:
            names = ", ".join(str(path) for path in self.paths)
            raise ConfigError(f"router.tls: {names} can't be used: {error}") from error
        ca = parts[self._ca] if self._ca is not None else None
        return grpc.ssl_server_certificate_configuration([(parts[self._key], parts[self._cert])], root_certificates=ca)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"router.tls: {path} can't be read: {error.strerror}") from error
    if len(data) > MAX_PEM_BYTES:
        raise ConfigError(f"router.tls: {path} has more than {MAX_PEM_BYTES} bytes")
    return data
