"""The address that a server listens on."""

from __future__ import annotations

import errno
import socket


def check_address(host: str, port: int) -> None:
    """Raise ValueError where the server could not listen, before the models are loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is not free on {host}; choose another with --port") from error
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} needs the rights of root; choose one above 1023") from error
        raise ValueError(
            f"{host} is no address of this machine; 127.0.0.1 serves this machine alone, 0.0.0.0 all networks"
        ) from error
