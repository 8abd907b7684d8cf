"""A socket that listens at an address, taken before what serves there is loaded."""

import socket

from aprium.base.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; port 0 is any that is free. Raises ConfigError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from error
    return listener


def place_of(listener: socket.socket) -> str:
    """Return host and port of a socket, as they stand in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
