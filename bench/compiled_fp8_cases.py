"""FP8, fused and split forms of the operators for torch.compile; a part of compiled_cases.py.

Tiles as users write them: amax of each tile in FP32, codes = x · 448 / amax in float8_e4m3fn, scales = amax / 448.
"""
import torch
import torch.nn.functional as F

from compiled_cases import CASES, Case, distinct_experts, rms_norm, rotate, swiglu_inputs, tables

TILE, LARGEST = 128, 448.0


def quantized(tiles, dims):
    amax = tiles.abs().amax(dims, keepdim=True).float().clamp(min=1e-12)
    return (tiles.float() * (LARGEST / amax)).to(torch.float8_e4m3fn), amax / LARGEST


def rows(x):
    missing = -x.shape[1] % TILE
    return quantized((F.pad(x, (0, missing)) if missing else x).unflatten(1, (-1, TILE)), 2)


def columns(x):
    """Transposed, tokens padded to whole tiles."""
    missing = -x.shape[0] % TILE
    whole = F.pad(x, (0, 0, 0, missing)) if missing else x
    codes, scales = quantized(whole.unflatten(0, (-1, TILE)), 1)
    return codes.flatten(0, 1).t().contiguous(), scales


def both(x):
    return (*rows(x), *columns(x))


def blocks(x):
    return quantized(x.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)), (1, 3))


def dequantized(codes, scales, like):
    return (codes.float() * scales).flatten(1).to(like.dtype)


def requantized(codes, scales):
    return columns((codes.float() * scales).flatten(1))


def one_matrix(function):
    return lambda d, make: Case(function, (make.normal((d["T"], d["D"])),))


def requantize_columns(d, make):
    return Case(requantized, rows(make.normal((d["T"], d["D"]))))


def dequantize_rows(d, make):
    x = make.normal((d["T"], d["D"]))
    return Case(dequantized, (*rows(x), x[:0]))


def grouped(x, destinations, padded):
    return both(torch.zeros((padded, x.shape[1]), dtype=x.dtype, device=x.device).index_copy(0, destinations, x))


