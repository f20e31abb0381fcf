#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "config/schedule.h"

// The one typed tree behind a run (DESIGN §2). Plain aggregates: default, unit and constraint
// beside each field; `config/schema.cpp` ties every field to its YAML key, and validate() checks
// them all.
namespace dsv3 {

/// Rotary embedding of the shared key and of q's rope part; YaRN (arXiv:2309.00071) when `type`
/// says so.
struct RopeConfig {
  enum class Type : uint8_t { kNone, kYarn };
  double theta = 10000.0;                           // base of the frequencies, > 1
  Type type = Type::kNone;                          // scaling
  double factor = 40.0;                             // YaRN: new / original context length, >= 1
  int64_t original_max_position_embeddings = 4096;  // YaRN: tokens
  double beta_fast = 32.0;                          // YaRN: rotations above which a pair is kept
  double beta_slow = 1.0;       // YaRN: rotations below which a pair is stretched
  double mscale = 1.0;          // YaRN: attention temperature, numerator of the cos/sin ratio
  double mscale_all_dim = 1.0;  // YaRN: enters the softmax scale squared
  bool operator==(const RopeConfig&) const = default;
};

/// Multi-head latent attention (DeepSeek-V2 report, arXiv:2405.04434 §2.1).
struct MlaConfig {
  int64_t num_heads = 0;           // H; 0 = d_model / 128, at least 1
  int64_t q_lora_rank = 0;         // rank of the query's compression; 0 (null) = full-rank q_proj
  int64_t kv_lora_rank = 512;      // rank of the K/V latent; YAML also d_latent
  int64_t qk_nope_head_dim = 128;  // per head, without rotary embedding
  int64_t qk_rope_head_dim = 64;   // per head, with rotary embedding; even
  int64_t v_head_dim = 128;        // per head
  double latent_norm_eps = 1e-6;   // of q_a_layernorm and kv_a_layernorm (transformers fixes 1e-6)
  bool use_fp8_kv = false;         // latent cache in FP8 during generation
  bool operator==(const MlaConfig&) const = default;

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
};

/// Mixture of experts (technical report §2.1.2) and its balance.
struct MoeConfig {
  enum class Scoring : uint8_t { kSigmoid, kSoftmax };  // V3, V2
  enum class GroupScore : uint8_t { kTop2Sum, kMax };   // V3 (noaux_tc), V2
  int64_t num_experts = 0;                              // E, routed; 0 = no MoE layer at all
  int64_t num_experts_per_token = 8;                    // K <= E (and within the chosen groups)
  int64_t num_shared_experts = 1;     // fused into one MLP of num_shared · moe_intermediate_size
  int64_t moe_intermediate_size = 0;  // per expert; 0 = 11/16 · d_model, up to a multiple of 16
  int64_t first_k_dense_replace = 1;  // leading dense layers
  int64_t moe_layer_freq = 1;         // every n-th layer after those is MoE
  int64_t n_group = 1;                // groups of experts ("nodes"); divides E
  int64_t topk_group = 1;             // groups a token may reach
  double routed_scaling_factor = 1.0;
  bool norm_topk_prob = true;  // weights of the chosen sum to 1 before scaling
  Scoring scoring = Scoring::kSigmoid;
  GroupScore group_score = GroupScore::kTop2Sum;
  bool use_bias = true;  // e_score_correction_bias and its update (report §2.1.2)
  Schedule bias_update_rate = Schedule::constant(0.001);  // γ
  double sequence_loss_alpha = 1e-4;  // α of the sequence-wise balance loss; 0 = off
  bool use_deep_ep = false;           // two-hop dispatch (needs more than one rank)
  bool operator==(const MoeConfig&) const = default;
};

/// Multi-token prediction (technical report §2.2).
struct MtpConfig {
  int64_t num_nextn_predict_layers = 0;            // D, depth; 0 = off
  Schedule loss_weight = Schedule::constant(0.3);  // λ; depth k's loss enters with λ/D
  bool input_after_final_norm = true;  // depth 1 reads the hidden state after model.norm
  bool operator==(const MtpConfig&) const = default;
};

struct ModelConfig {
  std::string preset;                      // deepseek_v3, …; fields given beside it win
  DType dtype = DType::kBF16;              // of weights in products and of activations: fp32 | bf16
  int64_t num_layers = 12;                 // without the MTP modules
  int64_t vocab_size = 0;                  // V; 0 = the tokenizer's
  int64_t hidden_size = 1024;              // D; YAML also mla.d_model
  int64_t intermediate_size = 0;           // dense MLP; 0 = 11/4 · d_model, up to a multiple of 16
  int64_t max_position_embeddings = 4096;  // longest sequence the model is meant for
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.006;  // std of every weight matrix and embedding (report §4.2)
  bool tie_word_embeddings = false;  // head = embedding
  RopeConfig rope;
  MlaConfig mla;
  MoeConfig moe;
  MtpConfig mtp;
  bool operator==(const ModelConfig&) const = default;

