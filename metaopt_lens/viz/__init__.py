"""Pictures: plotly maps, circuitsvis token views, one self-contained page."""

from metaopt_lens.viz._answers import answers_text as answers_text
from metaopt_lens.viz._answers import comparison_sentences as comparison_sentences
from metaopt_lens.viz._answers import labels_text as labels_text
from metaopt_lens.viz._chosen_heads import choose_heads as choose_heads
from metaopt_lens.viz._claims_text import claims_text as claims_text
from metaopt_lens.viz._comparison_figures import comparison_map as comparison_map
from metaopt_lens.viz._comparison_figures import depth_profile as depth_profile
from metaopt_lens.viz._comparison_page import write_comparison_outputs as write_comparison_outputs
from metaopt_lens.viz._comparison_page import write_comparison_page as write_comparison_page
from metaopt_lens.viz._comparison_text import accuracies_text as accuracies_text
from metaopt_lens.viz._comparison_text import comparison_data as comparison_data
from metaopt_lens.viz._comparison_text import comparison_text as comparison_text
from metaopt_lens.viz._comparison_text import frame_text as frame_text
from metaopt_lens.viz._compiled_page import compiled_data as compiled_data
from metaopt_lens.viz._compiled_page import compiled_texts as compiled_texts
from metaopt_lens.viz._compiled_page import write_compiled_outputs as write_compiled_outputs
from metaopt_lens.viz._effects_map import effects_map as effects_map
from metaopt_lens.viz._following_figure import following_figure as following_figure
from metaopt_lens.viz._maps import head_map as head_map
from metaopt_lens.viz._output import write_outputs as write_outputs
from metaopt_lens.viz._page import write_page as write_page
from metaopt_lens.viz._profile_figures import profile_figure as profile_figure
from metaopt_lens.viz._report import run_sentences as run_sentences
from metaopt_lens.viz._report import write_report as write_report
from metaopt_lens.viz._sceptic_figures import algebra_figure as algebra_figure
from metaopt_lens.viz._sceptic_figures import ceiling_figure as ceiling_figure
from metaopt_lens.viz._sceptic_figures import ladder_figure as ladder_figure
from metaopt_lens.viz._sceptic_figures import order_figure as order_figure
from metaopt_lens.viz._table import decompositions as decompositions
from metaopt_lens.viz._table import head_means as head_means
from metaopt_lens.viz._table import head_table as head_table
from metaopt_lens.viz._terminal import as_data as as_data
from metaopt_lens.viz._terminal import heads_text as heads_text
from metaopt_lens.viz._terminal import prompt_text as prompt_text
from metaopt_lens.viz._views import View as View
from metaopt_lens.viz._views import attention_view as attention_view
from metaopt_lens.viz._views import token_view as token_view

__all__ = [
    "View",
    "attention_view",
    "comparison_map",
    "depth_profile",
    "effects_map",
    "head_map",
    "head_means",
    "head_table",
    "token_view",
    "write_comparison_outputs",
    "write_comparison_page",
    "write_outputs",
    "write_page",
    "write_report",
]
