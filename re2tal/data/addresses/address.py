"""Addresses: which are accepted, and how they are shown.

    https://HOST/PATH   http://HOST/PATH   s3://BUCKET/KEY   gs://BUCKET/KEY   hf://datasets/OWNER/NAME/PATH

A path that was made of an address has lost a slash (https:/HOST/PATH), and means the same. What an address may hold in
secret, a query that signs it, is never shown. Only the web knows queries, fragments and %20: the keys of a bucket are
names as they stand.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

SCHEMES: dict[str, str] = {"http": "", "https": "", "s3": "s3fs", "gs": "gcsfs", "hf": ""}
"""Scheme -> the extra library that it needs; the others come with the package. No other scheme is ever opened: fsspec
also knows some that read local files, run commands, or chain."""

WEB = ("http", "https")

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/].*)", re.DOTALL)


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """The address of a file or a folder; as text it is fit for logs and results."""

    url: str
    """As it is opened; a query in it may be secret."""

    def __str__(self) -> str:
        shown, _, query = self.url.partition("?") if self.is_web else (self.url, "", "")
        return f"{shown}?..." if query else shown

    __repr__ = as_posix = __str__

    def __truediv__(self, name: str) -> Address:
        """A file of this folder."""
        return Address(f"{self.url.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        """How it is reached."""
        return self.url.partition(":")[0]

    @property
    def is_web(self) -> bool:
        """Whether it is percent-quoted and may have a query."""
        return self.scheme in WEB

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(unquote(self.url.partition("?")[0]) if self.is_web else self.url).name

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return PurePosixPath(self.name).stem

    def key(self, *more: object) -> str:
        """Names this address, and what `more` says of it, in a file's name."""
        return hashlib.sha256(repr((self.url, *more)).encode()).hexdigest()[:40]


Source = Path | Address
"""Where a video is."""


def as_address(given: Path | str) -> Address | None:
    """The address that a user gave; None for a path on this machine.

    ValueError for an address that is not accepted; the message does not show what may be secret in it.
    """
    match = _ADDRESS.fullmatch(str(given))
    if match is None:
        if "://" in str(given):
            raise ValueError(f"{_cut(str(given))} is no address that can be read; give one of {_known()}")
        return None
    scheme = match[1].lower()
    is_web = scheme in WEB
    rest = match[2].partition("#")[0] if is_web else match[2]
    address = Address(f"{scheme}://{rest}")
    if scheme not in SCHEMES:
        raise ValueError(
            f"{_cut(str(given))}: addresses that begin with {scheme}: are not read; give one of {_known()}, or the "
            "whole path of a file"
        )
    if "?" in rest and not is_web:
        shown = _cut(str(address))
        raise ValueError(f"{shown}?... has a question mark in it, which only http and https addresses may have")
    if re.search(r"[\x00-\x20\x7f]" if is_web else r"[\x00-\x1f\x7f]", rest):
        raise ValueError(f"{_cut(str(address))!r} has a space or a control character in it; write it as %20, %0A, ...")
    place = urlsplit(address.url)
    # Not shown in the message either: it goes to logs.
    if "@" in place.netloc:
        raise ValueError(
            f"{scheme}://...@{place.netloc.rpartition('@')[2]}{place.path} has a user name or a password in it, which "
            "others could read in logs; leave it out, and put it into ~/.netrc (chmod 600)"
        )
    # fsspec chains file systems with ::, the first of which could be any.
    if "::" in rest.removeprefix(place.netloc) or not rest.partition("?")[0].partition("/")[2].strip("/"):
        raise ValueError(f"{address} does not name one file or folder; give the whole address, without ::")
    return address


def folder_address(given: Path | str) -> Address | None:
    """As `as_address`, of a folder: there a query has no meaning."""
    address = as_address(given)
    if address is not None and "?" in address.url:
        raise ValueError(
            f"{address}: a folder's address cannot be signed, since names of files are put behind it; give one "
            "without ?, and credentials as docs/own_data.md says"
        )
    return address


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)


def _cut(text: str) -> str:
    """What cannot be secret of a text that is no address."""
    return re.sub(r"//[^/@]*@", "//...@", text.partition("?")[0])[:200]