  /// Whether layer `layer` (0-based; MTP modules count on after num_layers) is a MoE layer.
  bool is_moe_layer(int64_t layer) const {
    return moe.num_experts > 0 && layer >= moe.first_k_dense_replace &&
           layer % moe.moe_layer_freq == 0;
  }
};

struct ParallelConfig {
  int64_t tensor_parallel_size = 1;
  int64_t pipeline_parallel_size = 1;
  int64_t expert_parallel_size = 1;  // folded over data × tensor ranks
  int64_t context_parallel_size = 1;
  int64_t data_parallel_size = 0;  // 0 = world size / (tp · pp · cp)
  int64_t zero_stage = 0;          // 0..3
  bool operator==(const ParallelConfig&) const = default;
};

/// One weighted source of token shards or text.
struct DataSource {
  std::string path;     // a text, JSONL, .gz, .zst file, a token shard, a Megatron prefix or a glob
  double weight = 1.0;  // share of the blend, relative to the others
  bool operator==(const DataSource&) const = default;
};

struct DataConfig {
  std::vector<DataSource> train;
  std::vector<DataSource> validation;   // empty = split from train by validation_every
  int64_t validation_every = 0;         // every n-th document of train is held out; 0 = none
  std::string document_split = "file";  // text files: "line" (each line a document), "blank"
                                        // (blank-line separated paragraphs) or "file"
  std::string tokenizer = "bytes";      // "bytes", or "ids:V[:EOD]" (data/tokenizer.h)
  int64_t sequence_length = 4096;       // S, tokens
  bool mask_across_documents = false;   // attention and positions stop at document borders
  int64_t validation_overlap = 0;       // tokens of a validation sequence that only give context to
                                        // the rest; 0 to sequence_length - 1
  std::string jsonl_field = "text";     // the field of a JSONL line that is its document
  double fim_rate = 0.0;                // share of documents rewritten prefix-suffix-middle, 0..1
  bool shuffle = true;                  // order of documents and sequences by training.seed
  std::string cache_dir = "";           // tokenised shards; "" = beside the run
  int64_t num_workers = 2;              // threads of tokenisation; 0 = all cores
  bool operator==(const DataConfig&) const = default;
};

enum class Recompute : uint8_t { kNone, kSelective, kFull };

/// Losses that stand out of those before them (training/loss_spike.h).
struct SpikeConfig {
  int64_t window = 100;    // steps that a loss is held against; 0 = no watch
  double threshold = 8.0;  // robust z-score beyond which a loss is a spike, > 0
  bool skip = false;       // skip the step of a spike instead of only reporting it
  bool operator==(const SpikeConfig&) const = default;
};

/// Exponential moving average of the parameters in host memory (training/ema.h).
struct EmaConfig {
  double decay = 0;       // per optimizer step, 0 <= decay < 1; 0 = no average
  int64_t every = 1;      // steps between updates
  bool evaluate = false;  // evaluate the average too
  bool operator==(const EmaConfig&) const = default;
};

struct TrainingConfig {
  int64_t steps = 1000;          // optimizer steps
  int64_t micro_batch_size = 1;  // sequences per forward
  Schedule global_batch_size =
      Schedule::constant(8);  // sequences per optimizer step, all ranks; multiple of
                              // micro_batch_size · data_parallel_size
  int64_t seed = 1;
  bool deterministic = false;              // same bits from the same seed on the same machine
  Recompute recompute = Recompute::kNone;  // none | selective | full
  int64_t eval_every = 0;                  // steps; 0 = only at the end
  int64_t eval_batches = 0;                // micro-batches per evaluation; 0 = all
  int64_t log_every = 1;                   // steps between progress lines
  double time_limit_minutes = 0;           // stop, evaluate and save after this; 0 = none
  std::string device = "auto";             // auto | cpu | cuda
  int64_t num_threads = 0;                 // CPU threads; 0 = all cores
  std::string sample_prompt = "";          // text that the sample at the end continues
  int64_t sample_tokens = 200;             // length of that sample; 0 = none
  int64_t max_skipped_steps = 10;          // in a row; then the run stops
  SpikeConfig spike;
  EmaConfig ema;
  bool operator==(const TrainingConfig&) const = default;
};

struct OptimizerConfig {
  Schedule learning_rate = Schedule::constant(2.2e-4);
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;  // of matrices; norms, biases and the router's bias have none
  bool decay_embeddings = true;
  double clip = 1.0;                   // global gradient norm; 0 = off
  bool master_weights = true;          // FP32 copy of BF16 weights
  DType moment_dtype = DType::kF32;    // fp32 | bf16
  DType gradient_dtype = DType::kF32;  // accumulation: fp32 | bf16
  bool stochastic_rounding = false;    // of BF16 weights without masters and of BF16 moments
  bool operator==(const OptimizerConfig&) const = default;
};

struct CheckpointConfig {
  int64_t every_steps = 0;   // 0 = not by steps
  double every_minutes = 0;  // since the last save; 0 = not by time
  int64_t keep_last = 2;     // newest checkpoints that are kept
  int64_t keep_every = 0;    // steps; checkpoints of its multiples are kept for good; 0 = none
  bool at_end = true;        // also when the run ends or is told to stop; false: benchmarks
  bool operator==(const CheckpointConfig&) const = default;
};

struct MonitorConfig {
  bool tensorboard = false;      // event files in RUN/tensorboard/
  bool wandb = false;            // scripts/wandb_bridge.py beside the run
  std::string prometheus;        // text file for a node exporter; "" = none
  int64_t per_layer_every = 10;  // steps between records with every layer's routing; 0 = none
  bool operator==(const MonitorConfig&) const = default;
};

/// Steps [first, last], counted from 1; first 0 = none.
struct StepRange {
  int64_t first = 0;
  int64_t last = 0;
  bool operator==(const StepRange&) const = default;
};

struct ProfileConfig {
  StepRange steps;  // recorded into RUN/profile
  bool operator==(const ProfileConfig&) const = default;
};

struct Config {
  ModelConfig model;
  ParallelConfig parallel;
  DataConfig data;
  TrainingConfig training;
  OptimizerConfig optimizer;
  CheckpointConfig checkpoint;
  MonitorConfig monitor;
  ProfileConfig profile;
  bool operator==(const Config&) const = default;
};

}  // namespace dsv3
