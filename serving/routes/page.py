"""The page at `/`: one file, no resources from elsewhere, and a policy that lets a browser fetch none."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Page:
    """A page and the headers that it goes with.

    >>> "default-src 'none'" in PAGE.headers["Content-Security-Policy"]
    True
    """

    file: Path = field(default=FILE)

    @cached_property
    def body(self) -> bytes:
        return self.file.read_bytes()

    @cached_property
    def headers(self) -> dict[str, str]:
        """Headers of the page: it may only run the scripts and styles inside of it."""
        text = self.body.decode()
        policy = [
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        return {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }


def _hashes(text: str, tag: str) -> str:
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


PAGE = Page()
