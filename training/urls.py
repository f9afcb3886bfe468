"""One place, as Python's own files name it and as a URL.

Databricks shows its stores as folders of every machine of a cluster: a volume under /Volumes, all of DBFS under /dbfs.
Spark's name for them, dbfs:/…, is none that Python's open, pyarrow or Petastorm could read.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit


def local_path(place: str) -> str | None:
    """The path of a place among this machine's files: what a file: or dbfs: URL says, or the place itself where it is a
    path. None: it lies in another store (s3://, abfss://, hdfs://, …)."""
    scheme, colon, rest = place.partition(":/")
    if not colon or not scheme.replace("+", "").isalnum():
        return place
    path = "/" + rest.lstrip("/")
    if scheme == "dbfs":
        return path if re.match(r"/Volumes(/|$)", path) else f"/dbfs{path}"
    return path if scheme == "file" else None


def file_url(place: str) -> str:
    """The place as Petastorm wants it: file:// and an absolute path; a URL of another store as it is."""
    path = local_path(place)
    return place if path is None else f"file://{Path(path).absolute()}"


def file_of_table(uri: str) -> str:
    """A data file's place, of what delta-rs and Spark say: there the path is a URL's (a space is %20), and Petastorm
    takes it as it stands."""
    return unquote(uri)


def holds_secret(place: str) -> bool:
    """Whether a URL holds what belongs into the environment: a user or password, a key."""
    parts = urlsplit(place)
    # abfss://container@account…: what stands there for a user is no secret.
    user = None if parts.scheme in ("abfs", "abfss") else parts.username
    # (A secret may hold a slash, where the host would end.)
    named = parts.scheme and re.search(r"//[^@]*:[^@]*@", place)
    return bool(user or parts.password or named or "key" in parts.query.lower())


def not_for_training(place: str) -> str | None:
    """What in a folder's name Petastorm (# and ?: there a URL's path ends) or delta-rs (%41: it reads A) can't read."""
    found = re.search(r"[#?]|%[0-9A-Fa-f]{2}", place)
    return found[0] if found else None
