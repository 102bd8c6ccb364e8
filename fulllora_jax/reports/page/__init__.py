"""Pages of results: one HTML file each, which needs nothing but itself.

No script, no network, no font of its own: inline style, inline SVG and images
in data: URIs. `run_page` shows one training, `comparison_page` many.
"""

from fulllora_jax.reports.page.comparison import comparison_page
from fulllora_jax.reports.page.run import run_page, write_page

__all__ = ['comparison_page', 'run_page', 'write_page']