def quantize_grouped(d, make):
    experts = distinct_experts({**d, "T": d["T"] // d["K"]}, make).flatten().long()
    counts = torch.zeros(d["E"], dtype=torch.long, device=experts.device).scatter_add(0, experts, torch.ones_like(experts))
    extra = (counts + 127) // 128 * 128 - counts
    row = torch.arange(d["T"], device=experts.device)
    return Case(grouped, (make.normal((d["T"], d["D"])), row + (extra.cumsum(0) - extra)[experts.sort()[0]], d["Tp"]))


def cache_bf16(cache, latent, rope, slots):
    cache.index_copy_(0, slots, torch.cat((latent, rope), 1).bfloat16())


def cache_fp8(cache, latent, rope, slots):
    codes, scales = rows(latent)
    parts = (codes.flatten(1).view(torch.uint8), scales.flatten(1).view(torch.uint8), rope.bfloat16().view(torch.uint8))
    cache.index_copy_(0, slots, torch.cat(parts, 1))


def cache_inputs(d, make, width, dtype):
    cache = torch.zeros((d["T"], width), dtype=dtype, device=make.device)
    return cache, make.normal((d["T"], d["C"])), make.normal((d["T"], d["R"])), torch.randperm(d["T"], device=make.device)


def latent_cache_write_bf16(d, make):
    return Case(cache_bf16, cache_inputs(d, make, d["C"] + d["R"], torch.bfloat16))


def latent_cache_write_fp8(d, make):
    return Case(cache_fp8, cache_inputs(d, make, d["C"] + 4 * (d["C"] // TILE) + 2 * d["R"], torch.uint8))


def norm_rows(x, weight):
    return rows(rms_norm(x, weight))


def rms_norm_fp8_forward(d, make):
    return Case(norm_rows, (make.normal((d["T"], d["D"])), make.normal((d["D"],))))


def norm_pair(x, first, second):
    return rms_norm(x, first), rms_norm(x, second)


def pair_inputs(d, make, grad):
    return make.normal((d["T"], d["D"]), grad=grad), make.normal((d["D"],), grad=grad), make.normal((d["D"],), grad=grad)


def rms_norm_pair_forward(d, make):
    return Case(norm_pair, pair_inputs(d, make, False))


def rms_norm_pair_backward(d, make):
    leaves = pair_inputs(d, make, True)
    return Case(norm_pair, leaves, leaves, (make.normal((d["T"], d["D"])), make.normal((d["T"], d["D"]))))


def weighted(gate_up, row_weight):
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) * up * row_weight[:, None]).to(gate_up.dtype)


def swiglu_weighted_forward(d, make):
    return Case(weighted, swiglu_inputs(d, make, False))


def swiglu_weighted_backward(d, make):
    leaves = swiglu_inputs(d, make, True)
    return Case(weighted, leaves, leaves, (make.normal((d["T"], d["I"])),))


def weighted_both(gate_up, row_weight):
    return both(weighted(gate_up, row_weight))


def weighted_gradient_both(gate_up, row_weight, dy):
    """The gradient by its formula, so that one graph holds it and its quantisation."""
    gate, up = (part.float() for part in gate_up.chunk(2, -1))
    s, g = torch.sigmoid(gate), dy.float()
    share = (g * gate * s * up).sum(1)
    g = g * row_weight[:, None]
    dgate, dup = g * up * s * (1 + gate * (1 - s)), g * gate * s
    return (*both(torch.cat((dgate, dup), 1).to(gate_up.dtype)), share)


def swiglu_fp8_forward(d, make):
    return Case(weighted_both, swiglu_inputs(d, make, False))


def swiglu_fp8_backward(d, make):
    return Case(weighted_gradient_both, (*swiglu_inputs(d, make, False), make.normal((d["T"], d["I"]))))


def rotate_in_place(q, cos, sin, positions, nope):
    part = q[..., nope:]
    part.copy_(rotate(part, cos, sin, positions))


def rope_query_in_place(d, make):
    return Case(rotate_in_place, (make.normal((d["T"], d["H"], d["N"] + d["R"])), *tables(d, make), d["N"]))


def statistics(logits, labels):
    values = logits.float()
    largest, argmax = values.max(1, keepdim=True)
    return largest, argmax, (values - largest).exp().sum(1), logits.gather(1, labels)


def finish(logits, labels, largest, total, scale):
    values = logits.float()
    losses = total.log() + largest - values.gather(1, labels)
    onehot = torch.arange(logits.shape[1], device=logits.device) == labels
    logits.copy_(((values - largest).exp() / total - onehot.float()) * scale)
    return losses


def part_inputs(d, make):
    return make.normal((d["T"], d["V"])), make.integers((d["T"], 1), d["V"]).long()


def cross_entropy_statistics(d, make):
    return Case(statistics, part_inputs(d, make))


def cross_entropy_finish(d, make):
    logits, labels = part_inputs(d, make)
    largest, _, total, _ = statistics(logits, labels)
    return Case(finish, (logits, labels, largest, total[:, None] * d["parts"], torch.full((), 1 / d["T"], device=logits.device)))


def adamw_formula(weight, gradient, exp_avg, exp_avg_sq):
    """New FP32 weight; moments in place."""
    g = gradient.float()
    m, v = exp_avg.float().lerp(g, 0.1), exp_avg_sq.float().lerp(g * g, 0.05)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    return weight.float() * (1 - 1e-4 * 0.1) - 1e-4 * m / (v.sqrt() + 1e-8)


def master_step(weight, master, gradient, exp_avg, exp_avg_sq):
    new = adamw_formula(master, gradient, exp_avg, exp_avg_sq)
    master.copy_(new)
    weight.copy_(new)


def fp8_step(weight, master, gradient, exp_avg, exp_avg_sq):
    master_step(weight, master, gradient, exp_avg, exp_avg_sq)
    return blocks(F.pad(master, (0, 0, 0, -master.shape[0] % TILE)))


def rounded_at_random(x):
    """FP32 to BF16 with random bits below the last kept one."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32)


def stochastic_step(weight, gradient, exp_avg, exp_avg_sq, ema):
    new = adamw_formula(weight, gradient, exp_avg, exp_avg_sq)
    weight.copy_(rounded_at_random(new))
    ema.copy_(ema.float().lerp(weight.float(), 1e-3))


def buckets(make, sizes, dtypes):
    values = [make.normal(sizes, std=std, dtype=dtype) for std, dtype in zip((0.02, 0.02, 1e-4, 1e-4, 1e-4), dtypes)]
    values[-1].square_()
    return values


def adamw_master(d, make):
    return Case(master_step, tuple(buckets(make, (d["n"],), (torch.bfloat16, *[torch.float32] * 4))))


def adamw_fp8(d, make):
    return Case(fp8_step, tuple(buckets(make, (d["n"] // d["D"], d["D"]), (torch.bfloat16, *[torch.float32] * 4))))


def adamw_stochastic(d, make):
    weight, ema, gradient, exp_avg, exp_avg_sq = buckets(make, (d["n"],), [torch.bfloat16] * 5)
    return Case(stochastic_step, (weight, gradient, exp_avg, exp_avg_sq, ema))


CASES |= {"quantize_rows": one_matrix(rows), "quantize_columns": one_matrix(columns), "quantize_both": one_matrix(both),
          "quantize_blocks": one_matrix(blocks)}
CASES |= {f.__name__: f for f in (
    requantize_columns, dequantize_rows, quantize_grouped, latent_cache_write_bf16, latent_cache_write_fp8, rms_norm_fp8_forward,
    rms_norm_pair_forward, rms_norm_pair_backward, swiglu_weighted_forward, swiglu_weighted_backward, swiglu_fp8_forward,
    swiglu_fp8_backward, rope_query_in_place, cross_entropy_statistics, cross_entropy_finish, adamw_master, adamw_fp8,
    adamw_stochastic)}
