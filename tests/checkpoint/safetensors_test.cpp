#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "base/error.h"
#include "checkpoint/temporary_directory.h"

namespace dsv3 {
namespace {

std::string file_of(const std::string& header, size_t data_bytes, uint64_t length) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>((length >> (8 * i)) & 0xff);
  return file + header + std::string(data_bytes, '\1');
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return file_of(header, data_bytes, header.size());
}

std::span<const std::byte> bytes_of(const std::vector<float>& values) {
  return std::as_bytes(std::span<const float>(values));
}

class Safetensors : public ::testing::Test {
 protected:
  /// The message of the IoError that opening `content` gives; empty when it opens.
  std::string error_of(const std::string& content) {
    const auto path = directory_.path() / "broken.safetensors";
    write_file_atomically(path, content);
    try {
      SafetensorsFile file(path);
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("broken.safetensors"), std::string::npos);
      return error.what();
    }
    return "";
  }
  void expect_error(const std::string& header, size_t data, const std::string& part) {
    const std::string message = error_of(file_of(header, data));
    EXPECT_NE(message.find(part), std::string::npos)
        << "header " << header << "\ngave '" << message << "', expected '" << part << "'";
  }

  test::TemporaryDirectory directory_;
};

TEST_F(Safetensors, RoundTripIsEqualByteForByte) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  std::vector<TensorPlan> plan;
  for (int i = 0; i < 40; ++i) {
    TensorPlan tensor{"t" + std::to_string(random() % 1000) + "." + std::to_string(i),
                      static_cast<StoredType>(random() % 15),
                      {}};
    for (uint32_t dims = random() % 4; dims > 0; --dims) tensor.shape.push_back(random() % 6);
    plan.push_back(tensor);
  }
  const auto first = directory_.path() / "a.safetensors";
  const auto second = directory_.path() / "b.safetensors";
  SafetensorsWriter writer(first, plan, {{"format", "pt"}, {"note", "\"quoted\" é"}});
  for (const auto& tensor : writer.order()) {
    std::vector<std::byte> bytes(tensor.num_bytes());
    for (auto& b : bytes) b = static_cast<std::byte>(random());
    writer.write(bytes);
  }
  writer.commit();

  const SafetensorsFile file(first);
  ASSERT_EQ(file.tensors().size(), plan.size());
  std::vector<TensorPlan> again;
  for (const auto& tensor : file.tensors())
    again.push_back({tensor.name, tensor.type, tensor.shape});
  std::shuffle(again.begin(), again.end(), random);
  SafetensorsWriter copy(second, again, file.metadata());
  for (const auto& tensor : copy.order()) {
    const auto found = std::find_if(file.tensors().begin(), file.tensors().end(),
                                    [&](const auto& t) { return t.name == tensor.name; });
    copy.write(found->bytes);
  }
  copy.commit();
  EXPECT_EQ(read_file(first), read_file(second));
}

TEST_F(Safetensors, AnEmptyFileOfTensorsOpens) {
  EXPECT_EQ(error_of(file_of("{}", 0)), "");
}

TEST_F(Safetensors, HostileHeadersAreRefusedByName) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(error_of(file_of(good, 8)), "");
  EXPECT_NE(error_of("1234567").find("too few"), std::string::npos);
  EXPECT_NE(error_of(file_of(good, 8, ~0ull)).find("length"), std::string::npos);
  EXPECT_NE(error_of(file_of(good, 8, good.size() + 9)).find("length"), std::string::npos);
  EXPECT_NE(error_of(file_of(good, 8, good.size() - 1)).find("JSON"), std::string::npos);
  expect_error(good, 7, "leave the 7 bytes");
  expect_error(good, 9, "belong to no tensor");
  expect_error("[]", 0, "not a JSON object");
  expect_error(R"({"a":3})", 0, "'a'");
  expect_error(R"({"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})", 8, "F31");
  expect_error(R"({"a":{"dtype":7,"shape":[2],"data_offsets":[0,8]}})", 8, "dtype");
  expect_error(R"({"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})", 8, "shape");
  expect_error(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, "not a count");
  expect_error(R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", 8, "not a count");
  expect_error(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, "needs 12 bytes");
  expect_error(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "data_offsets");
  expect_error(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8, "pair");
  expect_error(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}})", 8,
               "overflow");
  expect_error(R"({"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]}})", 8,
               "overflow");
  expect_error(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999999999]}})", 8,
               "pair");
  expect_error(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],)"
               R"("data_offsets":[0,1]}})",
               1, "dimensions");
  expect_error(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
               8, "twice");
  expect_error(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
               12, "overlaps");
  expect_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
               R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
               12, "hole");
  expect_error(R"({"__metadata__":{"a":1}})", 0, "__metadata__");
  expect_error(std::string(100000, '['), 0, "deeply");
}

