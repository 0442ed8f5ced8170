"""The method's formulas as pure functions of tensors, for training loops that are not fastapd's.

Axes are the research code's: activations, scores and masks [batch, n_instances, ...], factors [n_instances, C, d_in, m]
and [n_instances, C, m, d_out], losses [n_instances]; without instances that axis is absent everywhere. The work is done
by `fastapd.ops`, which has the instance axis first and gets permuted views. All arguments of a call are of one floating
dtype, which is that of the result; autocast changes nothing.

Where a function says *layers*, it takes one tensor, a list with one tensor for each layer, or a mapping by name; all of
its arguments of that kind have the same layers.
"""

from fastapd.functional._attributions import ablation_attributions as ablation_attributions
from fastapd.functional._attributions import activation_attributions as activation_attributions
from fastapd.functional._attributions import grad_attributions as grad_attributions
from fastapd.functional._attributions import output_gradients as output_gradients
from fastapd.functional._layer import component_weights as component_weights
from fastapd.functional._layer import masked_linear as masked_linear
from fastapd.functional._losses import faithfulness_loss as faithfulness_loss
from fastapd.functional._losses import lp_sparsity_loss as lp_sparsity_loss
from fastapd.functional._losses import lp_weights as lp_weights
from fastapd.functional._losses import param_match_loss as param_match_loss
from fastapd.functional._losses import schatten_loss as schatten_loss
from fastapd.functional._masks import batch_topk_mask as batch_topk_mask
from fastapd.functional._masks import topk_mask as topk_mask
from fastapd.functional._reconstruction import act_recon_loss as act_recon_loss
from fastapd.functional._reconstruction import recon_kl as recon_kl
from fastapd.functional._reconstruction import recon_mse as recon_mse
from fastapd.functional._step import lr_schedule as lr_schedule
from fastapd.functional._step import tangent_gradient_ as tangent_gradient_
from fastapd.functional._step import unit_norm_ as unit_norm_
from fastapd.ops import component_sum as component_sum

__all__ = [
    "ablation_attributions",
    "act_recon_loss",
    "activation_attributions",
    "batch_topk_mask",
    "component_sum",
    "component_weights",
    "faithfulness_loss",
    "grad_attributions",
    "lp_sparsity_loss",
    "lp_weights",
    "lr_schedule",
    "masked_linear",
    "output_gradients",
    "param_match_loss",
    "recon_kl",
    "recon_mse",
    "schatten_loss",
    "tangent_gradient_",
    "topk_mask",
    "unit_norm_",
]
