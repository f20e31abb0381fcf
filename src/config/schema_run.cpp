// The keys of `parallel`, `data`, `training`, `optimizer`, `checkpoint` and `monitor`.
#include "config/schema.h"

namespace dsv3::detail {
namespace {

#define DSV3_SLOT(path) [](Config& c) -> Slot { return slot_of(c.path); }

using Names = std::string_view;

constexpr Names kDTypes[] = {"fp32", "bf16"};
constexpr Names kRecompute[] = {"none", "selective", "full"};
constexpr Names kSplits[] = {"line", "blank", "file"};
constexpr Names kDevices[] = {"auto", "cpu", "cuda"};

constexpr Range kRanks{1, 1 << 20};
constexpr Range kCount{0, 1e15};
constexpr Range kNotNegative{.min = 0, .max = 1e9};
constexpr Range kBeta{.min = 0, .max = 1, .below_max = true};

constexpr Field kRun[] = {
    {"parallel.tensor_parallel_size", DSV3_SLOT(parallel.tensor_parallel_size), "ranks",
     "tp: ranks that share each matrix; divides num_heads", kRanks},
    {"parallel.pipeline_parallel_size", DSV3_SLOT(parallel.pipeline_parallel_size), "ranks",
     "pp: ranks that share the layers", kRanks},
    {"parallel.expert_parallel_size", DSV3_SLOT(parallel.expert_parallel_size), "ranks",
     "ep: ranks that share the experts, folded over dp × tp; divides num_experts", kRanks},
    {"parallel.context_parallel_size", DSV3_SLOT(parallel.context_parallel_size), "ranks",
     "cp: ranks that share each sequence; divides sequence_length", kRanks},
    {"parallel.data_parallel_size",
     DSV3_SLOT(parallel.data_parallel_size),
     "ranks",
     "dp: replicas; 0 = number of processes / (tp · pp · cp)",
     {0, 1 << 20}},
    {"parallel.zero_stage",
     DSV3_SLOT(parallel.zero_stage),
     "",
     "ZeRO: 1 shards the optimizer's state, 2 also gradients, 3 also parameters",
     {0, 3}},

    {"data.train", DSV3_SLOT(data.train), "",
     "text, JSONL, .gz or .zst files, token shards, Megatron prefixes or globs: one path, or a "
     "list "
     "of paths or {path, weight}; weights are shares of the blend"},
    {"data.validation", DSV3_SLOT(data.validation), "",
     "the same for evaluation; empty = held out of train by validation_every"},
    {"data.validation_every", DSV3_SLOT(data.validation_every), "documents",
     "every n-th document of train is held out; 0 = none, otherwise at least 2", kCount},
    {"data.validation_overlap", DSV3_SLOT(data.validation_overlap), "tokens",
     "start of a validation sequence that only gives context to the rest and is counted in the one "
     "before; less than sequence_length",
     kCount},
    {"data.document_split",
     DSV3_SLOT(data.document_split),
     "",
     "documents of a text file: each line, each paragraph after a blank line, or the whole file",
     {},
     kSplits},
    {"data.jsonl_field", DSV3_SLOT(data.jsonl_field), "",
     "field of a JSONL line that holds the text of its document"},
    {"data.tokenizer", DSV3_SLOT(data.tokenizer), "",
     "bytes, or ids:V[:EOD] for V token ids that another program made, of which EOD ends "
     "documents"},
    {"data.sequence_length",
     DSV3_SLOT(data.sequence_length),
     "tokens",
     "S, length of a sample",
     {2, 1 << 28}},
    {"data.mask_across_documents", DSV3_SLOT(data.mask_across_documents), "",
     "attention and positions stop at document borders"},
    {"data.fim_rate",
     DSV3_SLOT(data.fim_rate),
     "",
     "share of documents rewritten as prefix, suffix, middle (report §4.1)",
     {0, 1}},
    {"data.shuffle", DSV3_SLOT(data.shuffle), "", "order of samples drawn from training.seed"},
    {"data.cache_dir", DSV3_SLOT(data.cache_dir), "",
     "directory of tokenised shards; empty = beside the run"},
    {"data.num_workers",
     DSV3_SLOT(data.num_workers),
     "threads",
     "threads of tokenisation; 0 = all cores",
     {0, 1024}},

    {"training.steps", DSV3_SLOT(training.steps), "steps", "optimizer steps", {1, 1e12}},
    {"training.micro_batch_size",
     DSV3_SLOT(training.micro_batch_size),
     "sequences",
     "sequences of one forward pass",
     {1, 1 << 24}},
    {"training.global_batch_size",
     DSV3_SLOT(training.global_batch_size),
     "sequences",
     "sequences of an optimizer step over all ranks; a multiple of micro_batch_size × dp",
     {.min = 1, .max = 1 << 24, .whole = true},
     {},
     {},
     "8, up to a multiple of micro_batch_size × dp"},
    {"training.seed",
     DSV3_SLOT(training.seed),
     "",
     "of weights, shuffling and sampling",
     {0, 9e15}},
    {"training.deterministic", DSV3_SLOT(training.deterministic), "",
     "the same bits from the same seed on the same machine"},
    {"training.recompute",
     DSV3_SLOT(training.recompute),
     "",
     "activations computed again in the backward pass: none, selective (norms, MLA up-projection, "
     "SwiGLU) or full (whole layers)",
     {},
     kRecompute},
    {"training.eval_every", DSV3_SLOT(training.eval_every), "steps",
     "steps between evaluations; 0 = only at the end", kCount},
    {"training.eval_batches", DSV3_SLOT(training.eval_batches), "micro-batches",
     "length of an evaluation; 0 = all", kCount},
    {"training.log_every",
     DSV3_SLOT(training.log_every),
     "steps",
     "steps between progress lines",
     {1, 1e15}},
    {"training.time_limit_minutes", DSV3_SLOT(training.time_limit_minutes), "minutes",
     "stop, evaluate and save after this time; 0 = no limit", kNotNegative},
    {"training.device",
     DSV3_SLOT(training.device),
     "",
     "auto takes a GPU where there is one",
     {},
     kDevices},
    {"training.num_threads",
     DSV3_SLOT(training.num_threads),
     "threads",
     "CPU threads; 0 = all cores",
     {0, 4096}},
    {"training.sample_prompt", DSV3_SLOT(training.sample_prompt), "",
     "text that the sample at the end continues"},
    {"training.sample_tokens",
     DSV3_SLOT(training.sample_tokens),
     "tokens",
     "length of that sample; 0 = none",
     {0, 1e9}},

    {"optimizer.learning_rate", DSV3_SLOT(optimizer.learning_rate), "", "step size of AdamW",
     kNotNegative},
    {"optimizer.beta1", DSV3_SLOT(optimizer.beta1), "", "decay of the first moment", kBeta},
    {"optimizer.beta2", DSV3_SLOT(optimizer.beta2), "", "decay of the second moment", kBeta},
    {"optimizer.eps",
     DSV3_SLOT(optimizer.eps),
     "",
     "added to the root of the second moment",
     {.min = 0, .max = 1e9, .above_min = true}},
    {"optimizer.weight_decay", DSV3_SLOT(optimizer.weight_decay), "",
     "decoupled, of matrices; norms and biases have none", kNotNegative},
    {"optimizer.decay_embeddings", DSV3_SLOT(optimizer.decay_embeddings), "",
     "weight decay for embedding and head too"},
    {"optimizer.clip", DSV3_SLOT(optimizer.clip), "",
     "largest global gradient norm; 0 = no clipping", kNotNegative},
    {"optimizer.master_weights", DSV3_SLOT(optimizer.master_weights), "",
     "FP32 copy of BF16 weights"},
    {"optimizer.moment_dtype",
     DSV3_SLOT(optimizer.moment_dtype),
     "",
     "type of the moments",
     {},
     kDTypes},
    {"optimizer.gradient_dtype",
     DSV3_SLOT(optimizer.gradient_dtype),
     "",
     "type in which gradients are summed",
     {},
     kDTypes},
    {"optimizer.stochastic_rounding", DSV3_SLOT(optimizer.stochastic_rounding), "",
     "round BF16 moments, and BF16 weights without masters, up or down at random instead of to "
     "nearest: small updates then count on average; the bits follow from training.seed and the "
     "step"},

    {"checkpoint.every_steps", DSV3_SLOT(checkpoint.every_steps), "steps",
     "steps between checkpoints; 0 = only at the end", kCount},
    {"checkpoint.keep_last",
     DSV3_SLOT(checkpoint.keep_last),
     "checkpoints",
     "checkpoints that are kept",
     {1, 1e9}},

    {"monitor.tensorboard", DSV3_SLOT(monitor.tensorboard), "",
     "write TensorBoard event files to RUN/tensorboard/"},
    {"monitor.wandb", DSV3_SLOT(monitor.wandb), "",
     "send metrics to Weights & Biases (scripts/wandb_bridge.py)"},
    {"monitor.prometheus", DSV3_SLOT(monitor.prometheus), "",
     "file that holds the newest metrics in Prometheus' text form; empty = none"},
    {"monitor.per_layer_every", DSV3_SLOT(monitor.per_layer_every), "steps",
     "steps between records that hold every layer's routing and every expert's tokens; 0 = none",
     kCount},
};

}  // namespace

std::span<const Field> run_fields() {
  return kRun;
}

}  // namespace dsv3::detail