TEST_F(Safetensors, MutatedFilesNeverCrash) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const std::string good = file_of(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]}})",
      20);
  const auto path = directory_.path() / "mutant.safetensors";
  for (int i = 0; i < 3000; ++i) {
    std::string mutant = good;
    for (uint32_t edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % mutant.size();
      switch (random() % 3) {
        case 0:
          mutant[at] = static_cast<char>(random());
          break;
        case 1:
          mutant.erase(at, 1 + random() % 5);
          break;
        default:
          mutant.insert(at, mutant.substr(random() % mutant.size(), random() % 9));
      }
      if (mutant.empty()) mutant = "x";
    }
    FILE* out = std::fopen(path.c_str(), "wb");
    std::fwrite(mutant.data(), 1, mutant.size(), out);
    std::fclose(out);
    try {
      const SafetensorsFile file(path);
      for (const auto& tensor : file.tensors()) {  // whatever opens can be read in full
        std::vector<float> values(static_cast<size_t>(tensor.numel()));
        if (tensor.type == StoredType::kF32 || tensor.type == StoredType::kBF16) {
          read_as_float(tensor, path, values.data());
        }
      }
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("mutant.safetensors"), std::string::npos);
    }
  }
}

TEST_F(Safetensors, EveryFloatTypeIsReadExactly) {
  const auto path = directory_.path() / "types.safetensors";
  const std::vector<float> values = {1.5f, -0.0f, INFINITY, 0x1p-24f};
  const std::vector<double> wide(values.begin(), values.end());
  const std::vector<uint16_t> brain = {0x3fc0, 0x8000, 0x7f80, 0x3380};
  const std::vector<uint16_t> half = {0x3e00, 0x8000, 0x7c00, 0x0001};
  SafetensorsWriter writer(path, {{"f32", StoredType::kF32, {4}},
                                  {"f64", StoredType::kF64, {4}},
                                  {"bf16", StoredType::kBF16, {4}},
                                  {"f16", StoredType::kF16, {4}},
                                  {"u8", StoredType::kU8, {1}}});
  for (const auto& tensor : writer.order()) {
    if (tensor.name == "f32") writer.write(bytes_of(values));
    if (tensor.name == "f64") writer.write(std::as_bytes(std::span(wide)));
    if (tensor.name == "bf16") writer.write(std::as_bytes(std::span(brain)));
    if (tensor.name == "f16") writer.write(std::as_bytes(std::span(half)));
    if (tensor.name == "u8") writer.write(std::vector<std::byte>(1));
  }
  writer.commit();
  const SafetensorsFile file(path);
  for (const auto& tensor : file.tensors()) {
    SCOPED_TRACE(tensor.name);
    std::vector<float> read(4);
    if (tensor.name == "u8") {
      EXPECT_THROW(read_as_float(tensor, path, read.data()), std::invalid_argument);
      continue;
    }
    read_as_float(tensor, path, read.data());
    EXPECT_EQ(std::memcmp(read.data(), values.data(), 16), 0);
  }
}

TEST_F(Safetensors, WriterRefusesWrongSizesAndUnfinishedFiles) {
  const auto path = directory_.path() / "w.safetensors";
  {
    SafetensorsWriter writer(path, {{"a", StoredType::kF32, {3}}});
    EXPECT_THROW(writer.write(std::vector<std::byte>(8)), std::invalid_argument);
    EXPECT_THROW(writer.commit(), std::logic_error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
}

TEST_F(Safetensors, IndexIsHeldToTheDirectoryAndItsShards) {
  const auto& dir = directory_.path();
  SafetensorsWriter writer(dir / "one.safetensors", {{"a", StoredType::kF32, {1}}});
  writer.write(std::vector<std::byte>(4));
  writer.commit();
  const auto error_with = [&](const std::string& index) -> std::string {
    write_file_atomically(dir / "model.safetensors.index.json", index);
    try {
      const WeightFiles files(dir);
      return files.find("a") != nullptr ? "" : "not found";
    } catch (const IoError& error) {
      return error.what();
    }
  };
  EXPECT_EQ(error_with(R"({"weight_map":{"a":"one.safetensors"}})"), "");
  const auto contains = [&](const std::string& index, const std::string& part) {
    const auto message = error_with(index);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  contains(R"({"weight_map":{"a":"../one.safetensors"}})", "inside the directory");
  contains(R"({"weight_map":{"a":"/etc/passwd"}})", "inside the directory");
  contains(R"({"weight_map":{"a":""}})", "inside the directory");
  contains(R"({"weight_map":{"a":"two.safetensors"}})", "two.safetensors is missing");
  contains(R"({"weight_map":{"b":"one.safetensors"}})", "'b' is not in one.safetensors");
  contains(R"({"weight_map":7})", "weight_map");
  contains("{", "JSON");
}

TEST_F(Safetensors, DirectoryWithoutWeightsIsNamed) {
  EXPECT_THROW(WeightFiles{directory_.path()}, IoError);
  EXPECT_THROW(WeightFiles{directory_.path() / "nowhere"}, IoError);
}

}  // namespace
}  // namespace dsv3
