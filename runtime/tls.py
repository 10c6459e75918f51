"""TLS: certificate and key, checked before anything is loaded."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from dsv4c.errors import ConfigError


@dataclass(frozen=True)
class Tls:
    """PEM files. `ca`: clients must show a certificate that it has signed. Raises ConfigError if they do not work."""

    certificate: Path
    key: Path
    ca: Path | None = None

    def __post_init__(self) -> None:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
            names = ", ".join(f"`{path}`" for path in (self.certificate, self.key, self.ca) if path is not None)
            raise ConfigError(f"TLS does not work with {names}: {error}", hint="give PEM files") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")
