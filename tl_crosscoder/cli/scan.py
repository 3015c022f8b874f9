"""The verb `scan`: at which layer to look for what fine-tuning changed.

No torch is imported before it runs.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from tl_crosscoder import files
from tl_crosscoder.config.scan import ScanConfig
from tl_crosscoder.files import SCAN_NAMES


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Measure how much of the change passes each layer, without a dictionary; recommend a hook."""

    run: Annotated[ScanConfig, tyro.conf.OmitArgPrefixes]
    config: str | None = None
    """YAML file of the same fields, or of a training run, of which models and text are taken; flags
    win over it."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.report.figures import save_scan_figure
        from tl_crosscoder.run.scan import scan_run

        found, output = scan_run(self.run), files.user_path(self.run.output)
        found.save(output / SCAN_NAMES[0])
        save_scan_figure(output)
        print(found)
        print(f"\nSaved in {output}: {', '.join(SCAN_NAMES)}")
