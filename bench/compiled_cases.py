"""The operators of `dsv3 bench op` as a PyTorch user would write them for torch.compile; used by op_compiled.py.

CASES maps an operator's name to a function (dims, make) -> Case. `make` draws inputs: make.normal(sizes), make.floats(sizes)
(FP32), make.integers(sizes, below), each with grad=True for a leaf. Sizes come from `dsv3 bench op --dry-run`, so that both
programs time the same shapes.
"""
import dataclasses
from typing import Callable, Optional

import torch
import torch.nn.functional as F

EPS = 1e-6
CHUNK = 1 << 27  # elements of one tensor in the optimizer's lists


@dataclasses.dataclass
class Case:
    function: Optional[Callable] = None  # compiled (once for all sets: no lambda) and called with `inputs`
    inputs: tuple = ()
    leaves: tuple = ()  # their gradients are what is timed, when there are any
    upstream: Optional[tuple] = None  # gradients of the outputs; None: the output is a scalar, forward and backward are timed
    several: Optional[Callable] = None  # instead of `function`: given `compile`, makes a run of several compiled calls


def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def add_rms_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def norm_inputs(d, make, grad):
    x = make.normal((d["T"], d["stride"]))[:, :d["D"]]
    weight = make.normal((d["D"],), grad=grad)
    return x.detach().requires_grad_(grad), weight


def rms_norm_forward(d, make):
    return Case(rms_norm, norm_inputs(d, make, False))


def rms_norm_backward(d, make):
    inputs = norm_inputs(d, make, True)
    return Case(rms_norm, inputs, inputs, (make.normal((d["T"], d["D"])),))


def rms_norm_residual_forward(d, make):
    x, weight = norm_inputs(d, make, False)
    return Case(add_rms_norm, (x, make.normal(x.shape), weight))


def rms_norm_residual_backward(d, make):
    x, weight = norm_inputs(d, make, True)
    return Case(add_rms_norm, (x, make.normal(x.shape), weight), (x, weight), (make.normal(x.shape), make.normal(x.shape)))


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_forward(d, make):
    return Case(swiglu, (make.normal((d["T"], 2 * d["I"])),))


def swiglu_backward(d, make):
    gate_up = make.normal((d["T"], 2 * d["I"]), grad=True)
    return Case(swiglu, (gate_up,), (gate_up,), (make.normal((d["T"], d["I"])),))


def swiglu_inputs(d, make, grad):
    return make.normal((d["T"], 2 * d["I"]), grad=grad), make.floats((d["T"],), grad=grad)


