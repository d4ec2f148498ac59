"""Settings of the Prefect client, as the environment or the user's active profile has them, without importing Prefect.

Prefect's own import takes a second. The rules are those of `prefect.settings`: a variable of the environment counts,
else the profile that `PREFECT_PROFILE` names, else the active one, in the file `PREFECT_PROFILES_PATH`, else
`profiles.toml` in `PREFECT_HOME`, else in `~/.prefect`. Unlike Prefect, this reads no `.env`, `prefect.toml` or
`pyproject.toml` of the current folder, which may be a workspace that came from somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

API_URL = "PREFECT_API_URL"
_TEST_MODES = tuple(f"PREFECT_{name}TEST_MODE" for name in ("", "UNIT_", "TESTING_UNIT_", "TESTING_"))
"""In which Prefect reads no profile."""


class Profile(Struct, frozen=True):
    """A user's active profile; without a name if there is none."""

    name: str = ""
    settings: Mapping[str, str] = {}


class ClientSettings(Struct, frozen=True):
    """Where a Prefect client finds its server, and how it logs in."""

    url: str
    """Without a slash at its end."""
    profile: str
    """The profile that has `url`; empty if the environment has it."""
    auth_string: str | None
    key: str | None
    certificates: str | None


def client_settings() -> ClientSettings | None:
    """The settings of the environment and the active profile; None if neither names a server."""
    profile = active_profile()
    url = (os.environ.get(API_URL) or profile.settings.get(API_URL, "")).strip().rstrip("/")
    if not url:
        return None
    auth, key, certificates = (
        os.environ.get(name) or profile.settings.get(name) or None
        for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "PREFECT_API_SSL_CERT_FILE")
    )
    return ClientSettings(url, "" if os.environ.get(API_URL) else profile.name, auth, key, certificates)


def active_profile() -> Profile:
    """The user's active profile. As in Prefect, a file that is no valid TOML, or lacks the profile, has no settings."""
    if any(os.environ.get(name) for name in _TEST_MODES):
        return Profile()
    try:
        text = _profiles_path().read_bytes().decode()
    except (OSError, ValueError):
        return Profile()
    import tomllib  # only for users who have profiles

    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return Profile()
    name, profiles = os.environ.get("PREFECT_PROFILE") or found.get("active"), found.get("profiles")
    settings = profiles.get(name) if isinstance(name, str) and isinstance(profiles, dict) else None
    if not isinstance(name, str) or not isinstance(settings, dict):
        return Profile()
    return Profile(name, {key: str(value) for key, value in settings.items()})


def _profiles_path() -> Path:
    if path := os.environ.get("PREFECT_PROFILES_PATH"):
        return Path(path)
    home = os.environ.get("PREFECT_HOME")
    return Path(home or os.path.expanduser("~/.prefect")) / "profiles.toml"
