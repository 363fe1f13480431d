"""How whoever runs a cluster asks its routers: as a client with the key that follows from their secret.

Owns who gets that key: processes that may read the routers' secret, for routers of their own configuration. It is never sent to
an address that somebody named.
"""

from __future__ import annotations

import dataclasses

from router.secret import operator_key, read_secret, secret_path
from tandem.config import Config
from tandem.credentials import Credentials
from tandem.errors import ConfigError, InvalidRequest


def operator_credentials(config: Config, given: Credentials) -> Credentials:
    """`given`, with the operator's key where a key is needed, none is given, and this process may read the routers' secret.
    Raises InvalidRequest if the routers have TLS and `given` doesn't say whom to believe."""
    if config.router.tls.cert and given.tls is None:
        raise InvalidRequest(
            "router.tls is set: name the authority of its certificate by `tandem --tls-ca FILE …` or TANDEM_TLS_CA"
        )
    if config.router.keys_file and not given.api_key:
        try:
            return dataclasses.replace(given, api_key=operator_key(read_secret(secret_path(config))))
        except ConfigError:
            return given  # not ours to read: whoever asks needs a key, and the router will say so
    return given
