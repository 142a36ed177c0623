"""Every kind of line that a random model can have."""

from tests.random_models import layers, operations
from tests.random_models.draft import Feature, always, is_dense, is_float, is_image, is_sequence, is_vector, is_wide

FEATURES = (
    Feature("linear", always(is_dense), layers.linear),
    Feature("activation", always(is_float), operations.activation),
    Feature("join", lambda draft: len(draft.some(is_float)) > 1, operations.join),
    Feature("in-place", lambda draft: bool(draft.some(draft.can_write)), operations.inplace, 2),
    Feature("convolution", always(is_image), layers.convolution),
    Feature("batch norm", always(lambda value: is_vector(value) or is_image(value)), layers.batch_norm),
    Feature("dropout", always(is_float), layers.dropout),
    Feature("layer norm", always(is_dense), layers.layer_norm),
    Feature("sequential", always(is_dense), layers.sequential),
    Feature("residual", always(is_dense), layers.residual),
    Feature("attention", always(is_sequence), layers.attention),
    Feature("shared module", lambda draft: bool(layers.callable_again(draft)), layers.shared_module, 3),
    Feature("tied modules", layers.can_tie, layers.tied_modules, 6),
    Feature("used parameter", layers.can_tie, layers.used_parameter, 6),
    Feature("parameter", always(is_float), layers.own_parameter),
    Feature("buffer", always(is_float), layers.buffer),
    Feature("concatenate", always(is_float), operations.concatenate),
    Feature("mean", always(lambda value: is_sequence(value) or is_image(value)), operations.mean),
    Feature("flatten", always(lambda value: operations.can_flatten(value) and value.contiguous), operations.view),
    Feature("transpose", always(is_sequence), operations.transpose),
    Feature("slice", always(is_wide), operations.slice_view),
    Feature("unsqueeze", always(is_vector), operations.unsqueeze),
    Feature("tuple", always(is_wide), operations.chunk),
    Feature("tuple with integers", always(lambda value: is_vector(value) and is_wide(value)), operations.topk),
    Feature("integer", always(is_vector), operations.argmax),
    Feature("embedding", always(layers.is_index), layers.embedding, 3),
    Feature("mask", always(is_float), operations.mask),
    Feature("masked fill", lambda draft: bool(operations.masked(draft)), operations.masked_fill, 3),
    Feature("size", always(is_float), operations.size),
    Feature(
        "reshape by size",
        lambda draft: bool(draft.some(operations.can_flatten) and draft.some(operations.is_size)),
        operations.reshape,
        6,
    ),
    Feature("detach", always(lambda value: is_float(value) and value.grad), operations.detach),
)
"""Every kind of line, the plain ones first: what a failure shrinks to."""