def rotate(x, cos, sin, positions):
    """Interleaved pairs of the last dim of x [T, H, R], in FP32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(x.dtype)


def tables(d, make):
    angles = make.floats((d["P"], d["R"] // 2))
    return angles.cos(), angles.sin(), torch.arange(d["T"], device=angles.device) % d["P"]


def rope_query(q, cos, sin, positions, nope):
    return torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin, positions)), -1)


def rope_query_forward(d, make):
    q = make.normal((d["T"], d["H"], d["N"] + d["R"]))
    return Case(rope_query, (q, *tables(d, make), d["N"]))


def rope_query_backward(d, make):
    q = make.normal((d["T"], d["H"], d["N"] + d["R"]), grad=True)
    return Case(rope_query, (q, *tables(d, make), d["N"]), (q,), (make.normal(q.shape),))


def rope_key(kv, k_rope, cos, sin, positions, nope):
    shared = rotate(k_rope[:, None], cos, sin, positions).expand(-1, kv.shape[1], -1)
    return torch.cat((kv[..., :nope], shared), -1), kv[..., nope:]


def key_inputs(d, make, grad):
    kv = make.normal((d["T"], d["H"], d["N"] + d["Vd"]), grad=grad)
    return kv, make.normal((d["T"], d["R"]), grad=grad)


def rope_key_alone(*inputs):
    return rope_key(*inputs)[0]  # the values are a view that costs nothing


def rope_key_forward(d, make):
    return Case(rope_key_alone, (*key_inputs(d, make, False), *tables(d, make), d["N"]))


def rope_key_backward(d, make):
    leaves = key_inputs(d, make, True)
    upstream = (make.normal((d["T"], d["H"], d["N"] + d["R"])), make.normal((d["T"], d["H"], d["Vd"])))
    return Case(rope_key, (*leaves, *tables(d, make), d["N"]), leaves, upstream)


def table_rows(table, ids):
    return F.embedding(ids, table)


def embedding_forward(d, make):
    return Case(table_rows, (make.normal((d["V"], d["D"])), make.integers((d["T"],), d["V"])))


def embedding_backward(d, make):
    table = make.normal((d["V"], d["D"]), grad=True)
    ids = make.integers((d["T"],), d["V"])
    return Case(table_rows, (table, ids), (table,), (make.normal((d["T"], d["D"])),))


def mean_loss(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def cross_entropy(d, make):
    logits = make.normal((d["T"], d["V"]), grad=True)
    labels = make.integers((d["T"],), d["V"]).long()
    return Case(mean_loss, (logits, labels), (logits,))


def head_loss(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def head_cross_entropy(d, make):
    hidden, weight = make.normal((d["T"], d["D"]), grad=True), make.normal((d["V"], d["D"]), grad=True, std=0.02)
    return Case(head_loss, (hidden, weight, make.integers((d["T"],), d["V"]).long()), (hidden, weight))


def route(logits, bias, groups, topk_group, choices):
    scores = torch.sigmoid(logits)
    biased = scores.detach() + bias
    if groups > 1:
        grouped = biased.view(-1, groups, biased.shape[1] // groups)
        best = grouped.topk(2)[0].sum(-1)
        others = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(topk_group, sorted=False)[1], False)
        biased = grouped.masked_fill(others[..., None], float("-inf")).flatten(1)
    weights = scores.gather(1, biased.topk(choices)[1])
    return weights / (weights.sum(1, keepdim=True) + 1e-20) * 2.5, scores


def route_forward(d, make):
    return Case(route, (make.floats((d["T"], d["E"])), make.floats((d["E"],)) * 0.1, d["n_group"], d["topk_group"], d["K"]))


def balance(scores, sequences, choices):
    experts = scores.shape[1]
    chosen = torch.zeros_like(scores).scatter(1, scores.detach().topk(choices)[1], 1.0)
    f = chosen.view(sequences, -1, experts).mean(1) * (experts / choices)
    share = (scores / scores.sum(1, keepdim=True)).view(sequences, -1, experts).mean(1)
    return (f * share).sum()


def route_balance(logits, bias, groups, topk_group, choices, sequences):
    weights, scores = route(logits, bias, groups, topk_group, choices)
    return weights, balance(scores, sequences, choices)


def route_inputs(d, make, grad):
    return (make.floats((d["T"], d["E"]), grad=grad), make.floats((d["E"],)) * 0.1, d["n_group"], d["topk_group"], d["K"], d["B"])


def route_balance_forward(d, make):
    return Case(route_balance, route_inputs(d, make, False))


def route_balance_backward(d, make):
    inputs = route_inputs(d, make, True)
    loss_gradient = torch.full((), 1e-4, device=inputs[0].device)
    return Case(route_balance, inputs, (inputs[0],), (make.floats((d["T"], d["K"])), loss_gradient))


def gate(x, weight):
    return x.float() @ weight.t()


def gate_inputs(d, make, grad):
    return make.normal((d["T"], d["D"]), grad=grad), make.floats((d["E"], d["D"]), grad=grad)


def gate_forward(d, make):
    return Case(gate, gate_inputs(d, make, False))


def gate_backward(d, make):
    inputs = gate_inputs(d, make, True)
    return Case(gate, inputs, inputs, (make.floats((d["T"], d["E"])),))


def order(experts, num_experts):
    """{counts, offsets, row_of, choice_of} of experts [T, K]."""
    flat = experts.flatten()
    choice_of = torch.sort(flat, stable=True)[1]
    rows = torch.arange(flat.numel(), device=flat.device)
    row_of = torch.empty_like(choice_of).scatter(0, choice_of, rows)
    counts = torch.zeros(num_experts, dtype=flat.dtype, device=flat.device).scatter_add(0, flat.long(), torch.ones_like(flat))
    return counts, counts.cumsum(0), row_of, choice_of


def distinct_experts(d, make):
    return make.floats((d["T"], d["E"])).topk(d["K"])[1].int()


def make_permutation(d, make):
    return Case(order, (distinct_experts(d, make), d["E"]))


def permutation(d, make):
    _, _, row_of, choice_of = order(distinct_experts(d, make), d["E"])
    return row_of.view(d["T"], d["K"]), choice_of // d["K"]


def padded_order(experts, num_experts, rows):
    """(row_of, choice_of) with each expert's rows at a multiple of 128; -1 for padding."""
    counts, _, row_of, _ = order(experts, num_experts)
    extra = (counts + 127) // 128 * 128 - counts
    row_of = row_of + (extra.cumsum(0) - extra)[experts.flatten()]
    choices = torch.arange(row_of.numel(), device=row_of.device)
    return row_of, torch.full((rows,), -1, dtype=torch.long, device=row_of.device).scatter(0, row_of, choices)


