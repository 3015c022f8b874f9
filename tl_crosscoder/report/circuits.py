"""`TokensHtml`: circuitsvis figures as HTML that needs no network, in notebooks and on pages.

Contract: a `TokenPanel` is a circuitsvis component with its props, plain JSON values; the
JavaScript is the file in the installed circuitsvis, packed (0.5 MB) and unpacked once a page,
however many figures there are. Text of a script element is escaped, so that no token ends it.
Limit: browsers of 2023 or later (`DecompressionStream`); without JavaScript tokens are plain text.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.results.render import escaped

# circuitsvis writes black on nothing: a page in dark colours needs a light box below it.
_BOX = (
    "background:#fff;color:#000;color-scheme:light;border-radius:4px;margin:8px 0;"
    "padding:8px 12px 28px;font-family:system-ui,sans-serif;flex:1 1 360px;min-width:0"
)
_ROW = "display:flex;flex-wrap:wrap;gap:0 12px"
_LOADER = """
(() => {
  if (window.tlCircuits) return;
  let library, n = 0;
  const unpacked = async () => {
    const packed = Uint8Array.from(atob("__PACKED__"), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    // Without the names by which a page's own module loader (RequireJS) would catch its parts.
    script.textContent = "window.tlCircuits.library = (function (define, module, exports) {"
      + await new Response(stream).text() + "\\nreturn CircuitsVis; })();";
    document.head.append(script);
    return window.tlCircuits.library;
  };
  const render = async (target, component, props) => {
    const node = typeof target === "string" ? document.getElementById(target) : target;
    try {
      const circuits = await (library ??= unpacked());
      if (!circuits[component]) throw new Error("circuitsvis has no " + component);
      if (!node.isConnected) return;
      const root = document.createElement("div");
      root.id = "tl-circuits-" + n++;
      node.replaceChildren(root);
      circuits.render(root.id, circuits[component], props);
    } catch (error) {
      node.textContent = "This figure cannot be drawn: " + error;
      throw error;
    }
  };
  const fill = (key, component, props) => {
    for (const node of document.querySelectorAll(`[data-tl-circuits="${key}"]`)) {
      node.removeAttribute("data-tl-circuits");
      render(node, component, props);
    }
  };
  window.tlCircuits = { render, fill };
})();
"""


@lru_cache(maxsize=1)
def circuits_script() -> str:
    """JavaScript for one script element of a page; a second copy on it does nothing.

    It gives the page `tlCircuits.render(target, component, props)`: `target` is an element of the
    page or its id, and what it held before is replaced.

    Raises:
        FileNotFoundError: circuitsvis is installed without its JavaScript.
    """
    file = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: install circuitsvis again.")
    # A browser's developer tools would ask the page's server for the source map.
    code = re.sub(r"//# sourceMappingURL=\S+", "", file.read_text(encoding="utf-8"))
    packed = base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()
    return _LOADER.strip().replace("__PACKED__", packed)


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: ASCII, and without `<`, `>` and `&`.

    Raises ValueError for NaN and infinity, which are not JSON.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@dataclass(frozen=True, kw_only=True)
class TokenPanel:
    """One circuitsvis component; `token_panels` makes them."""

    component: str
    """Its name in circuitsvis, such as `ColoredTokens`."""
    props: Mapping[str, Any]
    """Plain values, tokens ready to show."""
    heading: str = ""
    text: str = ""
    """Shown in its place where no script runs."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `component`, `props`, `heading`, `text`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TokensHtml:
    """Panels one below the other, or side by side where there is space."""

    panels: tuple[TokenPanel, ...]
    is_side_by_side: bool = False

    def fragment(self) -> str:
        """HTML for a page that has `circuits_script` in a script element before this one."""
        boxes, calls = [], []
        for panel in self.panels:
            call = f"{script_json(panel.component)}, {script_json(panel.props)}"
            # A figure keeps its key: notebooks that run again stay as they are.
            key = hashlib.sha256(call.encode()).hexdigest()[:16]
            heading = f"<div><b>{escaped(panel.heading)}</b></div>" if panel.heading else ""
            boxes.append(
                f'<div style="{_BOX}">{heading}'
                f'<div data-tl-circuits="{key}">{escaped(panel.text)}</div></div>'
            )
            calls.append(f'tlCircuits.fill("{key}", {call});')
        row = f' style="{_ROW}"' if self.is_side_by_side else ""
        inner, script = "\n".join(boxes), "\n".join(calls)
        return f"<div{row}>\n{inner}\n</div>\n<script>\n{script}\n</script>"

    def page(self, title: str = "Tokens") -> str:
        """HTML document that opens without a network."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{escaped(title)}</title></head>\n<body>\n{self._repr_html_()}\n"
            "</body></html>\n"
        )

    def save(self, path: str | Path, title: str = "Tokens") -> Path:
        """Write `page`, atomically."""
        files.write_text(files.user_path(path), self.page(title))
        return files.user_path(path)

    def __add__(self, other: "TokensHtml") -> "TokensHtml":
        """Panels of both, one below the other, with one copy of the script."""
        return TokensHtml(panels=(*self.panels, *other.panels))

    def _repr_html_(self) -> str:
        # Each output has the script, since a notebook may keep one output and lose the others, and
        # some front ends show each in a frame of its own.
        return f"<script>\n{circuits_script()}\n</script>\n{self.fragment()}"
