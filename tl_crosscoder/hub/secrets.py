"""`findings`: secrets and paths of this machine in what is going to be published.

Contract: a file's name and content in, a sentence with the line for each finding out; a secret is
masked, a path is shown. Shapes are those of the services' own documentation and of the usual
scanners (detect-secrets 1.5, gitleaks 8). Limits: a secret of no known shape and no telling name
passes; in examples secrets are looked for and paths are not.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

Content = Path | bytes
"""What a published file holds: a file as it is, or bytes."""
TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".html", ".csv", ".py")
_MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as the library itself has it."""

_VALUE = r"[\"']?\s*(?:[:=]|=>)\s*[\"']?(?![$<*(]|None\b|null\b|os\.)[^\s\"',;{}\[\]]{6,}"
_NAMED = (  # names of fields and variables, whatever stands before: openai_api_key, dbPassword
    r"(?i:(?:api|access|secret|private|account|auth|encryption|signing|storage)[_-]?key"
    r"|(?:access|auth|api|bearer|refresh|hub|session|bot|personal)[_-]?token"
    r"|client[_-]?secret|credentials?|password|passwd|passphrase"
    r"|(?<![a-z])(?:secret|pwd|hf_token|gh_token))"
)
_SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "an API key": (
        r"\b(?:sk-|gsk_|xai-|pplx-|r8_|fw_|nvapi-|lin_api_|ntn_|PMAK-|dapi|glpat-|npm_|dop_v1_"
        r"|shpat_|hvs\.|pypi-|(?:sk|rk|pk)_(?:live|test)_|whsec_|sq0[a-z]{3}-|tgp_v1_)"
        r"[A-Za-z0-9_-]{20,}"
    ),
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b",
    "a Google key": r"\b(?:AIza[\w-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,})",
    "a Slack token": r"\b(?:xox[abeprs]-[\w-]{10,}|xapp-[\w-]{20,})",
    "a webhook": (
        r"\bhttps://(?:hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/"
        r"|[\w.-]*webhook\.office\.com/)[\w/@-]{10,}"
    ),
    "a Discord token": r"\b[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,}",
    "a Telegram token": r"\b\d{8,10}:AA[\w-]{32,}",
    "a SendGrid key": r"\bSG\.[\w-]{20,}\.[\w-]{20,}",
    "a Twilio key": r"\bSK[0-9a-f]{32}\b",
    "an age key": r"\bAGE-SECRET-KEY-1[0-9A-Z]{50,}",
    "an Azure key": r"\b(?:AccountKey|SharedAccessKey|sig)=[A-Za-z0-9+/%]{40,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
    "an authorization header": r"\b(?i:bearer|basic)\s+(?=\S*\d)[A-Za-z0-9._~+/-]{16,}=*",
    "a login in an address": r"\b[a-zA-Z][\w+.-]{1,15}://[^\s/:@\"'<>]*:[^\s/@\"'<>$]{3,}@[\w\[]",
    "a login for a file transfer": r"\B-u\s+[\w.-]+:[^\s\"']{6,}",
    "a password or key": (
        rf"{_NAMED}{_VALUE}"
        r"|(?<![A-Z0-9_])[A-Z][A-Z0-9_]{0,60}_(?:TOKEN|KEY|SECRET|PASS|PAT)[\"']?\s*[=:]\s*[\"']?"
        r"(?![$<*(]|None\b|null\b|os\.)[^\s\"',;{}\[\]]{6,}"
    ),
}
_NAME = r"[^\s\"'<>|:*?/\\]"
_ROOT = r"(?:home|Users|root|mnt|media|scratch|workspace|Volumes|tmp|var|opt|srv)"
_PATHS = (
    r"\bfile:/+[^\s\"']+",
    r"(?<!\w)[A-Za-z]:(?:\\{1,2}|/(?!/))[^\s\"'<>|?*]+",  # C:\runs, and as JSON writes it
    rf"(?<![\w/])(?:\.\.[/\\]+)+{_NAME}+(?:[/\\]+{_NAME}*)*",  # ../../home/me
    rf"(?<![\w./<>\]*~])/{_NAME}+(?:/{_NAME}*)+",  # /data/text.jsonl
    rf"(?<=[\"'`])/{_NAME}+(?=[\"'`])",  # "/text.jsonl"
    rf"(?<![\w/])~\w*/{_NAME}+",  # ~/runs
    r"(?<![\w\\:])\\{2,4}[\w.$-]+\\{1,2}[\w.$-]+",  # \\server\share
    rf"\$\{{?(?:HOME|USER|PWD|TMPDIR|SCRATCH|WORK)\b\}}?[/\\]{_NAME}+",
    r"%(?:USERPROFILE|HOMEPATH|APPDATA|LOCALAPPDATA|TEMP)%[^\s\"']*",
    rf"(?i:%2F){_ROOT}(?i:%2F)[^\s\"']+",
)
_EXAMPLE = re.compile(r'^\s*"(?:before|token|after)": ')
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(/))")


def findings(path: str, content: Content) -> list[str]:
    """What must not be published in a file, each as `runner_cfg.json:48: an API key, 'sk-x…'`.

    Text is searched by line, a safetensors file in its header, any other file as one line. The
    value of a secret is masked, a path is shown.
    """
    if path.endswith(".safetensors"):
        return _in_line(path, _header(content), with_paths=True)
    data = content if isinstance(content, bytes) else content.read_bytes()
    if not path.endswith(TEXT_SUFFIXES):
        return _in_line(path, data.decode("latin-1"), with_paths=False)
    lines = data.decode(errors="replace").splitlines()
    if path.endswith((".json", ".jsonl")):  # which may write the letters of a path as escapes
        lines = [_ESCAPE.sub(lambda m: m[2] or chr(int(m[1], 16)), line) for line in lines]
    return [
        found
        for i, line in enumerate(lines, start=1)
        for found in _in_line(f"{path}:{i}", line, with_paths=not _EXAMPLE.match(line))
    ]


def _header(content: Content) -> str:
    """The JSON at the start of a safetensors file, after its length in 8 bytes."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return file.read(min(n, _MOST_HEADER_BYTES)).decode(errors="replace")


def _in_line(where: str, text: str, *, with_paths: bool) -> list[str]:
    secrets = [
        f"{where}: {what}, {found[:4] + '…'!r}" for what, found in _matches(text, _SECRETS.items())
    ]
    kinds = [("a path of this machine", pattern) for pattern in _PATHS if with_paths]
    return secrets + [f"{where}: {what}, {found!r}" for what, found in _matches(text, kinds)]


def _matches(text: str, kinds: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What is found, once where several match: as the first of them."""
    taken: list[range] = []
    # One pattern of all would take twice the time: `re` looks for how a pattern begins.
    for what, pattern in kinds:
        for found in re.finditer(pattern, text):
            if not any(found.start() < one.stop and one.start < found.end() for one in taken):
                taken.append(range(*found.span()))
                yield what, found.group()
