"""Trains transformers' DeepseekV3 with the shapes of one of our configs: the other side of our comparisons.

Usage: python bench/hf_train.py RESOLVED.yaml [--steps N | --minutes M] [--dtype fp32|bf16] [--experts MODE] [--compile]
                                [--text FILE] [--device cpu|cuda]
RESOLVED.yaml is what `dsv3 config CONFIG` prints. Without --text the tokens are random: then only the speed means
something. With --text (a verse a line, every validation_every-th held out) the same bytes are learnt as ours, with the same
batch, learning-rate schedule and AdamW settings, and bits per byte on the held-out lines are printed at the end.
Prints one JSON line per report, the last one with "final": true.
"""
import argparse
import json
import math
import os
import statistics
import time

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
import yaml
from transformers import AutoModelForCausalLM, DeepseekV3Config

END_OF_DOCUMENT = 256


def hf_config(model, vocab_size):
    mla, moe = model["mla"], model["moe"]
    return DeepseekV3Config(
        vocab_size=vocab_size, hidden_size=model["hidden_size"], intermediate_size=model["intermediate_size"],
        moe_intermediate_size=moe["moe_intermediate_size"], num_hidden_layers=model["num_layers"],
        num_attention_heads=mla["num_heads"], num_key_value_heads=mla["num_heads"], n_shared_experts=moe["num_shared_experts"],
        n_routed_experts=moe["num_experts"], num_experts_per_tok=moe["num_experts_per_token"],
        routed_scaling_factor=moe["routed_scaling_factor"], q_lora_rank=mla["q_lora_rank"] or None, n_group=moe["n_group"],
        topk_group=moe["topk_group"], kv_lora_rank=mla["kv_lora_rank"], qk_nope_head_dim=mla["qk_nope_head_dim"],
        qk_rope_head_dim=mla["qk_rope_head_dim"], v_head_dim=mla["v_head_dim"], first_k_dense_replace=moe["first_k_dense_replace"],
        norm_topk_prob=moe["norm_topk_prob"], max_position_embeddings=8192, rms_norm_eps=model["rms_norm_eps"],
        initializer_range=model["initializer_range"], tie_word_embeddings=model["tie_word_embeddings"], use_cache=False,
        rope_scaling=None)


def flops_per_token(c, sequence_length):
    d, h, qk = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    q = d * h * qk if c.q_lora_rank is None else d * c.q_lora_rank + c.q_lora_rank * h * qk
    attention = (q + d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
                 + h * c.v_head_dim * d)
    moe = 3 * d * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts) + d * c.n_routed_experts
    layers, dense = c.num_hidden_layers, c.first_k_dense_replace
    matrices = layers * attention + dense * 3 * d * c.intermediate_size + (layers - dense) * moe + d * c.vocab_size
    return 3 * (2 * matrices + layers * sequence_length * h * (qk + c.v_head_dim))


def schedule_at(pieces, step):
    """The value of one of our schedules (a number, or pieces over steps) at a step counted from 1."""
    if not isinstance(pieces, list):
        return float(pieces)
    start = 0
    for piece in pieces:
        first = piece.get("from", piece.get("value"))
        last = piece.get("to", piece.get("value"))
        length = piece.get("steps", 0)
        if not length or step < start + length:
            t = (step - start) / length if length else 1.0
            if piece["shape"] == "linear":
                return first + (last - first) * t
            return last + 0.5 * (first - last) * (1 + math.cos(math.pi * t)) if piece["shape"] == "cosine" else last
        start += length
    return last


def read_text(path, every):
    """Training stream and validation stream: each document followed by the end-of-document id."""
    streams = ([], [])
    with open(path, "rb") as file:
        for index, line in enumerate(file.read().splitlines(keepends=True)):
            held_out = every > 0 and index % every == every - 1
            streams[held_out].extend(line)
            streams[held_out].append(END_OF_DOCUMENT)
    return [torch.tensor(stream, dtype=torch.long) for stream in streams]


@torch.no_grad()
def bits_per_byte(model, stream, sequence_length, device):
    """All of the held-out stream, each token predicted once; the end-of-document token counts in the loss, not in the bytes."""
    ids = torch.cat([torch.tensor([END_OF_DOCUMENT]), stream])
    nats, step = 0.0, 16 * sequence_length
    for start in range(0, len(ids) - 1, step):
        piece = ids[start:start + step + 1]
        for offset in range(0, len(piece) - 1, sequence_length):
            x = piece[offset:offset + sequence_length + 1].to(device)
            logits = model(input_ids=x[None, :-1]).logits.float()
            nats += torch.nn.functional.cross_entropy(logits[0], x[1:], reduction="sum").item()
    return nats / math.log(2) / int((stream != END_OF_DOCUMENT).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--text")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    config = yaml.safe_load(open(args.config))
    training, optimizer_config = config["training"], config["optimizer"]
    sequence_length, micro_batch = config["data"]["sequence_length"], training["micro_batch_size"]
    global_batch = int(schedule_at(training["global_batch_size"], 1))
    shape = hf_config(config["model"], config["model"]["vocab_size"] or 264)
    shape._experts_implementation = args.experts
    torch.manual_seed(training["seed"])
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype], attn_implementation="sdpa").train()

    def loss_of(ids):
        logits = model(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    if args.compile:
        loss_of = torch.compile(loss_of, dynamic=False)
    fused = args.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(optimizer_config["beta1"], optimizer_config["beta2"]),
                                  eps=float(optimizer_config["eps"]), weight_decay=optimizer_config["weight_decay"], fused=fused or None)
    train = held_out = None
    if args.text:
        train, held_out = read_text(args.text, config["data"]["validation_every"])
    generator = torch.Generator().manual_seed(training["seed"])
    seconds, began, step = [], time.time(), 0
    while True:
        progress = (time.time() - began) / 60
        if (args.steps and step >= args.steps) or (args.minutes and progress >= args.minutes):
            break
        start, step = time.time(), step + 1
        # A run bounded by time follows the schedule by the share of the time that has gone.
        position = step if args.steps else 1 + progress / args.minutes * (training["steps"] - 1)
        for group in optimizer.param_groups:
            group["lr"] = schedule_at(optimizer_config["learning_rate"], position)
        for _ in range(global_batch // micro_batch):
            if train is None:
                ids = torch.randint(0, shape.vocab_size, (micro_batch, sequence_length + 1), generator=generator)
            else:
                first = torch.randint(0, len(train) - sequence_length, (micro_batch, 1), generator=generator)
                ids = train[first + torch.arange(sequence_length + 1)]
            ids = ids.to(args.device)
            loss = loss_of(ids)
            (loss * micro_batch / global_batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.time() - start)
        if step % 50 == 0:
            print(json.dumps(dict(step=step, loss=loss.item(), seconds=time.time() - began)), flush=True)
    steady = seconds[3:] or seconds
    rate = global_batch * sequence_length / statistics.median(steady)
    result = dict(final=True, program="transformers", dtype=args.dtype, experts=args.experts, compiled=args.compile, steps=step,
                  tokens_per_sec=round(rate, 1), tflops=round(rate * flops_per_token(shape, sequence_length) / 1e12, 4),
                  loss=loss.item(), parameters=sum(p.numel() for p in model.parameters()))
    if args.device == "cuda":
        result["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        result["mfu"] = round(result["tflops"] / 989, 4)
    if held_out is not None:
        model.eval()
        result["bits_per_byte"] = bits_per_byte(model, held_out, sequence_length, args.device)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
