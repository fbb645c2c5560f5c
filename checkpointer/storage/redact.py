"""Secrets out of URLs and messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit, urlunsplit

_SECRET_OPTION = re.compile(r"key|secret|token|pass|credential|sas|connection_string|auth|account", re.IGNORECASE)


class Redactor:
    """Takes the secrets of a URL and of storage options out of texts."""

    def __init__(self, url: str, options: Mapping[str, object]) -> None:
        self._secrets = sorted({*_option_secrets(options), *_url_secrets(url)}, key=len, reverse=True)

    def redact(self, text: str) -> str:
        """``text`` with ``***`` for every secret."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def without_credentials(url: str) -> str:
    """``url`` without user, password and query, in every part of a chained URL."""
    return "::".join(_plain(part) for part in url.split("::"))


def _plain(url: str) -> str:
    parts = urlsplit(url)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    dropped = "://" in url and "://" not in plain  # of memory:///run, which urllib takes for a path
    return plain.replace(":", "://", 1) if dropped else plain


def _url_secrets(url: str) -> Iterator[str]:
    for part in url.split("::"):
        parts = urlsplit(part)
        credentials = parts.netloc.rpartition("@")[0]
        yield from (text for text in (credentials, *credentials.split(":"), parts.query) if len(text) > 2)


def _option_secrets(options: Mapping[str, object], *, inherited: bool = False) -> Iterator[str]:
    """Text values of options that are named like secrets, at any depth."""
    for name, value in options.items():
        secret = inherited or bool(_SECRET_OPTION.search(str(name)))
        if isinstance(value, Mapping):
            yield from _option_secrets(value, inherited=secret)
        elif secret and isinstance(value, str) and len(value) > 2:
            yield value
