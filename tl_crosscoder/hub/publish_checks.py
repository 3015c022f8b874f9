"""What must not go to the hub: secrets, and paths of this machine.

Contract: `findings(path, content)` for every file that would go; text by line, a safetensors file
by its header, any other file as one. A secret's value is masked, a path is shown. Limits: known
shapes of tokens only; in examples (text of a dataset) secrets are looked for and paths are not.
"""

import re
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".html", ".csv", ".py")
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password or key": (
        r"(?i)\b(?:api[_-]?key|secret[_-]?key|secret|access[_-]?token|auth[_-]?token|password"
        r"|passwd)\b[\"']?\s*[:=]\s*[\"']?[^\s\"',;{}\[\]]{6,}"
    ),
}
_NAME = r"[^\s\"'<>|:*?/\\]"
_PATHS = (
    rf"(?<![\w./:<>\]*~-])/{_NAME}+(?:/{_NAME}*)+",  # /data/text.jsonl
    rf"(?<=[\"'`])/{_NAME}+(?=[\"'`])",  # "/text.jsonl"
    rf"(?<![\w/])~\w*/{_NAME}+",  # ~/runs
    r"\bfile:/+[^\s\"']+",
    r"(?<!\w)[A-Za-z]:(?:\\{1,2}|/(?!/))[^\s\"'<>|?*]+",  # C:\runs, and as JSON writes it
    r"(?<![\w\\:])\\{2,4}[\w.$-]+\\{1,2}[\w.$-]+",  # \\server\share
)
_EXAMPLE = re.compile(r'^\s*"(?:before|token|after)": ')


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that must not be published."""

    path: str
    line: int | None
    """None of a file that has no lines."""
    what: str
    shown: str

    def __str__(self) -> str:
        """`runner_cfg.json:48: an absolute path, '/runs/gemma'`."""
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.what}, {self.shown!r}"


def findings(path: str, content: Path | bytes) -> list[Finding]:
    """What must not be published in a file; `path` is its path in the repository."""
    if path.endswith(".safetensors"):
        return _in_line(path, None, _header(content), with_paths=True)
    data = content if isinstance(content, bytes) else content.read_bytes()
    if not path.endswith(TEXT_SUFFIXES):
        return _in_line(path, None, data.decode("latin-1"), with_paths=False)
    lines = data.decode(errors="replace").splitlines()
    if path.endswith((".json", ".jsonl")):  # which may write the letters of a path as escapes
        lines = [re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), line) for line in lines]
    return [
        found
        for i, line in enumerate(lines, start=1)
        for found in _in_line(path, i, line, with_paths=not _EXAMPLE.match(line))
    ]


def _in_line(path: str, line: int | None, text: str, *, with_paths: bool) -> list[Finding]:
    secrets = [
        Finding(path=path, line=line, what=what, shown=f"{found.group()[:4]}…")
        for what, pattern in _SECRETS.items()
        for found in re.finditer(pattern, text)
    ]
    paths = [
        Finding(path=path, line=line, what="a path of this machine", shown=found.group())
        for pattern in _PATHS
        for found in re.finditer(pattern, text)
        if with_paths
    ]
    return secrets + paths


def _header(content: Path | bytes) -> str:
    """The JSON at the start of a safetensors file, after its length in 8 bytes."""
    if isinstance(content, bytes):
        n = int.from_bytes(content[:8], "little")
        return content[8 : 8 + n].decode(errors="replace")
    with content.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return file.read(n).decode(errors="replace")
