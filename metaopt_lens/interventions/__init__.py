"""Changes to a model that are nothing but hooks, and the context that composes them."""

from metaopt_lens.interventions._apply import AppliedMetaGradient as AppliedMetaGradient
from metaopt_lens.interventions._intervene import intervene as intervene
from metaopt_lens.interventions._knock_out import KnockOut as KnockOut
from metaopt_lens.interventions._meta_gradient import MetaGradient as MetaGradient
from metaopt_lens.interventions._meta_gradient import meta_gradient as meta_gradient
