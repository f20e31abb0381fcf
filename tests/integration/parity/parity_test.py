#!/usr/bin/env python3
"""Holds dsv3 against transformers: logits, loss and every parameter's gradient of random small models, in FP32.

Usage: parity_test.py --dump PATH/parity_dump --dsv3 PATH/dsv3 [--seed N] [--cases N] [--only TEXT]

Exit code 77 (a skip) with its reason when transformers is absent. The last line is the total.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

BAR = 1e-5  # relative error in the norm (DESIGN §6)

try:
    import torch
    import transformers
    from safetensors.torch import load_file
    import shapes
except ImportError as error:
    print(f"skipped: Python here has no {error.name} (scripts/setup.sh --tests installs it)")
    sys.exit(77)


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise AssertionError(f"{Path(command[0]).name} exited with {done.returncode}: {done.stderr.strip().splitlines()[:3]}")
    return done


def relative_error(ours, theirs):
    norm = theirs.double().norm().item()
    difference = (ours.double() - theirs.double()).norm().item()
    return difference if norm == 0 else difference / norm


def released_gradients(model):
    """Every gradient under the name and shape that the checkpoint has; the stacked experts are taken apart."""
    gradients = {}
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(grad):
                gate, up = both.chunk(2, dim=0)
                base = name.removesuffix("gate_up_proj")
                gradients[f"{base}{expert}.gate_proj.weight"] = gate
                gradients[f"{base}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, one in enumerate(grad):
                gradients[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = one
        else:
            gradients[name] = grad
    return gradients


def check(errors, what):
    worst = max(errors, key=errors.get)
    print(f"    {what}: {len(errors)} compared, worst {errors[worst]:.2e} ({worst})")
    bad = {name: error for name, error in errors.items() if not error <= BAR}
    if bad:
        listed = ", ".join(f"{name} {error:.2e}" for name, error in sorted(bad.items(), key=lambda x: -x[1])[:8])
        raise AssertionError(f"{what}: {len(bad)} above {BAR:g}: {listed}")


def compare_training(config, seed, args, folder):
    """Loss, logits and gradients through parity_dump; then our export back into transformers."""
    generator = torch.Generator().manual_seed(seed)
    model = shapes.build(config, generator)
    length = random.Random(seed).randint(65, 120)
    ids = shapes.draw_tokens(model, generator, 2, length)
    model.save_pretrained(folder / "model")
    (folder / "tokens.json").write_text(json.dumps({"num_sequences": 2, "tokens": ids.flatten().tolist()}))
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()

    run([args.dump, folder / "model", folder / "tokens.json", folder / "ours.safetensors", folder / "export"])
    ours = load_file(folder / "ours.safetensors")
    logits = output.logits.detach().flatten(0, 1)
    check({"logits": relative_error(ours["logits"], logits), "loss": relative_error(ours["loss"], output.loss)},
          f"T = 2 × {length}, logits and loss")
    gradients = released_gradients(model)
    if missing := set(gradients) ^ {n.removeprefix("grad.") for n in ours if n.startswith("grad.")}:
        raise AssertionError(f"gradients on one side only: {sorted(missing)[:5]}")
    check({n: relative_error(ours["grad." + n], g) for n, g in gradients.items()}, "gradients")

    again, info = type(model).from_pretrained(
        folder / "export", dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
    if info["missing_keys"] or info["mismatched_keys"]:
        raise AssertionError(f"our export does not load in transformers: {info}")
    with torch.no_grad():
        check({"logits": relative_error(again.eval()(input_ids=ids).logits, output.logits)}, "export, loaded again")


def compare_logits(config, seed, args, folder, dtype=torch.float32):
    """`dsv3 eval DIR --tokens … --logits …` on a directory as transformers saves it, run in FP32 on both sides."""
    generator = torch.Generator().manual_seed(seed)
    shapes.build(config, generator).to(dtype).save_pretrained(folder / "model")
    model = shapes.model_class(config).from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    ids = shapes.draw_tokens(model, generator, 1, random.Random(seed).randint(65, 120))
    (folder / "tokens.json").write_text(json.dumps(ids[0].tolist()))
    run([args.dsv3, "eval", folder / "model", "--tokens", folder / "tokens.json",
         "--logits", folder / "logits.safetensors", "--dtype", "fp32"])
    ours = load_file(folder / "logits.safetensors")["logits"]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits[0]
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape, (ours.dtype, ours.shape)
    check({"logits": relative_error(ours, theirs)}, f"dsv3 eval --logits, T = {ids.shape[1]}")


def refuse_wrong_ids(_, seed, args, folder):
    """Ids that no vocabulary holds, and lists that are none, are refused with one sentence and exit code 2."""
    config = shapes.draw_v3(random.Random(seed), False, False, False, 1)
    shapes.build(config, torch.Generator().manual_seed(seed)).save_pretrained(folder / "model")
    for ids, part in (([0, config.vocab_size], "vocabulary"), ([-1], "vocabulary"), ({}, "list"), ([], "no token"),
                      ([1.5], "whole number"), (["a"], "whole number"), ([1 << 40], "vocabulary")):
        (folder / "tokens.json").write_text(json.dumps(ids))
        done = subprocess.run([args.dsv3, "eval", folder / "model", "--tokens", folder / "tokens.json", "--logits",
                               folder / "logits.safetensors"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and part in done.stderr and "tokens.json" in done.stderr, (ids, done)
        assert not (folder / "logits.safetensors").exists()


def cases(rng, count):
    """(name, function, config): the fixed kinds first, then shapes drawn freely."""
    train = [
        ("v3: q_lora, YaRN, groups with biases", shapes.draw_v3(rng, True, True, True, 1)),
        ("v3: full-rank q, no YaRN, one group, two shared experts", shapes.draw_v3(rng, False, False, False, 2)),
        ("v2: softmax, group_limited_greedy, YaRN", shapes.draw_v2(rng, True, True, True)),
        ("v2: softmax, greedy, full-rank q", shapes.draw_v2(rng, False, False, False)),
    ]
    for i in range(count):
        flags = [rng.random() < 0.5 for _ in range(3)]
        train.append((f"v3: drawn freely {i + 1}", shapes.draw_v3(rng, *flags, rng.randint(1, 2))))
    listed = [(name, compare_training, config) for name, config in train]
    logits = [
        ("eval: Moonlight-like", shapes.draw_v3(rng, False, False, False, 2)),
        ("eval: V3-like with YaRN", shapes.draw_v3(rng, True, True, True, 1)),
        ("eval: V2-Lite-like", shapes.draw_v2(rng, False, True, False)),
        ("eval: no shared experts", shapes.draw_v3(rng, True, False, True, 0)),
    ]
    listed += [(name, compare_logits, config) for name, config in logits]
    listed.append(("eval: BF16 weights",
                   lambda *a: compare_logits(*a, dtype=torch.bfloat16), shapes.draw_v3(rng, True, True, True, 1)))
    listed.append(("eval: wrong ids", refuse_wrong_ids, None))
    return listed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", type=Path, required=True)
    parser.add_argument("--dsv3", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    passed = failed = 0
    for number, (name, function, config) in enumerate(cases(random.Random(args.seed), args.cases)):
        if args.only not in name:
            continue
        print(f"  {name}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                function(config, args.seed + number, args, Path(folder))
            passed += 1
        except Exception as error:  # one broken case must not hide the others
            failed += 1
            print(f"  FAILED {name} (seed {args.seed}): {error}")
            if not isinstance(error, AssertionError):
                traceback.print_exc(file=sys.stdout)
            if config is not None:
                print("  " + json.dumps(config.to_diff_dict(), default=str))
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
