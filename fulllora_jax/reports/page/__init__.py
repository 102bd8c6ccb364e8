"""Pages of results: one HTML file each, which needs nothing but itself.

No script, no network, no font of its own: inline style, inline SVG and images
in data: URIs. `run_page` shows one training, `evaluation_page` one evaluation,
`comparison_page` many trainings.
"""

from fulllora_jax.reports.page.comparison import comparison_page
from fulllora_jax.reports.page.evaluation import evaluation_page, write_evaluation_page
from fulllora_jax.reports.page.run import run_page, write_page

__all__ = ['comparison_page', 'evaluation_page', 'run_page', 'write_evaluation_page', 'write_page']