def make_permutation_padded(d, make):
    return Case(padded_order, (distinct_experts(d, make), d["E"], d["Rows"]))


def padded_rows(x, choice_of, choices):
    return torch.where(choice_of[:, None] >= 0, x[choice_of.clamp(min=0) // choices], 0)


def permute_padded(d, make):
    choice_of = padded_order(distinct_experts(d, make), d["E"], d["Rows"])[1]
    return Case(padded_rows, (make.normal((d["T"], d["D"])), choice_of, d["K"]))


def gather_rows(x, token_of):
    return x[token_of]


def permute_forward(d, make):
    return Case(gather_rows, (make.normal((d["T"], d["D"])), permutation(d, make)[1]))


def gather_scaled(x, scales, token_of):
    return x[token_of], scales[:, token_of]


def permute_fp8_forward(d, make):
    x = make.normal((d["T"], d["D"])).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = make.floats(((d["D"] + 127) // 128, d["T"]))
    return Case(gather_scaled, (x, scales, permutation(d, make)[1]))


def permute_backward(d, make):
    x = make.normal((d["T"], d["D"]), grad=True)
    return Case(gather_rows, (x, permutation(d, make)[1]), (x,), (make.normal((d["T"] * d["K"], d["D"])),))


def combine(rows, weights, row_of, base):
    return (base.float() + (rows[row_of].float() * weights[..., None]).sum(1)).to(rows.dtype)


def combine_inputs(d, make, grad):
    return make.normal((d["T"] * d["K"], d["D"]), grad=grad), make.floats((d["T"], d["K"]), grad=grad)


def combine_forward(d, make):
    return Case(combine, (*combine_inputs(d, make, False), permutation(d, make)[0], make.normal((d["T"], d["D"]))))


def combine_backward(d, make):
    leaves = combine_inputs(d, make, True)
    base = make.normal((d["T"], d["D"]))
    return Case(combine, (*leaves, permutation(d, make)[0], base), leaves, (make.normal((d["T"], d["D"])),))


def square_sum(x):
    return x.float().square().sum()


def clip_factor(sums):
    return (1.0 / (torch.stack(sums).sum().sqrt() + 1e-6)).clamp(max=1.0)


def adamw_chunk(weight, gradient, exp_avg, exp_avg_sq, factor):
    g = gradient.float() * factor
    m = exp_avg.float().lerp(g, 0.1)
    v = exp_avg_sq.float().lerp(g * g, 0.05)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    weight.copy_(weight.float() * (1 - 1e-4 * 0.1) - 1e-4 * m / (v.sqrt() + 1e-8))


def flat_buckets(d, make):
    """(weights, gradients, exp_avg, exp_avg_sq), each a list of chunks of a flat bucket."""
    std = 0.5 / d["n"] ** 0.5
    buckets = [make.normal((d["n"],), std=s) for s in (0.02, std, std, std)]
    buckets[3].square_()
    return [bucket.split(CHUNK) for bucket in buckets]


def norm_of(gradients, compile):
    return compile(clip_factor)([compile(square_sum)(gradient) for gradient in gradients])


def update_all(buckets, factor, compile):
    for chunk in zip(*buckets):
        compile(adamw_chunk)(*chunk, factor)


def gradient_norm(d, make):
    gradients = make.normal((d["n"],), std=0.5 / d["n"] ** 0.5).split(CHUNK)
    return Case(several=lambda compile: lambda: norm_of(gradients, compile))


def adamw(d, make):
    buckets, one = flat_buckets(d, make), torch.ones((), device=make.device)
    return Case(several=lambda compile: lambda: update_all(buckets, one, compile))


def optimizer_step(d, make):
    buckets = flat_buckets(d, make)
    return Case(several=lambda compile: lambda: update_all(buckets, norm_of(buckets[1], compile), compile))


def normal_fill(d, make):
    like = make.normal((d["n"],))
    return Case(torch.randn_like, (like,))


CASES = {name: function for name, function in list(globals().items())
         if callable(function) and name.endswith(("_forward", "_backward"))}
CASES |= {"rms_norm_latent_forward": rms_norm_forward, "rms_norm_latent_backward": rms_norm_backward,
          "cross_entropy": cross_entropy, "head_cross_entropy": head_cross_entropy, "make_permutation": make_permutation,
          "make_permutation_padded": make_permutation_padded, "permute_padded": permute_padded, "gradient_norm": gradient_norm,
          "adamw": adamw, "optimizer_step": optimizer_step, "normal_fill": normal_fill}
