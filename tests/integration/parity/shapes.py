"""Random small models of the DeepSeek family, built with transformers: what the parity tests compare with."""
import math

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM


def yarn(rng):
    """YaRN with a ramp that lies inside the few frequencies of a small head."""
    original = rng.choice([24, 32, 40])
    scaling = {
        "rope_type": "yarn",
        "factor": float(rng.choice([4, 8, 40])),
        "original_max_position_embeddings": original,
        "beta_fast": rng.choice([2.0, 4.0, 32.0]),
        "beta_slow": 1.0,
    }
    kind = rng.randrange(3)
    if kind == 0:
        scaling.update(mscale=1.0, mscale_all_dim=1.0)  # as V3 has it
    elif kind == 1:
        scaling.update(mscale=0.707, mscale_all_dim=0.5)  # cos and sin are scaled too
    else:
        scaling.update(mscale_all_dim=0.707)
    return scaling


def attention(rng, q_lora):
    heads = rng.randint(2, 5)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([20, 24, 36]) if q_lora else None,
        "kv_lora_rank": rng.choice([16, 24, 40]),
        "qk_nope_head_dim": rng.choice([8, 12, 24]),
        "qk_rope_head_dim": rng.choice([4, 8, 16]),
        "v_head_dim": rng.choice([8, 16, 20]),
    }


def common(rng, use_yarn):
    rope = yarn(rng) if use_yarn else {"rope_type": "default"}
    rope["rope_theta"] = rng.choice([10000.0, 50000.0])
    layers = rng.randint(2, 4)
    return {
        "vocab_size": rng.randint(60, 150),
        "intermediate_size": rng.choice([40, 72, 96]),
        "moe_intermediate_size": rng.choice([12, 20, 24]),
        "num_hidden_layers": layers,
        "first_k_dense_replace": rng.randint(0, layers - 1),
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "attn_implementation": "eager",
        "pad_token_id": None,
    }


def draw_v3(rng, q_lora, use_yarn, groups, shared):
    """A DeepseekV3Config: sigmoid affinities, biases, groups of experts when asked for."""
    n_group = rng.choice([2, 4]) if groups else 1
    topk_group = rng.randint(1, n_group - 1) if groups else 1
    experts = n_group * rng.randint(3, 5) if groups else rng.choice([6, 9, 16])
    return DeepseekV3Config(
        **common(rng, use_yarn),
        **attention(rng, q_lora),
        hidden_size=rng.choice([36, 48, 64]),
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(2, min(4, experts // n_group * topk_group)),
        n_shared_experts=shared,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=rng.choice([1.0, 2.446, 2.5]),
        norm_topk_prob=rng.random() < 0.75,
        tie_word_embeddings=rng.random() < 0.25,
    )


def draw_v2(rng, q_lora, use_yarn, groups):
    """A DeepseekV2Config: softmax affinities, no bias, groups chosen by their best expert."""
    n_group = rng.choice([2, 4]) if groups else 1
    parts = attention(rng, q_lora)
    return DeepseekV2Config(
        **common(rng, use_yarn),
        **parts,
        hidden_size=12 * parts["num_attention_heads"],
        n_routed_experts=n_group * rng.randint(3, 5) if groups else rng.choice([6, 9, 16]),
        num_experts_per_tok=rng.randint(2, 3),
        n_shared_experts=rng.randint(1, 2),
        topk_method="group_limited_greedy" if groups else "greedy",
        n_group=n_group,
        topk_group=rng.randint(1, n_group - 1) if groups else 1,
        routed_scaling_factor=rng.choice([1.0, 4.0]),
    )


def model_class(config):
    return DeepseekV3ForCausalLM if config.model_type == "deepseek_v3" else DeepseekV2ForCausalLM


def build(config, generator):
    """A model whose activations are of order one everywhere, with routing biases far from zero."""
    model = model_class(config)(config).eval().float()

    def normal(tensor, std, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                normal(p, 0.2, 1.0)
            elif "embed_tokens" in name:
                normal(p, 1.0 / math.sqrt(p.shape[-1]) if config.tie_word_embeddings else 1.0)
            else:
                normal(p, 1.0 / math.sqrt(max(p.shape[-1], 1)))  # without shared experts: matrices [hidden, 0]
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                normal(buffer, 0.3)
    return model


def routing_margin(model, ids):
    """How far the closest call of any router is from going the other way: sums of another order may flip a tie."""
    margins, hooks = [], []

    def gap(values, k):
        ranked = values.sort(dim=-1, descending=True).values
        return (ranked[..., k - 1] - ranked[..., k]).min().item() if ranked.shape[-1] > k else math.inf

    def watch(router, _, output):
        logits = output[0].double()
        if hasattr(router, "e_score_correction_bias"):
            scores = logits.sigmoid() + router.e_score_correction_bias.double()
            best = 2
        else:
            scores, best = logits.softmax(-1), 1
        groups = router.num_group or 1
        if groups > 1:
            grouped = scores.view(scores.shape[0], groups, -1)
            by_group = grouped.topk(best, -1).values.sum(-1)
            margins.append(gap(by_group, router.topk_group))
            chosen = by_group.topk(router.topk_group, -1).indices
            mask = torch.ones_like(by_group).scatter_(1, chosen, 0).bool()
            scores = grouped.masked_fill(mask.unsqueeze(-1), -math.inf).flatten(1)
        ranked = gap(scores, router.top_k)
        margins.append(ranked if not math.isnan(ranked) else math.inf)

    for module in model.modules():
        if type(module).__name__.endswith("TopkRouter"):
            hooks.append(module.register_forward_hook(watch))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return min(margins, default=math.inf)


def draw_tokens(model, generator, sequences, length):
    """Token ids whose routing is decided clearly in float32."""
    for _ in range(50):
        ids = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
        if routing_margin(model, ids) > 1e-5:
            return ids
    raise RuntimeError("no tokens with a clear routing were found")
