"""The address that a server listens at."""

from __future__ import annotations

import ipaddress
import socket

from ipn_core.errors import UserError

__all__ = ["address_of", "bound", "hosts_of"]

_LOCAL = ("127.0.0.1", "localhost", "[::1]")


def hosts_of(host: str) -> tuple[str, ...]:
    """Return the values of the header Host that a server at an address is asked by.

    Args:
        host: the address or name that it listens at.

    Returns:
        The names of this machine, IPv6 in brackets as the header has it, where nobody else reaches
        the address; none, which stands for all, where others do.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _LOCAL if host.lower() == "localhost" else ()
    shown = f"[{address}]" if address.version == 6 else str(address)
    return tuple(dict.fromkeys((*_LOCAL, shown))) if address.is_loopback else ()


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has its address, and does not listen yet.

    Args:
        host: an address or name of this machine.
        port: 0 for any that is free.

    Raises:
        UserError: there is no such address, or it is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"'--host' must be an address of this machine, got '{host}' ({error})."
        ) from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise UserError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Choose another with "
            "--host and --port; 0 is a free one."
        ) from None
    return opened


def address_of(host: str, opened: socket.socket) -> str:
    """Return the address that a browser takes, with the port that a socket has got."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{opened.getsockname()[1]}"
