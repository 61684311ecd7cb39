"""Whether Weights & Biases can be used from here: an account, a network, and a key that the server accepts."""

from __future__ import annotations

import configparser
import netrc
import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

OFFLINE_MODES = ("offline", "dryrun", "disabled")
SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")
"""names of the public server: the one that accounts were made under, and the later one"""
VIEWER = "query Viewer { viewer { id } }"


def is_offline(node: dict[str, Any]) -> bool:
    """Whether a configured logger (or the environment's WANDB_MODE) asks for no network at all."""
    modes = (node.get("mode"), os.environ.get("WANDB_MODE"))
    return node.get("offline") is True or any(str(mode).lower() in OFFLINE_MODES for mode in modes)


def server() -> str | None:
    """The server that the user has chosen by WANDB_BASE_URL or `wandb login --host`; None: the public one."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url.rstrip("/")
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([folder / "settings", Path("wandb") / "settings"])
    except (configparser.Error, OSError, UnicodeDecodeError):
        return None
    return (settings.get("default", "base_url", fallback=None) or "").rstrip("/") or None


def api_key() -> str | None:
    """The key of the environment or of the netrc file; None without an account."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    own = server()
    hosts = [urlsplit(url).netloc for url in ([own] if own else SERVERS)]
    for path in [os.environ["NETRC"]] if "NETRC" in os.environ else [Path.home() / n for n in (".netrc", "_netrc")]:
        try:
            found = netrc.netrc(str(path))
        except (OSError, netrc.NetrcParseError):
            continue
        for host in hosts:
            if entry := found.authenticators(host):
                return entry[2] or None
    return None


def has_account() -> bool:
    """Whether there is a key, or a token file in its place."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) or api_key() is not None


def problem(url: str, seconds: float) -> str | None:
    """Why a server cannot be used, as the middle of a sentence; None where it can, or where only its own client knows.

    Args:
        url: of the server's API.
        seconds: to wait for it, in all.
    """
    if not has_account():
        return "there is no account on this machine"
    found: list[str | None] = []
    # in a thread: a lookup of a name knows no timeout
    thread = threading.Thread(target=lambda: found.append(_ask(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    host = urlsplit(url).netloc or url
    return found[0] if found else f"{host} has not answered in {seconds:g} s"


def _ask(url: str, seconds: float) -> str | None:
    import requests

    host, key = urlsplit(url).netloc or url, api_key()
    try:
        answer = requests.post(
            f"{url}/graphql", json={"query": VIEWER}, auth=("api", key) if key else None, timeout=seconds
        )
    except requests.exceptions.SSLError:
        return None  # the client has certificates of its own
    except requests.exceptions.RequestException as error:
        late = isinstance(error, requests.exceptions.Timeout)
        return f"{host} has not answered in {seconds:g} s" if late else f"{host} cannot be reached: no network?"
    if key is None:
        return None
    try:
        viewer = (answer.json().get("data") or {}).get("viewer")
    except (ValueError, AttributeError):
        viewer = None
    if answer.status_code in (401, 403) or (answer.status_code == 200 and viewer is None):
        return f"{host} does not accept the API key"
    return None if answer.status_code == 200 else f"{host} answers with status {answer.status_code}"
