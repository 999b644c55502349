"""Changes to a model that are nothing but hooks, and the context that composes them."""

from metaopt_lens.interventions._intervene import intervene as intervene
