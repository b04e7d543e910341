"""Credentials in URIs are taken out where one enters, so that nothing further on has any to show.

A job file may say s3://KEY:SECRET@bucket or postgresql://user:password@host/db. `take_out` gives the URI without them,
which is what records, files, events and messages hold; `put_back` gives the library that connects the whole one. In
between they are in this process and, by the environment variable TUNEYARD_CREDENTIALS, in those that it starts;
`Job` and `Folder` take them along where they are pickled for another host.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLE = "TUNEYARD_CREDENTIALS"
USER = r"(?:([^/?#\s@]*|[^/?#\s@:]+:(?!\d+/)[^?#\s@]*)@)?"  # a secret's slashes should be written %2F, but may not be
URI = re.compile(rf"^([A-Za-z][\w+.-]*)://{USER}([^/?#\s]*)([^?]*)(?:\?(.*))?$", re.DOTALL)
"""Scheme, user, place, path and query."""
HIDDEN = re.compile(r"(?<!hf)(://)[^/@\s]+@")
USERS = ("hdfs", "gs", "gcs")
"""Schemes whose user part is a name when it has no password (hdfs://user@host, gs://anonymous@bucket)."""
NO_USERS = ("hf", "file")
"""Schemes in which @ means something else (hf://name@revision)."""
HIDDEN_PATH = "hidden-"
SECRET_OPTION = re.compile(r"(secret|password|passwd|token|signature|credential|access_?key|api_?key|^sig$)", re.I)


def take_out(value: Any) -> Any:
    """The same value, its strings, lists and mappings included, without the credentials of any URI in it."""
    if isinstance(value, Mapping):
        return {key: take_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_out(item) for item in value)
    if not isinstance(value, str) or "://" not in value or not (match := URI.match(value)):
        return value
    scheme, user, place, path, query = match.groups()
    if scheme in NO_USERS:
        return value
    options = query.split("&") if query else []
    secret = [option for option in options if SECRET_OPTION.search(option.partition("=")[0])]
    hidden = bool(user) and not (scheme in USERS and ":" not in user)
    if not hidden and not secret:
        return value
    learn({f"{scheme}://{place}": {"user": user if hidden else "", "options": "&".join(secret)}})
    kept = "&".join(option for option in options if option not in secret)
    return f"{scheme}://{'' if hidden or not user else user + '@'}{place}{path}{'?' + kept if kept else ''}"


def hide_address(value: Any) -> Any:
    """A web hook's address without its path, which is what lets anybody post there; `show_address` gives it whole.

    Raises:
        ValueError: it is no http address.
    """
    if value is None or (isinstance(value, str) and HIDDEN_PATH in value):
        return value
    match = URI.match(value) if isinstance(value, str) else None
    if match is None or match[1] not in ("http", "https") or not match[3]:
        raise ValueError("must be an address such as https://hooks.example.org/services/...")
    scheme, _, place, *_ = match.groups()
    shown = f"{scheme}://{place}/{HIDDEN_PATH}{hashlib.sha256(value.encode()).hexdigest()[:8]}"
    learn({shown: {"user": value.partition(place)[2].lstrip("/"), "options": "", "whole": value}})
    return shown


def show_address(shown: str) -> str | None:
    """The address that `hide_address` hid, None where it is not known here. Never to be shown or kept."""
    return all_known().get(shown, {}).get("whole")


def put_back(uri: str) -> str:
    """A URI with what was taken out of it, for the library that connects. Never to be shown or kept."""
    match = URI.match(uri)
    known = all_known()
    if match is None or match[2] or f"{match[1]}://{match[3]}" not in known:
        return uri
    scheme, _, place, path, query = match.groups()
    mine = known[f"{scheme}://{place}"]
    options = "&".join(filter(None, (query, mine["options"])))
    return f"{scheme}://{mine['user'] + '@' if mine['user'] else ''}{place}{path}{'?' + options if options else ''}"


def all_known() -> dict[str, dict[str, str]]:
    """What this process and those that started it have taken out, by scheme and place."""
    known: dict[str, dict[str, str]] = json.loads(os.environ.get(VARIABLE) or "{}")
    return known


def travelling() -> dict[str, str]:
    """The variable, for the environment of a process that was started before it was set."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def learn(known: Mapping[str, Mapping[str, str]]) -> None:
    """Know what another process has taken out."""
    if known:
        os.environ[VARIABLE] = json.dumps({**all_known(), **known})


def hide_credentials(text: str) -> str:
    """A text of somebody else (an error of a library) without the credentials of any URI in it, and without those known
    here."""
    text = HIDDEN.sub(r"\1", text)
    for mine in all_known().values():
        for secret in (*mine["user"].split(":"), *(option.partition("=")[2] for option in mine["options"].split("&"))):
            if len(secret) >= 4:
                text = text.replace(secret, "***")
    return text
